"""Recipes: those on disk, and what each error names."""

import copy

import pytest
from torch import nn

from mmptq import QuantizationError
from mmptq.apis import load_recipe, recipe_names
from mmptq.backbones import SITES, Bits, Recipe
from mmptq.backbones.presets import recipe_of
from mmptq.layers import GeluShift, QuantConv2d, QuantLinear, QuantMatMul, Rescale
from mmptq.methods import BRECQ, AdaLog, MinMax, UQViT
from mmptq.quantizers import AdaLogQuantizer, Float, UniformQuantizer

from ..conftest import recipe


def changed(path, value):
    """The recipe adalog_w4a4 with the value at a path of keys replaced, or removed
    where it is None.
    """
    raw = copy.deepcopy(load_recipe('adalog_w4a4'))
    parent = raw
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    if value is None:
        del parent[path[-1]]
    return raw


@pytest.mark.parametrize('name', recipe_names())
@pytest.mark.parametrize(('weight', 'activation'), [(2, 2), (4, 8), (8, 3)])
def test_recipes_on_disk(name, weight, activation):
    method, _, variant = name.partition('_')
    name = f'{method}_w{weight}a{activation}' + (f'_{variant}' if variant else '')
    raw = load_recipe(name)
    loaded = Recipe.from_dict(raw)
    assert isinstance(raw, dict) and loaded.bits == Bits(weight, activation, activation)
    assert loaded.name == name
    assert set(raw['quantizers']) == set(SITES)
    assert loaded.to_dict() == raw and Recipe.from_dict(loaded.to_dict()) == loaded
    for site in SITES:
        expected = 8 if site == 'image' else weight if site == 'weight' else activation
        assert loaded.build_quantizer(site, -2).bits == expected


def test_what_the_recipes_are():
    assert isinstance(recipe('minmax_w4a4').build_method(), MinMax)
    for name, base in (('adalog', None), ('log2', 37), ('logsqrt2', 18.5)):
        loaded = recipe(f'{name}_w4a4')
        assert isinstance(loaded.build_method(), AdaLog)
        gelu, softmax = (
            loaded.build_quantizer(site, None) for site in ('post_gelu', 'post_softmax')
        )
        assert isinstance(gelu, AdaLogQuantizer) and isinstance(
            softmax, AdaLogQuantizer
        )
        assert gelu.fixed_q == softmax.fixed_q == base
        assert (gelu.fixed_scale, softmax.fixed_scale) == (None, 1)
        assert isinstance(loaded.build_quantizer('post_norm', None), UniformQuantizer)
        rescales = {
            site: options['rescale']
            for site, options in loaded.quantizers.items()
            if 'rescale' in options
        }
        assert rescales == {'post_norm': 'per_channel', 'post_gelu': 'gelu'}
    method = recipe('adalog_w4a4').build_method()
    assert (
        method.steps,
        method.width,
        method.candidates,
        method.rounds,
        method.propagate_error,
    ) == (
        6,
        16,
        128,
        3,
        False,
    )  # the paper's


def test_variants_of_adalog_differ_in_the_method_only():
    plain = load_recipe('adalog_w4a4')
    for name in recipe_names():
        if name.startswith('adalog_'):
            variant = load_recipe(f'adalog_w4a4_{name.removeprefix("adalog_")}')
            assert {**variant, 'name': 0, 'method': 0} == {
                **plain,
                'name': 0,
                'method': 0,
            } and variant['method'] != plain['method']
    fast, full = (
        recipe(name).build_method() for name in ('adalog_w4a4_fast', 'adalog_w4a4')
    )
    assert (
        fast.steps * fast.candidates * fast.rounds
        < 0.3 * full.steps * full.candidates * full.rounds
    )


@pytest.mark.parametrize(
    'name',
    [
        'adalog_w4a4_slow',
        'adalog_w4a4fast',
        'adalog_w4_fast',
        'minmax_w4a4_fast',
        'adalog_w4a4_w4a4',
        '_w4a4',
    ],
)
def test_unknown_names_are_refused_with_a_list_of_the_known(name):
    with pytest.raises(
        QuantizationError, match=f'unknown recipe {name!r}.*adalog_fast, .*minmax'
    ):
        load_recipe(name)


