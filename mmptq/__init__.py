"""mmptq: post-training quantization of Swin and ViT backbones in OpenMMLab detectors
and segmentors.

The door for Python users. Names are imported when they are first used, so that
``import mmptq`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import QuantizationError
from .version import __version__

if TYPE_CHECKING:
    from .apis.quantize import quantize
    from .backbones import BackboneSpec, register_spec
    from .runtime import to_integer
    from .wrapping.in_place import quantize_

__all__ = [
    'BackboneSpec',
    'QuantizationError',
    '__version__',
    'quantize',
    'quantize_',
    'register_spec',
    'to_integer',
]

PLACES = {
    'BackboneSpec': 'backbones',
    'quantize': 'apis',
    'quantize_': 'wrapping.in_place',
    'register_spec': 'backbones',
    'to_integer': 'runtime',
}
"""Where the names of the door are."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{PLACES[name]}'), name)


def __dir__() -> list[str]:
    return sorted(__all__)
