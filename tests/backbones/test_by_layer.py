"""Recipes by layer: what an entry may say, which layers it is for, and which entry
wins.
"""

import json
import time

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmptq import QuantizationError
from mmptq.apis import load_recipe
from mmptq.backbones import Bits, Recipe
from mmptq.backbones.by_layer import LayerEntry
from mmptq.backbones.convert import layers_with_products
from mmptq.backbones.presets import mixed_recipe
from mmptq.backbones.reasons import FloatReason
from mmptq.calibration import operations
from mmptq.layers import GeluShift, QuantLinear, Rescale
from mmptq.quantizers import AdaLogQuantizer, Float, UniformQuantizer

from ..conftest import SWIN, build_in, image
from .test_convert import segmentor, unaccounted

BLOCK = 'backbone.stages.0.blocks.1'
FC2 = f'{BLOCK}.ffn.layers.1'


def with_layers(layers, name='adalog_w4a4'):
    return Recipe.from_dict({**load_recipe(name), 'layers': layers})


def built(layers, name='adalog_w4a4', whole=False):
    recipe = {**load_recipe(name), 'layers': layers}
    if whole:
        return build_in(
            'mmseg', dict(type='mmptq.QuantModel', model=segmentor(), recipe=recipe)
        )
    return build_in(
        'mmdet', dict(type='mmptq.QuantBackbone', backbone=SWIN, recipe=recipe)
    )


def bits_of(recipe, *sites):
    return tuple(recipe.build_quantizer(site, -2).bits for site in sites)


# Which layers a pattern is for.


@pytest.mark.parametrize(
    ('pattern', 'name', 'expected'),
    [
        (FC2, FC2, True),
        (FC2.removeprefix('backbone.'), FC2, True),
        ('backbone.stages.*.ffn.layers.1', FC2, True),  # a star crosses dots
        ('stages.?.blocks.[01].ffn.*', FC2, True),
        ('*', FC2, True),
        ('*', 'decode_head.conv_seg', True),
        ('*.layers.1', FC2, True),
        ('blocks.1.ffn.layers.1', FC2, False),  # the whole name
        ('stages.0.blocks.1.ffn', FC2, False),
        ('stages.0.blocks.1.ffn.layers.1.*', FC2, False),
        ('Stages.*', FC2, False),
        ('stages.?.?.ffn.layers.1', FC2, False),
        (
            'conv_seg',
            'decode_head.conv_seg',
            False,
        ),  # only the backbone's prefix may be left out
        ('backbone.backbone.*', FC2, False),
        ('stages.0+.*', FC2, False),  # no regular expression
    ],
)
def test_patterns(pattern, name, expected):
    assert LayerEntry(pattern).matches(name) is expected


def test_bits_of_single_layers_in_a_model():
    model = built({'stages.0.blocks.1.ffn.layers.1': dict(bits=dict(activation=8))})
    found = {
        name: tuple(quantizer.bits for quantizer in op.quantizers().values())
        for name, op in operations(model).items()
    }
    assert found.pop('stages.0.blocks.1.ffn.layers.1') == (8, 4)
    assert found.pop('patch_embed.projection') == (8, 4)
    assert set(found.values()) == {(4, 4)}


def test_a_float_layer_is_the_float_models_and_listed():
    model = built(
        {'backbone.patch_embed.*': dict(float=True), '*.downsample.*': dict(float=True)}
    )
    assert type(model.patch_embed.projection).__name__ == 'Conv2d'
    assert not isinstance(model.patch_embed.projection, QuantLinear)
    reason = FloatReason.KEPT
    expected = dict.fromkeys(
        ['stages.0.downsample.reduction', 'patch_embed.projection'], reason
    )
    assert model.quantization.skipped == expected
    assert unaccounted(model, model.quantization) == []


@torch.no_grad()
def test_products_of_an_attention_that_stay_float():
    model = built(
        {'stages.0.*.qk': dict(float=True), f'{BLOCK}.attn.w_msa.pv': dict(float=True)}
    )
    attentions = [model.stages[0].blocks[number].attn.w_msa for number in (0, 1)]
    kinds = [
        type(q)
        for a in attentions
        for p in (a.qk, a.pv)
        for q in p.quantizers().values()
    ]
    assert kinds == [
        Float,
        Float,
        AdaLogQuantizer,
        UniformQuantizer,
        Float,
        Float,
        Float,
        Float,
    ]
    names = [
        f'stages.0.blocks.{number}.attn.w_msa.{product}'
        for number, product in ((0, 'qk'), (1, 'qk'), (1, 'pv'))
    ]
    assert model.quantization.skipped == dict.fromkeys(names, FloatReason.KEPT)
    plain = build_in('mmdet', SWIN)
    plain.load_state_dict(model.state_dict(), strict=True)
    model.train(False)
    plain.train(False)
    x = image(50, 70)
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain(x), strict=True))


