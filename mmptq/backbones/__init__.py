"""WHICH layers are quantized, as data: one BackboneSpec per family."""

from . import beit, swin, timm, vit, vitdet  # noqa: F401  (each registers its specs)
from .convert import ConversionReport, convert
from .recipe import Bits, Recipe
from .spec import SITES, BackboneSpec, find_spec, register_spec, support_table

__all__ = [
    'SITES',
    'BackboneSpec',
    'Bits',
    'ConversionReport',
    'Recipe',
    'convert',
    'find_spec',
    'register_spec',
    'support_table',
]
