"""What tools and Python users call."""
from .quantize import quantize
from .recipes import load_recipe, recipe_names, recipe_of

__all__ = ['load_recipe', 'quantize', 'recipe_names', 'recipe_of']
