"""The one error that mmptq raises for what a user can mend; its text says what to do."""

LONGEST = 2000
"""Characters of a message; what a file says may be longer."""


class QuantizationError(RuntimeError):
    """Input that cannot be quantized as asked.

    The message names the file, key or layer and the remedy. It is one line that any
    terminal can
    show: names that come from a file may hold control characters, and these are
        escaped.
    """

    def __init__(self, message: str) -> None:
        cut = message if len(message) <= LONGEST else f'{message[:LONGEST]} ...'
        super().__init__(printable(cut))


def printable(text: str) -> str:
    """A text as one line without characters that move a cursor, change colours or stay
    invisible.
    """
    return ''.join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if character in '\n\t':
        return ' '
    return character.encode('unicode_escape').decode()