@pytest.mark.parametrize('softmax', [2, 8])
def test_softmax_bits_of_a_recipe_by_method(softmax):
    loaded = Recipe.from_dict(recipe_of('adalog_fast', 3, 4, softmax))
    assert (
        loaded.bits == Bits(3, 4, softmax)
        and loaded.name == f'adalog_w3a4s{softmax}_fast'
    )
    with pytest.raises(QuantizationError, match='9 bits for softmax'):
        recipe_of('adalog', 4, 4, 9)


def test_softmax_bits_of_their_own():
    loaded = Recipe.from_dict(
        changed(('bits',), dict(weight=4, activation=6, softmax=8))
    )
    assert [
        loaded.build_quantizer(site, None).bits
        for site in ('weight', 'value', 'post_softmax')
    ] == [4, 6, 8]


def test_granularity():
    loaded = recipe()
    linear, conv, product = QuantLinear(4, 3), QuantConv2d(4, 3, 1), QuantMatMul()
    loaded.equip(linear, {'input': 'post_norm', 'weight': 'weight'})
    loaded.equip(conv, {'input': 'image', 'weight': 'weight'})
    loaded.equip(product, {'left': 'query', 'right': 'key'})
    axes = {
        role: quantizer.axis
        for op in (linear, conv, product)
        for role, quantizer in op.quantizers().items()
        if role != 'weight'
    }
    assert axes == {'input': None, 'left': -3, 'right': -3}
    assert (linear.weight_quantizer.axis, conv.weight_quantizer.axis) == (-2, -4)
    assert conv.input_quantizer.bits == 8 and conv.sites == {
        'input': 'image',
        'weight': 'weight',
    }
    assert isinstance(linear, nn.Linear)


@pytest.mark.parametrize('name', ['adalog_w4a4', 'minmax_w4a4'])
def test_rescales_are_children_of_the_linear_layers_of_their_sites(name):
    loaded = recipe(name)
    expected = (
        {'post_norm': Rescale, 'post_gelu': GeluShift} if name == 'adalog_w4a4' else {}
    )
    for site in ('post_norm', 'post_gelu', 'post_attention', 'linear'):
        op = QuantLinear.from_float(nn.Linear(4, 3))
        loaded.equip(op, {'input': site, 'weight': 'weight'})
        assert type(op.rescale) is expected.get(site, type(None)) and set(
            op.state_dict()
        ) == {'weight', 'bias'}


def test_any_site_of_a_linear_layer_may_be_rescaled():
    for site in ('post_norm', 'post_attention', 'post_gelu', 'linear'):
        loaded = Recipe.from_dict(
            changed(
                ('quantizers', site),
                dict(type='UniformQuantizer', rescale='per_channel'),
            )
        )
        op = QuantLinear.from_float(nn.Linear(4, 3))
        loaded.equip(op, {'input': site, 'weight': 'weight'})
        assert (
            isinstance(op.rescale, Rescale)
            and loaded.to_dict()['quantizers'][site]['rescale'] == 'per_channel'
        )


def test_a_site_that_is_not_quantized():
    loaded = recipe(image=dict(type='Float'))
    conv = QuantConv2d.from_float(nn.Conv2d(4, 3, 1))
    loaded.equip(conv, {'input': 'image', 'weight': 'weight'})
    assert (
        isinstance(conv.input_quantizer, Float)
        and conv.input_quantizer.bits == 32
        and conv.weight_quantizer.bits == 4
    )


