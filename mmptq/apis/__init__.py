"""What tools and Python users call."""
from ..backbones.presets import load_recipe, recipe_names, recipe_of
from .quantize import quantize

__all__ = ['load_recipe', 'quantize', 'recipe_names', 'recipe_of']
