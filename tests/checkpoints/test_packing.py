"""Bits by hand and in round trips; the state of real backbones, packed and back, bit
for bit.
"""

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmptq import QuantizationError
from mmptq.apis import load_recipe
from mmptq.backbones import find_spec
from mmptq.calibration import Call, calibrate
from mmptq.checkpoints.packing import pack_codes, pack_state, unpack_codes, unpack_state
from mmptq.layers import GeluShift, QuantOp, Rescale
from mmptq.methods import MinMax
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer, calibrated_parts

from ..conftest import (
    SWIN,
    VIT,
    adalog_tables,
    build_in,
    equip,
    fast,
    image,
    mixed,
    quantizable,
    randomized,
    rescaled,
)

SWIN_T = dict(
    type='SwinTransformer',
    embed_dims=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    window_size=7,
)


@pytest.mark.parametrize(
    'bits, codes, stream',
    [
        (3, [5, 1, 7], [0b11_001_101, 0b1]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (2, [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        (6, [63, 0, 33, 1], [0b00_111111, 0b0001_0000, 0b000001_10]),
        (8, [0, 255, 128, 1, 2, 3, 4, 250, 251], [0, 255, 128, 1, 2, 3, 4, 250, 251]),
        (5, [], []),
    ],
)
def test_bytes_by_hand(bits, codes, stream):
    packed = pack_codes(torch.tensor(codes, dtype=torch.int16), bits)
    assert packed.dtype == torch.uint8 and packed.tolist() == stream
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


@given(bits=st.integers(2, 8), data=st.data())
def test_any_codes_come_back_and_are_the_digits_of_one_number(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack_codes(torch.tensor(codes, dtype=torch.int16), bits)
    assert packed.numel() == (len(codes) * bits + 7) // 8
    assert int.from_bytes(bytes(packed.tolist()), 'little') == sum(
        code << bits * place for place, code in enumerate(codes)
    )
    back = unpack_codes(packed, bits, len(codes))
    assert back.dtype == torch.int16 and back.tolist() == codes


def calibrated(scope, cfg, raw):
    """A small real backbone, calibrated, all its parameters random."""
    torch.manual_seed(0)
    backbone = randomized(
        build_in(scope, dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=raw))
    )
    calls = [Call((image(45, 57, seed=1),)), Call((image(32, 70, seed=2),))]
    calibrate(
        backbone,
        find_spec(backbone).block_names(backbone),
        calls,
        backbone.quantization.recipe.build_method(),
    )
    return backbone


def quick(name):
    """A recipe, AdaLog's with a search that takes no time."""
    raw = fast(name) if name.startswith('adalog') else load_recipe(name)
    if name.endswith('brecq'):
        raw['method'].update(iterations=2, batch=1)
    return raw


def repacked(backbone):
    """Its state, packed and back, as another process gets it."""
    tensors, layout = pack_state(backbone)
    return unpack_state(
        safetensors.torch.load(safetensors.torch.save(tensors)), **layout
    )


@pytest.mark.parametrize(
    'scope, cfg', [('mmdet', SWIN), ('mmseg', VIT)], ids=['swin', 'vit']
)
@pytest.mark.parametrize(
    'name',
    [
        'minmax_w4a4',
        'minmax_w3a3_tensor',
        'minmax_w8a8',
        'adalog_w4a4',
        'adalog_w3a3',
        'adalog_w6a6',
        'adalog_w8a8',
        'adalog_w4a4_brecq',
        'uqvit_w4a4',
        'uqvit_w3a3',
        'repqvit_w4a4',
    ],
)
@torch.no_grad()
def test_a_model_with_packed_weights_has_the_same_outputs_to_the_last_bit(
    scope, cfg, name
):
    backbone = calibrated(scope, cfg, quick(name))
    inputs = [image(45, 57, seed=5), image(64, 40, seed=6, batch=2)]
    expected = [backbone(x) for x in inputs]
    other = quantizable(scope, cfg, name)
    for parameter in other.parameters():
        parameter.fill_(torch.nan)
    other.load_state_dict(repacked(backbone))
    for x, outputs in zip(inputs, expected, strict=True):
        assert all(
            torch.equal(a, b) and bool(a.isfinite().all())
            for a, b in zip(outputs, other(x), strict=True)
        )
    parts = calibrated_parts(other)
    for key, part in calibrated_parts(backbone).items():
        assert all(
            torch.equal(value, parts[key].params[each])
            and value.dtype == parts[key].params[each].dtype
            for each, value in part.params.items()
        )
    twice = repacked(other)
    assert all(
        torch.equal(value, twice[key]) for key, value in other.state_dict().items()
    )


@pytest.mark.parametrize(
    'scope, cfg', [('mmdet', SWIN), ('mmseg', VIT)], ids=['swin', 'vit']
)
@pytest.mark.parametrize('name', ['minmax_w4a4', 'adalog_w4a4'])
@torch.no_grad()
def test_weights_of_different_bits_in_one_model(scope, cfg, name):
    recipe = mixed(quick(name))
    backbone = calibrated(scope, cfg, recipe)
    _, layout = pack_state(backbone)
    bits = {
        key.removesuffix('.weight'): weight['bits']
        for key, weight in layout['weights'].items()
    }
    assert set(bits.values()) == {4, 8} and 'patch_embed.projection' not in bits
    assert all(
        number == (8 if '.0.' in key and not key.endswith('ffn.layers.0.0') else 4)
        for key, number in bits.items()
        if key.startswith(('stages.1', 'layers'))
    )
    other = randomized(
        build_in(scope, dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=recipe))
    )
    other.load_state_dict(repacked(backbone))
    x = image(45, 57, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), other(x), strict=True))