def test_whole_models_have_layers_outside_of_the_backbone():
    model = built({'decode_head.*': dict(bits=dict(weight=8)), 'decode_head.conv_seg': dict(float=True),
                   'stages.0.*': dict(bits=dict(weight=3))}, whole=True)  # fmt: skip
    ops = operations(model)
    assert (
        type(model.decode_head.conv_seg) is nn.Conv2d
        and 'decode_head.conv_seg' not in ops
    )
    weights = {
        name: op.quantizer('weight').bits
        for name, op in ops.items()
        if 'weight' in op.roles
    }
    for name, bits in weights.items():
        expected = (
            8 if name.startswith('decode_head.') else 3 if 'stages.0.' in name else 4
        )
        assert bits == expected, name
    assert model.quantization.skipped['decode_head.conv_seg'] is FloatReason.KEPT


@pytest.mark.parametrize(
    ('pattern', 'near'),
    [
        ('backbone.patch_embed', 'backbone.patch_embed.projection'),
        ('patch_embed.proj', 'patch_embed.projection'),
        ('stages.0.blocks.1.ffn.layer.1', 'stages.0.blocks.1.ffn.layers.1'),
        (
            'backbone.stages.0.blocks.1.attn.w_msa.kq',
            'backbone.stages.0.blocks.1.attn.w_msa.qk',
        ),
        ('decode_head.*', 'backbone.'),  # not in scope backbone
        ('~~~~', 'backbone.'),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_names_that_are_near(
    pattern, near
):
    with pytest.raises(
        QuantizationError, match='matches no layer or product of SwinTransformer'
    ) as error:
        built({'stages.*': dict(bits=dict(weight=8)), pattern: dict(float=True)})
    assert repr(pattern) in str(error.value) and near in str(error.value)


def test_a_model_of_which_nothing_is_quantized_is_refused():
    with pytest.raises(
        QuantizationError, match='leaves all layers of SwinTransformer float'
    ):
        built({'*': dict(float=True)})


# Which entry wins.


def test_the_last_match_wins_key_by_key():
    recipe = with_layers(
        {
            'stages.*': dict(bits=dict(weight=8, activation=6)),
            '*.ffn.*': dict(
                bits=dict(activation=7), quantizers=dict(post_norm=dict(per_head=False))
            ),
            FC2: dict(bits=dict(weight=3)),
        }
    )
    assert recipe.for_layer(FC2).bits == Bits(3, 7, 7)
    assert recipe.for_layer(f'{BLOCK}.ffn.layers.0.0').bits == Bits(8, 7, 7)
    assert recipe.for_layer(f'{BLOCK}.attn.w_msa.qkv').bits == Bits(8, 6, 6)
    assert recipe.for_layer('decode_head.conv_seg').bits == recipe.bits == Bits(4, 4, 4)


def test_the_order_of_entries_decides():
    entries = [
        ('stages.*', dict(bits=dict(weight=8))),
        (FC2, dict(bits=dict(weight=2))),
    ]
    assert with_layers(dict(entries)).for_layer(FC2).bits.weight == 2
    assert with_layers(dict(reversed(entries))).for_layer(FC2).bits.weight == 8


def test_float_may_be_taken_back():
    recipe = with_layers({'stages.0.*': dict(float=True), '*.ffn.*': dict(float=False)})
    assert recipe.for_layer(f'{BLOCK}.attn.w_msa.qkv') is None
    assert recipe.for_layer(FC2) is not None
    assert (
        with_layers({FC2: dict(bits=dict(weight=8)), '*': dict(float=True)}).for_layer(
            FC2
        )
        is None
    )


def test_bits_of_attention_probabilities_are_those_of_activations_if_not_given():
    recipe = with_layers({'a': dict(bits=dict(activation=8)), 'b': dict(bits=dict(weight=8)), 'c': dict(bits=dict(softmax=8)),
                          'd': dict(bits=dict(activation=6, softmax=3))})  # fmt: skip
    sites = ('weight', 'value', 'post_softmax')
    found = {name: bits_of(recipe.for_layer(name), *sites) for name in 'abcd'}
    assert found == dict(a=(4, 8, 8), b=(8, 4, 4), c=(4, 4, 8), d=(4, 6, 3))


def test_bits_of_a_named_layer_win_over_those_of_its_site():
    recipe = with_layers({'patch_embed.*': dict(bits=dict(activation=6)),
                          'other.*': dict(bits=dict(activation=6), quantizers=dict(image=dict(bits=7)))})  # fmt: skip
    embedding = 'backbone.patch_embed.projection'
    assert (
        bits_of(recipe, 'image') == bits_of(recipe.for_layer('head'), 'image') == (8,)
    )
    assert bits_of(recipe.for_layer(embedding), 'image', 'conv', 'weight') == (6, 6, 4)
    assert bits_of(recipe.for_layer('other.1'), 'image', 'conv') == (7, 6)


def test_options_of_quantizers_are_merged_unless_they_name_another_type():
    recipe = with_layers({'a': dict(quantizers=dict(post_gelu=dict(fixed_q=37.0), weight=dict(per_channel=False))),
                          'b': dict(quantizers=dict(post_gelu=dict(type='UniformQuantizer')))})  # fmt: skip
    merged, other = (recipe.for_layer(name) for name in 'ab')
    assert merged.quantizers['post_gelu'] == {
        **recipe.quantizers['post_gelu'],
        'fixed_q': 37.0,
    }
    assert merged.build_quantizer('weight', -2).axis is None
    assert other.quantizers['post_gelu'] == dict(type='UniformQuantizer')
    linear, plain = (QuantLinear.from_float(nn.Linear(4, 3)) for _ in range(2))
    recipe.equip(linear, {'input': 'post_gelu', 'weight': 'weight'})
    other.equip(plain, {'input': 'post_gelu', 'weight': 'weight'})
    assert isinstance(linear.rescale, GeluShift) and plain.rescale is None
    assert isinstance(plain.input_quantizer, UniformQuantizer)


def test_a_layer_may_be_rescaled_of_its_own():
    layer = with_layers(
        {'a': dict(quantizers=dict(post_attention=dict(rescale='per_channel')))}
    ).for_layer('a')
    op = QuantLinear.from_float(nn.Linear(4, 3))
    layer.equip(op, {'input': 'post_attention', 'weight': 'weight'})
    assert isinstance(op.rescale, Rescale)


# As files have it.


def test_files_that_sort_keys_keep_the_order():
    recipe = with_layers(
        {
            'z.*': dict(bits=dict(weight=8)),
            'a': dict(float=True),
            'm': dict(quantizers=dict(key=dict(bits=8))),
        }
    )
    raw = recipe.to_dict()
    assert raw['layers'] == [dict(pattern='z.*', bits=dict(weight=8)), dict(pattern='a', float=True),
                             dict(pattern='m', quantizers=dict(key=dict(bits=8)))]  # fmt: skip
    assert Recipe.from_dict(json.loads(json.dumps(raw, sort_keys=True))) == recipe
    text = Config(dict(recipe=raw)).pretty_text
    found = Config.fromstring(text, '.py').recipe.to_dict()
    assert (
        Recipe.from_dict(found) == recipe and Recipe.from_dict(found).to_dict() == raw
    )


def test_a_recipe_without_entries_is_written_as_before():
    assert set(load_recipe('adalog_w4a4')) == {'name', 'bits', 'quantizers', 'method'}
    assert (
        with_layers({}).to_dict()
        == with_layers([]).to_dict()
        == load_recipe('adalog_w4a4')
    )


def test_a_recipe_file_may_have_entries(tmp_path):
    path = tmp_path / 'mine.py'
    recipe = load_recipe('adalog_w4a4')
    path.write_text(
        f"recipe = {recipe!r}\nrecipe['layers'] = {{'stages.*': dict(float=True)}}\n"
    )
    assert load_recipe(str(path))['layers'] == [dict(pattern='stages.*', float=True)]


# By option.


def test_options_are_entries_and_the_name_says_so():
    recipe = mixed_recipe(
        load_recipe('adalog_w4a4'),
        ['patch_embed.*'],
        {'stages.0.*': (8, 6), 'stages.1.*': [8, 6, 4]},
    )
    assert recipe == {
        **load_recipe('adalog_w4a4'),
        'name': 'adalog_w4a4_mixed',
        'layers': [
            dict(pattern='stages.0.*', bits=dict(weight=8, activation=6, softmax=6)),
            dict(pattern='stages.1.*', bits=dict(weight=8, activation=6, softmax=4)),
            dict(pattern='patch_embed.*', float=True),
        ],
    }
    more = mixed_recipe(recipe, ['stages.1.*'])
    assert more['name'] == 'adalog_w4a4_mixed'
    assert more['layers'] == [*recipe['layers'], dict(pattern='stages.1.*', float=True)]
    assert mixed_recipe(recipe) == recipe
    assert mixed_recipe(load_recipe('adalog_w4a4')) == load_recipe('adalog_w4a4')


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        (dict(keep_float='patch_embed.*'), 'a list of patterns'),
        (dict(keep_float=[5]), 'a pattern is to be text, not 5'),
        (dict(layer_bits={'a': 8}), "'a'"),
        (dict(layer_bits={'a': (8,)}), "'a'"),
        (dict(layer_bits={'a': (8, 8, 8, 8)}), "'a'"),
        (dict(layer_bits={'a': (8, 16)}), 'bits of activation'),
        (dict(layer_bits={'a': '88'}), 'bits of weight'),
    ],
)
def test_options_that_are_none(options, named):
    with pytest.raises(QuantizationError, match=named):
        mixed_recipe(load_recipe('adalog_w4a4'), **options)


