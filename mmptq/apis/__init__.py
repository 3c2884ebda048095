"""What tools and Python users call."""
from ..backbones.presets import load_recipe, recipe_names, recipe_of
from .compare import compare
from .quantize import quantize

__all__ = ['compare', 'load_recipe', 'quantize', 'recipe_names', 'recipe_of']