@pytest.mark.parametrize(
    ('path', 'value', 'named'),
    [
        (('surplus',), 1, ['surplus', 'unknown']),
        (('bits',), None, ['bits', 'missing']),
        (('quantizers',), None, ['quantizers', 'missing']),
        (('method',), None, ['method', 'missing']),
        (
            ('quantizers', 'post_layernorm'),
            dict(type='UniformQuantizer'),
            ['post_layernorm', 'post_norm'],
        ),
        (('quantizers', 'post_gelu'), None, ["missing: ['post_gelu']"]),
        (('bits', 'weight'), None, ['bits', 'activation']),
        (('bits', 'gelu'), 4, ['gelu']),
        (('bits', 'weight'), 1, ['site weight', 'from 2 to 8, not 1']),
        (('bits', 'weight'), 9, ['site weight', 'from 2 to 8, not 9']),
        (('bits', 'activation'), 9, ['not 9']),
        (('bits', 'softmax'), 1, ['site post_softmax', 'not 1']),
        (('bits', 'weight'), 4.0, ['site weight', 'not 4.0']),
        (('bits', 'weight'), True, ['site weight', 'not True']),
        (('quantizers', 'image', 'bits'), 16, ['site image', 'not 16']),
        (
            ('quantizers', 'query', 'type'),
            'Unifrom',
            ['site query', "'Unifrom'", 'UniformQuantizer', 'AdaLogQuantizer'],
        ),
        (
            ('quantizers', 'query', 'type'),
            'mmdet.Unknown',
            ['site query', "'mmdet.Unknown'"],
        ),
        (('quantizers', 'query', 'type'), None, ['site query', 'unknown type None']),
        (('quantizers', 'query', 'shiftt'), 0.1, ['site query', 'shiftt']),
        (
            ('quantizers', 'post_softmax', 'per_head'),
            True,
            ['site post_softmax', 'axis'],
        ),
        *(
            (
                ('quantizers', site, 'axis'),
                axis,
                [f'site {site}', 'axis', 'per_channel'],
            )
            for site, axis in (('weight', -1), ('query', -3), ('post_norm', 0))
        ),
        *(
            (
                ('quantizers', site, option),
                value,
                [f'site {site}', option, 'True or False', repr(value)],
            )
            for site, option in (
                ('weight', 'per_channel'),
                ('query', 'per_head'),
                ('post_norm', 'per_head'),
            )
            for value in (1, 0, 'yes', [True])
        ),
        (
            ('quantizers', 'image', 'rescale'),
            'per_channel',
            ['rescale', 'site image', 'post_norm'],
        ),
        *(
            (
                ('quantizers', site, 'rescale'),
                'gelu',
                ["rescale='gelu'", 'for post_gelu', f'site {site}'],
            )
            for site in ('post_norm', 'post_attention', 'linear', 'query')
        ),
        *(
            (
                ('quantizers', site),
                dict(type=kind, rescale='per_channel'),
                [f'site {site}', kind, "rescale='per_channel'"],
            )
            for site in ('post_norm', 'post_gelu')
            for kind in ('AdaLogQuantizer', 'DeMaxQuantizer', 'Float')
        ),
        *(
            (
                ('quantizers', site),
                dict(type='AdaLogQuantizer'),
                [f'site {site}', 'AdaLogQuantizer', 'hardly ever negative'],
            )
            for site in SITES
            if site not in ('post_softmax', 'post_gelu')
        ),
        *(
            (
                ('quantizers', site),
                dict(type='DeMaxQuantizer'),
                [f'site {site}', 'DeMaxQuantizer', 'post_softmax'],
            )
            for site in SITES
            if site != 'post_softmax'
        ),
        (
            ('quantizers', 'post_gelu'),
            dict(type='DeMaxQuantizer', rescale='gelu'),
            ['site post_gelu', 'DeMaxQuantizer', 'post_softmax'],
        ),
        (
            ('quantizers', 'post_softmax', 'fixed_scale'),
            -1.0,
            ['site post_softmax', 'fixed_scale', '-1.0'],
        ),
        (
            ('quantizers', 'post_gelu', 'fixed_q'),
            '37',
            ['site post_gelu', 'fixed_q', "'37'"],
        ),
        (('quantizers', 'weight', 'rescale'), 'gelu', ['rescale', 'site weight']),
        (('quantizers', 'query', 'rescale'), 'per_channel', ['rescale', 'site query']),
        (
            ('quantizers', 'post_norm', 'rescale'),
            'per_tensor',
            ['rescale', "'per_tensor'", 'per_channel, gelu', 'site post_norm'],
        ),
        (
            ('quantizers', 'post_norm', 'rescale'),
            True,
            ['rescale', 'True', 'site post_norm'],
        ),
        (
            ('quantizers', 'post_norm', 'rescale'),
            ['gelu'],
            ['rescale', "['gelu']", 'site post_norm'],
        ),
        (('method',), dict(type='MinMax'), ['MinMax', 'rescale']),
        (('method', 'type'), 'AdaRound', ['method', "'AdaRound'", 'AdaLog', 'MinMax']),
        (('method', 'type'), None, ['method', 'unknown type None']),
        (('method', 'iterations'), 10, ['method', 'iterations']),
    ],
    ids=str,
)
def test_errors_name_the_thing(path, value, named):
    with pytest.raises(QuantizationError) as error:
        Recipe.from_dict(changed(path, value))
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize(
    'name', ['a/b', '../up', 'a\\b', 'a\0b', 'a b', 'a\n', '', 'ä', 'a:b', '$HOME']
)
def test_names_that_are_no_part_of_a_folder_are_refused(name):
    with pytest.raises(QuantizationError) as error:
        Recipe.from_dict(changed(('name',), name))
    assert 'recipe: name' in str(error.value) and repr(name) in str(error.value)