# What is refused at the door.


@pytest.mark.parametrize(
    ('layers', 'named'),
    [
        (5, ['layers', '5']),
        ('stages.*', ['layers', 'stages.*']),
        ([dict(float=True)], ['layers', 'pattern']),
        ([5], ['layers', 'pattern']),
        ({1: dict(float=True)}, ['pattern', '1']),
        ({'': dict(float=True)}, ['pattern', "''"]),
        ({'a\n': dict(float=True)}, ['pattern', 'printable']),
        ({'a' * 201: dict(float=True)}, ['pattern', '200 characters']),
        ({'*' * 9: dict(float=True)}, ['8 stars']),
        ({f'layer{number}': dict(float=True) for number in range(513)}, ['513', '512']),
        ({'a': 8}, ["'a'", 'dict', '8']),
        ({'a': {}}, ["'a'", 'says nothing']),
        ({'a': dict(bit=8)}, ["'a'", 'bit', 'float']),
        ({'a': dict(float=1)}, ["'a'", 'True or False', '1']),
        ({'a': dict(float=None)}, ["'a'", 'True or False', 'None']),
        ({'a': dict(float=True, bits=dict(weight=8))}, ["'a'", 'float=True']),
        ({'a': dict(bits=8)}, ["'a'", 'weight, activation, softmax', '8']),
        ({'a': dict(bits=dict(input=8))}, ["'a'", 'input']),
        *(({'a': dict(bits=dict(weight=number))}, ["'a'", 'bits of weight', repr(number)]) for number in (1, 9, 4.0, True, '4')),
        ({'a': dict(quantizers=[1])}, ["'a'", 'by site']),
        ({'a': dict(quantizers=dict(post_layernorm={}))}, ["'a'", 'post_layernorm', 'post_norm']),
        ({'a': dict(quantizers=dict(query=4))}, ["'a'", 'query', '4']),
        ({'a': dict(quantizers=dict(query=dict(type='Unifrom')))}, ["'a'", 'site query', 'Unifrom', 'UniformQuantizer']),
        ({'a': dict(quantizers=dict(query=dict(bits=16)))}, ["'a'", 'site query', '16']),
        ({'a': dict(quantizers=dict(query=dict(shift=1)))}, ["'a'", 'site query', 'shift']),
        ({'a': dict(quantizers=dict(query=dict(type='DeMaxQuantizer')))}, ["'a'", 'site query', 'post_softmax']),
        ({'a': dict(quantizers=dict(query=dict(rescale='gelu')))}, ["'a'", 'rescale', 'site query']),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_errors_name_the_entry(layers, named):
    with pytest.raises(QuantizationError, match=r'^recipe: layers') as error:
        with_layers(layers)
    for text in named:
        assert text in str(error.value)


def test_an_entry_with_a_rescale_needs_a_method_that_sets_it():
    with pytest.raises(
        QuantizationError, match=r"layers: 'a': method MinMax does not rescale"
    ):
        with_layers(
            {'a': dict(quantizers=dict(post_norm=dict(rescale='per_channel')))},
            'minmax_w4a4',
        )


def test_a_checked_recipe_does_not_hang_on_the_given_entries():
    layers = {'a': dict(bits=dict(weight=8), quantizers=dict(query=dict(bits=8)))}
    recipe = with_layers(layers)
    layers['a']['bits']['weight'] = 2
    layers['a']['quantizers']['query']['bits'] = 2
    recipe.to_dict()['layers'][0]['quantizers']['query']['bits'] = 3
    assert bits_of(recipe.for_layer('a'), 'weight', 'query') == (8, 8)


def test_the_worst_patterns_that_a_file_may_have_take_no_time():
    pattern = '*a' * 8 + 'b' * 184
    layers = {f'{pattern[:-3]}{number:03d}': dict(float=True) for number in range(512)}
    started = time.perf_counter()
    recipe = with_layers(layers)
    for number in range(300):
        assert recipe.for_layer(f'backbone.{"a" * 200}.{number}') is not None
    assert time.perf_counter() - started < 20


def test_names_of_layers_are_those_of_the_report():
    model = built({'stages.1.*': dict(bits=dict(weight=8))})
    assert set(layers_with_products(model)) < set(operations(model))