def linear(cls=None, bits=3, bias=True):
    """A calibrated quantized layer, 6 to 5, in a module as its child ``fc``, and an
    input.
    """
    torch.manual_seed(0)
    op, x = rescaled(torch.nn.Linear(6, 5, bias), cls), torch.randn(7, 6)
    equip(op, input=UniformQuantizer(4), weight=UniformQuantizer(bits, axis=-2))
    read, weight = (operand.detach() for operand in op.operands(x))
    op.quantizer('input').set(
        **op.quantizer('input').range_params(read.min(), read.max())
    )
    op.quantizer('weight').set(
        **op.quantizer('weight').range_params(
            weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        )
    )
    return torch.nn.ModuleDict({'fc': op}), x


@pytest.mark.parametrize('cls', [None, Rescale, GeluShift])
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_the_layer_as_a_stranger_computes_it_from_the_file(cls, bias):
    model, x = linear(cls, bias=bias)
    tensors, layout = pack_state(model)
    assert layout == dict(weights={'fc.weight': dict(bits=3, shape=[5, 6])}, adalog=[])
    of = {key.removeprefix('fc.'): value.double() for key, value in tensors.items()}
    stream = int.from_bytes(bytes(tensors['fc.weight'].tolist()), 'little')
    codes = torch.tensor([stream >> 3 * place & 7 for place in range(30)]).view(5, 6)
    weight = of['weight_quantizer.scale'] * (codes - of['weight_quantizer.zero_point'])
    read, added = x.double(), of.get('bias', torch.zeros(5))
    if cls is Rescale:
        read, added = (
            read / of['rescale.scale'] - of['rescale.shift'],
            added + of['rescale.gain'],
        )
    elif cls is GeluShift:
        read, added = (
            read + of['rescale.shift'],
            added - of['rescale.shift'] * weight.sum(1),
        )
    step, zero = of['input_quantizer.scale'], of['input_quantizer.zero_point']
    expected = (
        step * ((read / step).round() + zero).clamp(0, 15).sub(zero) @ weight.T + added
    )
    torch.testing.assert_close(model['fc'](x).double(), expected, rtol=1e-5, atol=1e-5)