def test_names_of_folders():
    assert (
        Recipe.from_dict(changed(('name',), 'My_recipe-4.5+x')).name
        == 'My_recipe-4.5+x'
    )
    assert Recipe.from_dict(changed(('name',), None)).name == 'unnamed'


@pytest.mark.parametrize(
    ('site', 'options'),
    [
        ('post_gelu', dict(type='AdaLogQuantizer', rescale='gelu')),
        ('post_gelu', dict(type='UniformQuantizer', rescale='gelu')),
        ('post_softmax', dict(type='AdaLogQuantizer')),
        ('post_softmax', dict(type='DeMaxQuantizer')),
        ('post_softmax', dict(type='UniformQuantizer', per_head=True)),
        ('weight', dict(type='UniformQuantizer', per_channel=False)),
        ('post_norm', dict(type='Float')),
    ],
    ids=str,
)
def test_quantizers_that_fit_their_site(site, options):
    assert (
        type(
            Recipe.from_dict(changed(('quantizers', site), options)).build_quantizer(
                site, -2
            )
        ).__name__
        == options['type']
    )


@pytest.mark.parametrize(
    ('path', 'value', 'named'),
    [
        (('bits',), 4, 'bits'),
        (('quantizers', 'query'), 'UniformQuantizer', 'query'),
        (('method',), 'AdaLog', 'method'),
    ],
    ids=str,
)
def test_things_that_are_no_dict_are_refused(path, value, named):
    with pytest.raises(QuantizationError, match=named):
        Recipe.from_dict(changed(path, value))


@pytest.mark.parametrize(
    ('site', 'option'),
    [
        ('post_norm', 'per_channel'),
        ('post_gelu', 'per_channel'),
        ('post_norm', 'per_head'),
        ('weight', 'per_head'),
        ('query', 'per_channel'),
    ],
)
def test_granularity_that_a_site_does_not_have_is_refused(site, option):
    with pytest.raises(QuantizationError, match=site):
        Recipe.from_dict(
            changed(('quantizers', site), {'type': 'UniformQuantizer', option: True})
        )


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('steps', 0),
        ('width', 0),
        ('candidates', 0),
        ('rank', 0),
        ('rounds', 0),
        ('rows', 0),
        ('rows', -5),
        ('screen', 0),
        ('screen', 1.5),
        ('rows', '64'),
        ('steps', True),
        ('all_tokens', 'no'),
        ('propagate_error', 0),
    ],
)
def test_searches_of_nothing_are_refused(option, value):
    with pytest.raises(QuantizationError, match=option):
        Recipe.from_dict(changed(('method', option), value))


