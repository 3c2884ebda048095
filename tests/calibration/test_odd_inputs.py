"""Inputs at the edge: whatever finite tensors come, parameters are finite; what is not
finite names its layer.
"""

import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.backbones import find_spec
from mmptq.calibration import Block, Call, calibrate, operations
from mmptq.checkpoints.reading import is_calibrated
from mmptq.layers import GeluShift, QuantConv2d, QuantLinear, QuantMatMul, Rescale
from mmptq.methods import AdaLog, MinMax
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer

from ..conftest import FAST, SWIN, VIT, equip, image, outputs_of, quantizable, rescaled


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# One operation of each kind.


def linear(rescale=None, **options):
    op = rescaled(nn.Linear(6, 5))
    op.rescale = rescale and rescale()
    inputs = AdaLogQuantizer(4) if rescale is GeluShift else UniformQuantizer(4)
    return equip(
        op, **{'input': inputs, 'weight': UniformQuantizer(4, axis=-2), **options}
    )


def heads():
    return UniformQuantizer(4, axis=-3)


OPS = {
    'linear': lambda: linear(),
    'linear, one range for the weight': lambda: linear(weight=UniformQuantizer(4)),
    'post-norm': lambda: linear(Rescale),
    'post-GELU': lambda: linear(GeluShift),
    'patch embedding': lambda: equip(
        QuantConv2d.from_float(nn.Conv2d(3, 5, 2, 2)),
        input=UniformQuantizer(8),
        weight=UniformQuantizer(4, axis=-4),
    ),
    'convolution': lambda: equip(
        QuantConv2d.from_float(nn.Conv2d(4, 6, 3, padding=1, groups=2)),
        weight=UniformQuantizer(4, axis=-4),
    ),
    'queries and keys': lambda: equip(QuantMatMul(), left=heads(), right=heads()),
    'probabilities and values': lambda: equip(
        QuantMatMul(), left=AdaLogQuantizer(4, fixed_scale=1.0), right=heads()
    ),
}
SHAPES = {
    'linear': [((30, 6),), ((2, 7, 6),)],
    'patch embedding': [((1, 3, 8, 10),), ((1, 3, 6, 4),)],
    'convolution': [((1, 4, 8, 10),), ((1, 4, 6, 4),)],
    'queries and keys': [((3, 2, 9, 4), (3, 2, 4, 9)), ((5, 2, 4, 4), (5, 2, 4, 4))],
    'probabilities and values': [
        ((3, 2, 9, 9), (3, 2, 9, 4)),
        ((5, 2, 4, 4), (5, 2, 4, 4)),
    ],
}


def zero_channels(x):
    x = x.clone()
    x[..., ::2] = 0
    return x


VALUES = {
    'zero': torch.zeros_like,
    'constant': lambda x: torch.full_like(x, 0.3),
    'a constant whose mean is rounded': lambda x: torch.full_like(
        x, 0.7880101799964905
    ),
    'a negative constant': lambda x: torch.full_like(x, -2.0),
    'negative': lambda x: -x.abs() - 0.1,
    'barely negative': lambda x: -0.17 * torch.sigmoid(x),
    'positive': lambda x: x.abs() + 3,
    'zero channels': zero_channels,
    'one outlier': lambda x: torch.where(x == x.max(), 1e4, 1e-3 * x),
    'tiny': lambda x: 1e-30 * x,
    'denormal': lambda x: 1e-42 * x,
    'large': lambda x: 1e8 * x,
    'one value that is not zero': lambda x: torch.where(x == x.max(), x, 0),
    'binary': lambda x: (x > 0).to(x.dtype),
}


def inputs_of(kind, values):
    """Two calls of different shapes."""
    shapes = SHAPES.get(kind) or SHAPES['linear']
    calls = []
    for number, call in enumerate(shapes):
        tensors = [
            random(*shape, seed=10 * number + index) for index, shape in enumerate(call)
        ]
        if kind == 'probabilities and values':
            calls.append(Call((tensors[0].softmax(-1), VALUES[values](tensors[1]))))
        else:
            calls.append(Call(tuple(VALUES[values](x) for x in tensors)))
    return calls


@torch.no_grad()
def is_usable(op, calls, outputs):
    """Calibrated, finite, and nearer to the float output than nothing is."""
    assert all(quantizer.params is not None for quantizer in op.quantizers().values())
    for name, value in op.state_dict().items():
        assert torch.isfinite(value).all(), name
    power = error = 0.0
    for call, expected in zip(calls, outputs, strict=True):
        out = op(*call.args)
        assert torch.isfinite(out).all() and torch.isfinite(expected).all()
        power += float(expected.double().square().sum())
        error += float((out.double() - expected.double()).square().sum())
    assert error <= 0.5 * power + 1e-38  # squares of less are zero in float32