def test_adalogs_tables_are_those_of_integer_inference():
    for bits, q in ((3, 37), (4, 18.5), (8, 121)):
        quantizer = AdaLogQuantizer(bits)
        op = equip(
            rescaled(torch.nn.Linear(2, 2)), input=quantizer, weight=UniformQuantizer(4)
        )
        quantizer.set(scale=torch.tensor(0.5), q=torch.tensor(float(q)))
        op.quantizer('weight').set(
            scale=torch.tensor(0.1), zero_point=torch.tensor(7, dtype=torch.int32)
        )
        tensors, layout = pack_state(torch.nn.ModuleDict({'fc': op}))
        shifts, mantissas, _ = adalog_tables(bits, q)
        assert layout['adalog'] == ['fc.input_quantizer']
        assert (
            tensors['fc.input_quantizer.shift'].tolist() == shifts
            and tensors['fc.input_quantizer.mantissa'].tolist() == mantissas
        )
        assert {'fc.input_quantizer.shift', 'fc.input_quantizer.mantissa'}.isdisjoint(
            unpack_state(tensors, **layout)
        )
        tensors['fc.input_quantizer.mantissa'][1] += 1
        with pytest.raises(QuantizationError, match=r'fc\.input_quantizer\.mantissa'):
            unpack_state(tensors, **layout)


@given(st.floats(-25, 25), st.integers(2, 8), st.integers(0, 255), st.floats(-4, 4))
@torch.no_grad()
def test_any_usual_scale_leads_back_to_the_same_codes(
    exponent, bits, zero_point, stretch
):
    model, _ = linear(Rescale, bits)
    op, quantizer = model['fc'], model['fc'].quantizer('weight')
    op.rescale.set(
        scale=torch.linspace(-stretch, stretch, 6).exp(), shift=torch.ones(6)
    )
    zero_points = torch.full((5, 1), zero_point % 2**bits, dtype=torch.int32)
    quantizer.set(scale=torch.full((5, 1), 10.0**exponent), zero_point=zero_points)
    op.weight.mul_(10.0**exponent * 2**bits)
    expected = quantizer(op.rescale.weight(op.weight))
    weight = repacked(model)['fc.weight']
    assert torch.equal(quantizer(op.rescale.weight(weight)), expected)


def test_scales_at_the_end_of_float32_are_refused_by_name():
    model, _ = linear()
    quantizer = model['fc'].quantizer('weight')
    quantizer.set(
        scale=torch.full((5, 1), 1.0),
        zero_point=torch.full((5, 1), 3, dtype=torch.int32),
    )
    quantizer.scale.fill_(1e-42)  # set would refuse it
    model['fc'].weight.data[0, 0] = 0  # 0 / s is NaN
    with pytest.raises(QuantizationError, match='weight of fc cannot be packed'):
        pack_state(model)


def test_a_subclass_of_a_quantizer_is_packed_as_its_base():
    """Weights and tables are found along the classes that a user's quantizer inherits
    from.
    """
    expected, (model, _) = linear(), linear()
    quantizer = model['fc'].quantizer('weight')
    quantizer.__class__ = type('OwnUniform', (UniformQuantizer,), {})
    for found, wanted in zip(pack_state(model), pack_state(expected[0]), strict=True):
        assert found.keys() == wanted.keys()
    assert torch.equal(
        pack_state(model)[0]['fc.weight'], pack_state(expected[0])[0]['fc.weight']
    )


def test_quantized_weights_must_be_uniform_and_float_ones_stay():
    model, _ = linear()
    model['fc'].weight_quantizer = AdaLogQuantizer(4)
    model['fc'].weight_quantizer.set(scale=torch.tensor(1.0), q=torch.tensor(37.0))
    with pytest.raises(
        QuantizationError, match=r'weight of fc cannot be packed.*AdaLogQuantizer'
    ):
        pack_state(model)
    float_weight = load_recipe('minmax_w4a4')
    float_weight['quantizers']['weight'] = dict(type='Float')
    backbone = calibrated('mmseg', VIT, float_weight)
    tensors, layout = pack_state(backbone)
    assert layout['weights'] == {} and all(
        torch.equal(tensors[key], value) for key, value in backbone.state_dict().items()
    )


