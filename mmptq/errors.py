"""The one error that mmptq raises for what a user can mend; its text says what to do."""


class QuantizationError(RuntimeError):
    """Input that cannot be quantized as asked.

    The message names the file, key or layer and the remedy. It is one line that any terminal can
    show: names that come from a file may hold control characters, and these are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text as one line without characters that move a cursor, change colours or stay invisible."""
    return ''.join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if character in '\n\t':
        return ' '
    return character.encode('unicode_escape').decode()
