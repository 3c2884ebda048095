"""What tools and Python users call."""

from ..backbones.presets import load_recipe, recipe_names, recipe_of
from ..engine.options import PAPER_IMAGES
from .compare import compare
from .convert_checkpoint import convert_checkpoint
from .export import export
from .packed import load_packed, pack
from .quantize import quantize

__all__ = [
    'PAPER_IMAGES',
    'compare',
    'convert_checkpoint',
    'export',
    'load_packed',
    'load_recipe',
    'pack',
    'quantize',
    'recipe_names',
    'recipe_of',
]
