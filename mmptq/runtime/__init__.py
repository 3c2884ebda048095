"""The calibrated model in integers: packed weights, products, conversion."""

from .convert import to_integer

__all__ = ['to_integer']
