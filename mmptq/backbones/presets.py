"""Recipes by name, by file, or by method and bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ..errors import QuantizationError
from .by_layer import KINDS
from .recipe import Recipe

RECIPES = Path(__file__).parents[1] / '.mim' / 'configs' / '_base_' / 'recipes'
NAME = re.compile(
    r'(?P<method>\w+?)_w(?P<weight>\d+)a(?P<activation>\d+)(?P<variant>_\w+)?'
)


def recipe_names() -> list[str]:
    """The methods that mmptq comes with a recipe for."""
    return sorted(path.stem for path in RECIPES.glob('*.py'))


def load_recipe(recipe: str | Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as a config has it, checked and whole.

    Args:
        recipe: ``METHOD_wXaY`` (``adalog_w4a4``) or a variant of it
            (``adalog_w4a4_fast``), a config file that defines ``recipe``, or the recipe
            itself.

    Raises:
        QuantizationError: If there is none, or it is wrong.
    """
    if not isinstance(recipe, str):
        return Recipe.from_dict(recipe).to_dict()
    if recipe.endswith('.py'):
        if not Path(recipe).is_file():
            raise QuantizationError(f'recipe {recipe} does not exist')
        return _read(Path(recipe))
    found = NAME.fullmatch(recipe)
    method = found and found['method'] + (found['variant'] or '')
    if not found or method not in recipe_names():
        raise QuantizationError(
            f'unknown recipe {recipe!r}: name METHOD_wXaY or, for a variant,'
            ' METHOD_wXaY_VARIANT, X and Y from 2 to 8 (adalog_w4a4,'
            ' adalog_w4a4_fast), METHOD or METHOD_VARIANT one of'
            f' {", ".join(recipe_names())}; or the path of a config file that defines'
            ' `recipe`'
        )
    return recipe_of(method, int(found['weight']), int(found['activation']))


def recipe_of(
    method: str, weight_bits: int, activation_bits: int, softmax_bits: int | None = None
) -> dict[str, Any]:
    """The recipe of a method (``adalog``, ``adalog_fast``) at given bits; those of
    attention probabilities are those of activations.

    Raises:
        QuantizationError: If the method is unknown or bits are not 2 to 8.
    """
    if method not in recipe_names():
        raise QuantizationError(
            f'unknown method {method!r}: known are {", ".join(recipe_names())}'
        )
    bits = dict(weight=weight_bits, activation=activation_bits)
    if softmax_bits is not None:
        bits['softmax'] = softmax_bits
    for what, number in bits.items():
        if not 2 <= number <= 8:
            raise QuantizationError(f'{number} bits for {what}: 2 to 8 are possible')
    base, _, variant = method.partition('_')
    name = f'{base}_w{weight_bits}a{activation_bits}' + (
        f's{softmax_bits}' if softmax_bits is not None else ''
    )
    return _read(
        RECIPES / f'{method}.py',
        dict(name=f'{name}_{variant}' if variant else name, bits=bits),
    )


def paper_protocol(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A UQ-ViT recipe as in its official detection code: inputs of convolutions at 8
    bits, no NormQuant before fc2.

    (The official code also takes its calibration images from the evaluation, see
    :func:`mmptq.apis.quantize`; that it leaves the reference model in train mode is not
    repeated.)

    Raises:
        QuantizationError: If it is no recipe of UQ-ViT.
    """
    if recipe.get('method', {}).get('type') != 'UQViT':
        raise QuantizationError(
            'the paper protocol is that of UQ-ViT: give a recipe uqvit_wXaY, not'
            f' {recipe["name"]}'
        )
    quantizers = {site: dict(options) for site, options in recipe['quantizers'].items()}
    quantizers['post_gelu'].pop('rescale', None)
    quantizers['conv']['bits'] = 8
    return Recipe.from_dict(
        {**recipe, 'name': f'{recipe["name"]}_paper', 'quantizers': quantizers}
    ).to_dict()


def mixed_recipe(
    recipe: Mapping[str, Any],
    keep_float: Sequence[str] = (),
    layer_bits: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """A recipe with further entries in its ``layers``; its name then ends in
    ``_mixed``.

    Args:
        recipe: The recipe.
        keep_float: Patterns of layers and products that stay float.
        layer_bits: By pattern: bits of weights, activations and, optionally, attention
            probabilities.

    Raises:
        QuantizationError: If a pattern or number of bits is none.
    """
    if isinstance(keep_float, str):
        raise QuantizationError(
            f'keep_float is a list of patterns, not the text {keep_float!r}'
        )
    entries: list[dict[str, Any]] = []
    for pattern, numbers in (layer_bits or {}).items():
        if not isinstance(numbers, Sequence) or len(numbers) not in (2, 3):
            raise QuantizationError(
                f'layer_bits of {pattern!r} are those of weights, activations and,'
                f' optionally, attention probabilities, not {numbers!r}'
            )
        entries.append(
            dict(pattern=pattern, bits=dict(zip(KINDS, numbers, strict=False)))
        )
    entries += [dict(pattern=pattern, float=True) for pattern in keep_float]
    whole = Recipe.from_dict(recipe).to_dict()
    if not entries:
        return whole
    name = f'{whole["name"].removesuffix("_mixed")}_mixed'
    layers = [*whole.get('layers', []), *entries]
    return Recipe.from_dict({**whole, 'name': name, 'layers': layers}).to_dict()


def _read(path: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        cfg = Config.fromfile(
            path, use_predefined_variables=False, import_custom_modules=False
        )
    except Exception as error:  # a config is a program: it may raise anything
        raise QuantizationError(
            f'recipe {path} cannot be read: {type(error).__name__}: {error}'
        ) from error
    if 'recipe' not in cfg:
        raise QuantizationError(f'{path} does not define `recipe`')
    if changes:
        cfg.merge_from_dict({'recipe': changes})
    recipe = (
        cfg.recipe.to_dict()
        if isinstance(cfg.recipe, Config | ConfigDict)
        else cfg.recipe
    )
    return Recipe.from_dict(recipe).to_dict()