def test_a_checked_recipe_does_not_hang_on_the_given_dict():
    raw = load_recipe('adalog_w4a4')
    loaded = Recipe.from_dict(raw)
    raw['quantizers']['query']['type'] = 'Nothing'
    raw['method']['type'] = 'Nothing'
    assert isinstance(
        loaded.build_quantizer('query', None), UniformQuantizer
    ) and isinstance(loaded.build_method(), AdaLog)


# Stages.


def staged(*stages, **keys):
    """The recipe adalog_w4a4 with stages for its method."""
    return {
        **{
            key: value
            for key, value in load_recipe('adalog_w4a4').items()
            if key != 'method'
        },
        'stages': list(stages),
        **keys,
    }


def with_method(**method):
    return {**load_recipe('adalog_w4a4'), 'method': method}


@pytest.mark.parametrize(
    ('stages', 'method'),
    [
        (staged(dict(type='AdaLog', rows=64)), with_method(type='AdaLog', rows=64)),
        (
            staged(dict(type='AdaLog'), propagate_error=True),
            with_method(type='AdaLog', propagate_error=True),
        ),
        (
            staged(dict(type='AdaLog', rows=64), dict(type='BRECQ', batch=3)),
            with_method(type='AdaLogBRECQ', rows=64, batch=3),
        ),
        (
            with_method(type='AdaLog') | dict(propagate_error=True),
            with_method(type='AdaLog', propagate_error=True),
        ),
    ],
)
def test_a_method_is_short_for_stages(stages, method):
    loaded, short = Recipe.from_dict(stages), Recipe.from_dict(method)
    assert (
        loaded == short
        and loaded.to_dict() == short.to_dict()
        and loaded.method_name == method['method']['type']
    )


def test_stages_without_a_short_name():
    raw = staged(dict(type='UQViT'), dict(type='BRECQ', batch=3), propagate_error=False)
    loaded = Recipe.from_dict(raw)
    first, second = loaded.build_method()
    assert (
        isinstance(first, UQViT)
        and second == BRECQ(batch=3)
        and loaded.propagate_error is False
    )
    assert (
        loaded.method_name == 'UQViT+BRECQ'
        and loaded.to_dict() == raw
        and Recipe.from_dict(loaded.to_dict()) == loaded
    )
    assert Recipe.from_dict(staged(*raw['stages'])).propagate_error is None


@pytest.mark.parametrize(
    ('raw', 'words'),
    [
        (staged(), ['stages', 'list']),
        (staged('AdaLog'), ['stage 1', 'dict']),
        (staged({1: 2}), ['stage 1', 'dict']),
        (
            staged(dict(type='AdaLog')) | dict(method=dict(type='AdaLog')),
            ['method', 'stages', 'one of the two'],
        ),
        (staged(dict(type='BRECQ')), ['BRECQ', 'before it']),
        (staged(dict(type='BRECQ'), dict(type='AdaLog')), ['BRECQ', 'before it']),
        (
            staged(dict(type='UQViT'), dict(type='os.system')),
            ['stage 2', "unknown type 'os.system'"],
        ),
        (staged(dict(type='UQViT'), dict(type='BRECQ', batch=0)), ['stage 2', 'batch']),
        (
            staged(dict(type='UQViT', propagate_error=True), dict(type='BRECQ')),
            ['propagate_error', 'stage 1'],
        ),
        (
            staged(dict(type='AdaLog'), propagate_error='yes'),
            ['propagate_error', "'yes'"],
        ),
        (
            staged(dict(type='AdaLog', batch=3), dict(type='BRECQ')),
            ['stage 1', 'batch'],
        ),
    ],
)
def test_stages_that_make_no_sense_are_refused(raw, words):
    with pytest.raises(QuantizationError) as error:
        Recipe.from_dict(raw)
    assert all(word in str(error.value) for word in words)
