"""What a quantized file says of itself, checked whole before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..backbones import Recipe
from ..backbones.convert import IDLE
from ..errors import QuantizationError, printable
from .plain import plain, plain_parts


def _line(text: str) -> str:
    if len(text) > 500 or printable(text) != text:
        raise ValueError('Text should be one printable line of at most 500 characters')
    return text


Line = Annotated[str, AfterValidator(_line)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """Every key is known, and every value of its type."""

    model_config = ConfigDict(strict=True, extra='forbid', frozen=True)


class BitsAbout(_Strict):
    """Bits of weights, activations and attention probabilities, 2 to 8."""

    weight: int = Field(ge=2, le=8)
    activation: int = Field(ge=2, le=8)
    softmax: int = Field(ge=2, le=8)


class CalibrationAbout(_Strict):
    """On what it was calibrated, and at what cost (seconds, MiB)."""

    dataset: Line
    split: Literal['train', 'test']
    images: Count
    seed: Count
    shuffle: bool
    leak: bool
    seconds: Amount
    peak_memory_mib: Amount


class ResultAbout(_Strict):
    """Metrics by their own names, None for one that is not a number, and seconds."""

    metrics: dict[Line, Number | None]
    seconds: Amount
    backend: Line | None = None


class SizeAbout(_Strict):
    """Sizes of the weights, MiB."""

    float_mib: Amount
    quantized_mib: Amount


class LayerAbout(_Strict):
    """A row of the report: a quantized operation, or a layer that stays float, with the reason."""

    name: Line
    kind: Line
    site: Line | None
    bits: dict[Line, Count] | None
    effective_bits: dict[Line, Amount] | None
    quantizer: dict[Line, Line] | None
    uniform: dict[Line, bool] | None
    sqnr_db: Number | None
    reason: Line | None
    path: Line | None = None


class About(_Strict):
    """What ``quantized.pth`` and ``quantized.safetensors`` say of themselves: ``summary.json`` before the
    quantized evaluation."""

    version: Line
    method: Line
    recipe: dict[Line, Any]
    bits: BitsAbout
    scope: Literal['backbone', 'model']
    calibration: CalibrationAbout
    result: ResultAbout | None = Field(alias='float')
    size: SizeAbout
    layers: list[LayerAbout]


def checked_about(about: Any, source: str) -> dict[str, Any]:
    """A plain copy of what a file says of itself.

    Raises:
        QuantizationError: If a key is missing, unknown or of another type; if its recipe is none; or if
            its bits or method are not those of its recipe.
    """
    try:
        content: dict[str, Any] = plain(about, 'what it says of itself')
        found = About.model_validate(content)
        recipe = whole_recipe(found)
    except ValidationError as error:
        raise QuantizationError(
            f'{source} does not say how it was quantized, or was written by another version of mmptq: '
            f'{first_fault(error)}'
        ) from None
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    bits = found.bits.model_dump()
    if bits != recipe.to_dict()['bits'] or found.method != recipe.method_name:
        raise QuantizationError(
            f'{source} contradicts itself: it says {found.method}, bits {bits}, and its recipe says '
            f'{recipe.method_name}, bits {recipe.to_dict()["bits"]}'
        )
    return {**content, 'recipe': recipe.to_dict()}


def whole_recipe(about: About) -> Recipe:
    """The recipe of a file, with the layers that calibration left float: version 0.1.0 did not write
    these into its recipe, but only as rows with their reason."""
    recipe = Recipe.from_dict(about.recipe)
    idle = [row.name for row in about.layers if row.reason == IDLE]
    return recipe if recipe.layers else recipe.leaving_float(idle)


def how_made(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """What a quantized checkpoint says of itself; None of a float one.

    Raises:
        QuantizationError: If that is not what mmptq writes, see :func:`checked_about`, or the file has
            parameters of quantizers and says nothing of them.
    """
    meta = checkpoint.get('meta')
    about = meta.get('mmptq') if type(meta) is dict else None
    if about is not None:
        return checked_about(about, source)
    if any('_quantizer.' in key for key in checkpoint['state_dict']):
        raise QuantizationError(
            f'{source} has parameters of quantizers, but does not say by which recipe it was made'
        )
    return None


def dataset_meta(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its data set, classes above all; without what is not plain data."""
    meta = checkpoint.get('meta')
    return plain_parts(meta.get('dataset_meta') if type(meta) is dict else None, 'dataset_meta')


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, and how many more there are."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    place = '.'.join(str(part) for part in faults[0]['loc'])
    more = f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''
    return f'{place}: {faults[0]["msg"]}{more}'