BELOW_GELU = ('a negative constant', 'negative')


@pytest.mark.parametrize('values', VALUES)
@pytest.mark.parametrize('kind', OPS)
def test_whatever_comes_parameters_are_finite(kind, values):
    if kind == 'post-GELU' and values in BELOW_GELU:
        return
    torch.manual_seed(0)
    op, calls = OPS[kind](), inputs_of(kind, values)
    outputs = outputs_of(AdaLog(**FAST), Block('layer', op, calls, {'layer': op}))
    is_usable(op, calls, outputs)


@pytest.mark.parametrize('values', ['zero', 'constant', 'negative', 'zero channels'])
@pytest.mark.parametrize('kind', OPS)
def test_the_whole_search_too(kind, values):
    if kind == 'post-GELU' and values in BELOW_GELU:
        return
    torch.manual_seed(0)
    op, calls = OPS[kind](), inputs_of(kind, values)
    is_usable(op, calls, outputs_of(AdaLog(), Block('layer', op, calls, {'layer': op})))


@pytest.mark.parametrize(
    'method', [AdaLog(**FAST), MinMax()], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize('factor', [1e16, 1e20, 1e37])
@pytest.mark.parametrize('kind', OPS)
def test_squares_that_overflow_name_the_layer(kind, factor, method):
    """A network whose activations are that large is broken, but it is not the search
    that is to break.
    """
    op, calls = (
        OPS[kind](),
        [
            Call(tuple(factor * x for x in call.args))
            for call in inputs_of(kind, 'positive')
        ],
    )
    with pytest.raises(
        QuantizationError,
        match=r'^layer receives activations that are too large to be squared',
    ):
        outputs_of(method, Block('layer', op, calls, {'layer': op}))
    assert all(quantizer.params is None for quantizer in op.quantizers().values())


@pytest.mark.parametrize('kind', OPS)
def test_what_is_not_too_large_to_be_squared_is_searched(kind):
    """Norms of a tenth of what is refused."""
    torch.manual_seed(0)
    op, calls = OPS[kind](), inputs_of(kind, 'positive')
    number = 1 if kind == 'probabilities and values' else 0
    norm = max(float(call.args[number].norm()) for call in calls)
    calls = [
        Call(
            tuple(
                1e14 / norm * x if i >= number else x for i, x in enumerate(call.args)
            )
        )
        for call in calls
    ]
    if kind == 'queries and keys':  # not both: their product is squared as well
        calls = [Call((call.args[0], call.args[1] / 1e14)) for call in calls]
    is_usable(
        op, calls, outputs_of(AdaLog(**FAST), Block('layer', op, calls, {'layer': op}))
    )


@pytest.mark.parametrize('kind', ['linear', 'post-GELU'])
@torch.no_grad()
def test_one_massive_token_in_each_image(kind):
    """As in the deeper layers of real models, with as many tokens as a ViT has."""
    torch.manual_seed(0)
    tokens = [random(192, 6, seed=seed) for seed in range(4)]
    for x in tokens:
        x[5] = 100 * x[5].abs()
    op, calls = OPS[kind](), [Call((x,)) for x in tokens]
    outputs = outputs_of(AdaLog(), Block('layer', op, calls, {'layer': op}))
    power = sum(float(out.square().sum()) for out in outputs)
    assert (
        sum(
            float((op(*call.args) - out).square().sum())
            for call, out in zip(calls, outputs, strict=True)
        )
        < 0.1 * power
    )


@pytest.mark.parametrize('values', BELOW_GELU)
def test_what_gelu_does_not_give_is_cut(values):
    op, calls = OPS['post-GELU'](), inputs_of('linear', values)
    outputs_of(AdaLog(**FAST), Block('fc2', op, calls, {'fc2': op}))
    with torch.no_grad():
        lowest = op(torch.full((6,), -0.16997124))
        assert all((op(call.args[0] - 5) - lowest).abs().max() < 1e-5 for call in calls)


@pytest.mark.parametrize('kind', OPS)
def test_weights_of_zeros_and_constants(kind):
    op, calls = OPS[kind](), inputs_of(kind, 'positive')
    if 'weight' not in op.roles:
        return
    for value in (0.0, 0.5, -1e-3):
        with torch.no_grad():
            op.weight[:] = value
            op.weight[0] = 0
            op.bias.fill_(1)
        for quantizer in op.quantizers().values():
            quantizer.clear()
        is_usable(
            op,
            calls,
            outputs_of(AdaLog(**FAST), Block('layer', op, calls, {'layer': op})),
        )
        assert (
            op.weight_quantizer(op.operands(*op.activations(*calls[0].args))[1])[0] == 0
        ).all()


@pytest.mark.parametrize('rows', [1, 2, 7])
@pytest.mark.parametrize('kind', OPS)
def test_samples_of_a_few_rows(kind, rows):
    torch.manual_seed(0)
    op, calls = OPS[kind](), inputs_of(kind, 'positive')
    outputs = outputs_of(
        AdaLog(**{**FAST, 'rows': rows}), Block('layer', op, calls, {'layer': op})
    )
    assert (
        all(torch.isfinite(op(*call.args)).all() for call in calls)
        and len(outputs) == 2
    )


@pytest.mark.parametrize('hard', ['rows of one', 'all on one', 'with zeros'])
def test_hard_probabilities(hard):
    p = torch.eye(8).flip(0).expand(3, 2, -1, -1).clone()
    if hard == 'all on one':
        p = torch.zeros(3, 2, 8, 8)
        p[..., 3] = 1
    if hard == 'with zeros':
        p[:, :, :4] = 0.125
    calls = [Call((p, random(3, 2, 8, 4)))]
    op = OPS['probabilities and values']()
    outputs = outputs_of(AdaLog(**FAST), Block('pv', op, calls, {'pv': op}))
    is_usable(op, calls, outputs)
    assert torch.equal(op.left_quantizer(p), p)


@pytest.mark.parametrize(
    'options',
    [
        dict(steps=1),
        dict(candidates=1),
        dict(candidates=2, steps=6),
        dict(rank=1),
        dict(rows=1, screen=1),
        dict(all_tokens=False),
        dict(rounds=2, width=2),
        dict(width=1000, candidates=8),
        dict(screen=1),
        dict(screen=10**6),
    ],
    ids=str,
)
@pytest.mark.parametrize('kind', OPS)
def test_searches_of_any_size(kind, options):
    torch.manual_seed(0)
    op, calls = OPS[kind](), inputs_of(kind, 'positive')
    outputs_of(AdaLog(**{**FAST, **options}), Block('layer', op, calls, {'layer': op}))
    assert all(torch.isfinite(op(*call.args)).all() for call in calls)


@pytest.mark.parametrize('kind', OPS)
def test_a_width_of_one(kind):
    op, calls = OPS[kind](), inputs_of(kind, 'positive')
    outputs_of(AdaLog(**{**FAST, 'width': 1}), Block('layer', op, calls, {'layer': op}))
    assert all(torch.isfinite(op(*call.args)).all() for call in calls)


# Whole backbones.

CONFIGS = {'swin': ('mmdet', SWIN), 'vit': ('mmseg', VIT)}
IMAGES = {
    'one image': [image(45, 57)],
    'shapes that differ': [image(45, 57), image(16, 90, 1), image(70, 33, 2)],
    'batches of different sizes': [image(45, 57, batch=2), image(40, 40, 1)],
    'constant': [torch.full((1, 3, 45, 57), 0.5)],
    'zero': [torch.zeros(1, 3, 45, 57)],
    'negative': [-image(45, 57).abs() - 1],
    'one channel': [image(45, 57) * torch.tensor([0.0, 1, 0])[:, None, None]],
    'smaller than a window': [image(16, 16)],
}


@pytest.mark.parametrize('propagate', [False, True])
@pytest.mark.parametrize('images', IMAGES)
@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_backbones_on_odd_images(name, images, propagate):
    backbone = quantizable(*CONFIGS[name])
    calls = [Call((x,)) for x in IMAGES[images]]
    names = find_spec(backbone).block_names(backbone)
    results = calibrate(
        backbone, names, calls, AdaLog(**FAST, propagate_error=propagate)
    )
    assert is_calibrated(backbone) and len(results) == len(names)
    assert all(torch.isfinite(value).all() for value in backbone.state_dict().values())
    plain = quantizable(*CONFIGS[name])
    for x in [*IMAGES[images], image(50, 40, seed=9)]:
        assert all(torch.isfinite(out).all() for out in backbone(x))
    for call in calls:
        for out, expected in zip(backbone(*call.args), plain(*call.args), strict=True):
            assert (out - expected).norm() < expected.norm()


@torch.no_grad()
def dead(backbone):
    """The backbone with norms of which some channels, and attentions and layers that,
    give nothing.
    """
    for name, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.weight[::3] = 0
            module.bias[::6] = 0
        if name.endswith('ffn.layers.0.0'):
            module.bias.fill_(-50)  # GELU gives zeros
        if name.endswith(('qkv', 'in_proj')):
            module.weight[:8] = 0
    return backbone


@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_backbones_of_which_parts_are_dead(name):
    backbone, plain = (
        dead(quantizable(*CONFIGS[name])),
        dead(quantizable(*CONFIGS[name])),
    )
    calls = [Call((image(45, 57),)), Call((image(30, 80, 1),))]
    calibrate(
        backbone, find_spec(backbone).block_names(backbone), calls, AdaLog(**FAST)
    )
    assert all(torch.isfinite(value).all() for value in backbone.state_dict().values())
    for x in (image(45, 57), image(50, 40, 9)):
        for out, expected in zip(backbone(x), plain(x), strict=True):
            assert (
                torch.isfinite(out).all() and (out - expected).norm() < expected.norm()
            )
    for op in operations(backbone).values():
        if op.kind == 'linear' and isinstance(op.rescale, Rescale):
            assert (op.rescale.scale > 0).all()


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('method', [AdaLog, MinMax])
@pytest.mark.parametrize('name', CONFIGS)
def test_activations_that_are_not_finite_name_the_layer(name, method, bad):
    """They come from a weight that is finite, so that nothing but the activations
    tells.
    """
    backbone = quantizable(
        *CONFIGS[name], 'minmax_w4a4' if method is MinMax else 'adalog_w4a4'
    )
    names = find_spec(backbone).block_names(backbone)
    layer = f'{names[2]}.ffn.layers.1'
    backbone.get_submodule(layer).register_forward_pre_hook(
        lambda op, args: (torch.where(args[0] == args[0].max(), bad, args[0]),)
    )
    calls = [Call((image(45, 57),))]
    with pytest.raises(
        QuantizationError,
        match=rf'^{layer} receives activations that are NaN or infinite'.replace(
            '.', r'\.'
        ),
    ):
        calibrate(backbone, names, calls, method(**(FAST if method is AdaLog else {})))
    assert [
        key.startswith(tuple(names[:2]))
        for key in backbone.state_dict()
        if '_quantizer.' in key
    ].count(False) == 0


@pytest.mark.parametrize('propagate', [False, True])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_images_that_are_not_finite_name_the_layer(bad, propagate):
    backbone = quantizable('mmdet', SWIN)
    x = image(45, 57)
    x[0, 1, 2, 3] = bad
    with pytest.raises(
        QuantizationError,
        match=r'^patch_embed\.projection receives activations that are NaN or infinite',
    ):
        calibrate(
            backbone,
            find_spec(backbone).block_names(backbone),
            [Call((image(45, 57),)), Call((x,))],
            AdaLog(**FAST, propagate_error=propagate),
        )


def test_products_that_overflow_name_the_layer():
    """Weights are finite, activations are, but not what the next layer gets."""
    first, second = (equip(QuantLinear.from_float(nn.Linear(4, 4))) for _ in range(2))
    with torch.no_grad():
        first.weight.fill_(3e38)
    module = nn.Sequential(first, second)
    with pytest.raises(QuantizationError, match=r'^1 receives activations'):
        outputs_of(
            AdaLog(**FAST),
            Block(
                'block', module, [Call((torch.full((5, 4), 10.0),))], operations(module)
            ),
        )


@pytest.mark.parametrize(
    'method', [AdaLog(**FAST), MinMax()], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize(
    ('kind', 'factor'),
    [
        ('linear', 1e19),
        ('linear', 3e38),
        ('patch embedding', 1e19),
        ('convolution', 3e38),
        ('queries and keys', 1e11),
    ],
)
@torch.no_grad()
def test_outputs_whose_squares_overflow_name_the_layer(kind, factor, method):
    """Weights and activations are finite, and activations can be squared, but not what
    the operation gives.
    """
    op, calls = OPS[kind](), inputs_of(kind, 'positive')
    if kind == 'queries and keys':
        calls = [Call(tuple(factor * x for x in call.args)) for call in calls]
    else:
        op.weight.clamp_(-1, 1).mul_(factor)
    with pytest.raises(
        QuantizationError, match=r'^layer gives outputs too large to be squared'
    ):
        outputs_of(method, Block('layer', op, calls, {'layer': op}))
    assert all(quantizer.params is None for quantizer in op.quantizers().values())
