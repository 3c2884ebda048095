"""What a quantized model is and what it cost: the content of ``summary.json`` and of
every quantized file.

There is one definition, by which both is written and read. Reading is strict, because
files come from
strangers: every key is known, every value is of its type, and every text is one
    printable line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)
from typing_extensions import Self

from ..backbones.reasons import FloatReason
from ..errors import printable

SCHEMA = 2
"""The version of this content that is written. Files without a number are of version 1.
"""


def one_line(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: If a terminal could not show it on a line or it is too long.
    """
    if len(text) > 500 or printable(text) != text:
        raise ValueError('Text should be one printable line of at most 500 characters')
    return text


def float_reason(value: Any) -> Any:
    """The reason that a text stands for (:meth:`FloatReason.read`); anything else as it
    is.
    """
    return FloatReason.read(value) if type(value) is str else value


Line = Annotated[str, AfterValidator(one_line)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Reason = Annotated[
    FloatReason,
    BeforeValidator(float_reason),
    PlainSerializer(lambda reason: reason.value, return_type=str),
]


class Part(BaseModel):
    """A part of a summary: it cannot be changed, knows all its keys and takes no value
    of another type.
    """

    model_config = ConfigDict(strict=True, extra='forbid', frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data as files have it: what was not said, such as a layer's path, is
        left out.
        """
        return self.model_dump(by_alias=True, exclude_unset=True)


class BitsSummary(Part):
    """Bits of weights, activations and attention probabilities, 2 to 8."""

    weight: int = Field(ge=2, le=8)
    activation: int = Field(ge=2, le=8)
    softmax: int = Field(ge=2, le=8)


class CalibrationSummary(Part):
    """On what the model was calibrated, and at what cost (seconds, MiB)."""

    dataset: Line
    split: Literal['train', 'test']
    images: Count
    seed: Count
    shuffle: bool
    leak: bool
    seconds: Amount
    peak_memory_mib: Amount


class Result(Part):
    """An evaluation: metrics by their own names, None for one that is not a number, and
    seconds.
    """

    metrics: dict[Line, Number | None]
    seconds: Amount
    backend: Line | None = None


class Sizes(Part):
    """Sizes of the weights, MiB."""

    float_mib: Amount
    quantized_mib: Amount


class LayerSummary(Part):
    """A quantized operation, or a layer that stays float, with the reason.

    Bits, quantizers and whether these are uniform are given for each operand by its
    role; ``path`` says what computes the layer in integers.
    """

    name: Line
    kind: Line
    site: Line | None
    bits: dict[Line, Count] | None
    effective_bits: dict[Line, Amount] | None
    quantizer: dict[Line, Line] | None
    uniform: dict[Line, bool] | None
    sqnr_db: Number | None
    reason: Reason | None
    path: Line | None = None


class About(Part):
    """A quantized model as its files describe it, which are written before it is
    evaluated.
    """

    schema_number: int = Field(default=1, ge=1, le=SCHEMA, alias='schema')
    version: Line
    method: Line
    recipe: dict[Line, Any]
    bits: BitsSummary
    scope: Literal['backbone', 'model']
    calibration: CalibrationSummary
    float_result: Result | None = Field(alias='float')
    size: Sizes
    layers: list[LayerSummary]

    @classmethod
    def read(cls, content: Any) -> Self:
        """A description as this version has it, from plain data of this version or an
        earlier one.

        Raises:
            ValidationError: If a key is missing, unknown or of another type.
        """
        found = cls.model_validate(content)
        return found.model_copy(update=dict(schema_number=SCHEMA))

    def idle_layers(self) -> list[str]:
        """The layers that received nothing in the calibration."""
        return [layer.name for layer in self.layers if layer.reason is FloatReason.IDLE]


class Summary(About):
    """A quantized model and its evaluation, None before that: the content of
    ``summary.json``.
    """

    quantized: Result | None

    @classmethod
    def of(cls, about: About) -> Summary:
        """The summary of a model that is not evaluated yet, from what its file says of
        it.
        """
        return cls.read({**about.to_dict(), 'quantized': None})

    def about(self) -> dict[str, Any]:
        """What a file says of the model: everything but the result of its evaluation."""
        content = self.to_dict()
        del content['quantized']
        return content


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, and how many more there are."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    place = '.'.join(str(part) for part in faults[0]['loc'])
    more = f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''
    return f'{place}: {faults[0]["msg"]}{more}'