def test_recalibration_and_another_checkpoint_forget_the_gain_of_a_packed_model():
    model, _ = linear(Rescale)
    op, before = (
        model['fc'],
        {key: value.clone() for key, value in model.state_dict().items()},
    )
    model.load_state_dict(repacked(model))
    assert op.rescale.gain is not None
    model.load_state_dict(before)
    assert op.rescale.gain is None
    op.rescale.gain = torch.ones(5)
    op.rescale.set(**op.rescale.params)
    assert op.rescale.gain is None


def test_a_layer_of_two_names_is_packed_under_both():
    model, x = linear(Rescale)
    shared = torch.nn.ModuleDict({'a': model['fc'], 'b': model['fc']})
    tensors, layout = pack_state(shared)
    assert set(layout['weights']) == {'a.weight', 'b.weight'} and torch.equal(
        tensors['a.weight'], tensors['b.weight']
    )
    expected = shared['b'](x)
    shared.load_state_dict(unpack_state(tensors, **layout))
    assert torch.equal(shared['b'](x), expected)


@pytest.mark.parametrize(
    'change, named',
    [
        (lambda t: t.pop('fc.weight'), r'fc\.weight is missing'),
        (
            lambda t: t.update({'fc.weight': t['fc.weight'][:-1]}),
            r'fc\.weight is to hold 30 codes of 3 bits in 12 bytes',
        ),
        (
            lambda t: t.update({'fc.weight': t['fc.weight'].int()}),
            r'fc\.weight is to hold',
        ),
        (
            lambda t: t.pop('fc.weight_quantizer.scale'),
            r'weight_quantizer\.scale is missing',
        ),
        (
            lambda t: t.update({'fc.weight_quantizer.scale': torch.ones(4, 1)}),
            r'weight_quantizer\.scale has the shape \(4, 1\), not \(5, 1\)',
        ),
        (
            lambda t: t.update(
                {'fc.weight_quantizer.zero_point': torch.ones(5, 6, dtype=torch.int32)}
            ),
            r'weight_quantizer\.zero_point',
        ),
        (
            lambda t: t.update({'fc.weight_quantizer.zero_point': torch.ones(5, 1)}),
            r'weight_quantizer\.zero_point',
        ),
        (
            lambda t: t['fc.weight_quantizer.scale'].fill_(torch.nan),
            r'weight_quantizer\.scale is not finite',
        ),
        (lambda t: t.pop('fc.rescale.gain'), r'rescale\.gain is missing'),
        (lambda t: t.update({'fc.rescale.gain': torch.ones(1)}), r'rescale\.gain'),
        (lambda t: t.update({'fc.rescale.scale': torch.ones(1)}), r'rescale\.scale'),
        (lambda t: t.pop('fc.rescale.shift'), r'rescale\.shift is missing'),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, named):
    tensors, layout = pack_state(linear(Rescale)[0])
    change(tensors)
    with pytest.raises(QuantizationError, match=named):
        unpack_state(tensors, **layout)


@pytest.mark.parametrize('name', ['adalog_w4a4', 'uqvit_w4a4'])
def test_swin_t_takes_at_most_0_14_of_its_float_file(name):
    backbone = quantizable('mmdet', SWIN_T, name)
    size = len(
        safetensors.torch.save(
            {key: value.clone() for key, value in backbone.state_dict().items()}
        )
    )
    calibrate(
        backbone,
        find_spec(backbone).block_names(backbone),
        [Call((image(32, 32),))],
        MinMax(),
    )
    for part in (
        backbone.modules()
    ):  # MinMax leaves these; their values do not matter for the size
        if isinstance(part, QuantOp) and isinstance(
            getattr(part, 'rescale', None), Rescale
        ):
            part.rescale.set(
                scale=torch.ones(part.in_features), shift=torch.zeros(part.in_features)
            )
        elif isinstance(part, GeluShift):
            part.set(shift=torch.tensor(0.17))
    tensors, layout = pack_state(backbone)
    assert len(layout['weights']) == 1 + 12 * 4 + 3
    assert all(part.params is not None for part in calibrated_parts(backbone).values())
    assert len(safetensors.torch.save(tensors)) / size < 0.138
