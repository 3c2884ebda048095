"""Why a layer of a quantized model stays float: one word each for files, and a sentence
for people.
"""

from __future__ import annotations

from enum import Enum


class FloatReason(str, Enum):
    """Why a layer stays float. The value is what files hold; :meth:`sentence` is what
    is printed.
    """

    NO_SITE = 'no_site'
    NO_QUANTIZED_FORM = 'no_quantized_form'
    TRAINING_ONLY = 'training_only'
    OUTSIDE_OF_SCOPE = 'outside_of_scope'
    IDLE = 'idle'
    KEPT = 'kept'

    def sentence(self, kind: str) -> str:
        """The reason as a clause.

        Args:
            kind: The name of the layer's class.
        """
        return SENTENCES[self].format(kind=kind)

    @classmethod
    def read(cls, text: str) -> FloatReason:
        """The reason that a file gives: its word, or the sentence that files without a
        schema number have.

        Raises:
            ValueError: If it is neither.
        """
        for reason, sentence in SENTENCES.items():
            _, names_class, end = sentence.partition('{kind}')
            said = text.endswith(end) if names_class else text == sentence
            if said or text == reason.value:
                return reason
        raise ValueError(f'it is one of {", ".join(reason.value for reason in cls)}')


SENTENCES = {
    FloatReason.NO_SITE: 'its BackboneSpec names no site for it',
    FloatReason.NO_QUANTIZED_FORM: '{kind} has no quantized form',
    FloatReason.TRAINING_ONLY: 'runs in training only',
    FloatReason.OUTSIDE_OF_SCOPE: 'outside of scope backbone',
    FloatReason.IDLE: 'received nothing in calibration',
    FloatReason.KEPT: 'kept float by the recipe',
}
"""What is printed for each reason; ``{kind}`` is the name of the layer's class."""
