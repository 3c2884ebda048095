"""The search against exhaustive grids in numpy and against the literal reference of the
whole method.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import brute_force
from mmptq.calibration import Block, Call, Gram, fpcs, search, search_weight
from mmptq.calibration.objective import Objective, own_error
from mmptq.calibration.search import LAST
from mmptq.layers import GeluShift, QuantConv2d, QuantLinear, QuantMatMul, Rescale
from mmptq.methods import AdaLog
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer

from ..conftest import (
    adalog,
    adalog_values,
    covering,
    equip,
    oracle_of,
    outputs_of,
    plan,
    rescaled,
    sampled,
)

WHOLE = dict(screen=10**6, rank=10**6)
"""Options with which candidates are screened exactly."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(*shape, seed=0):
    """Values for which the extremes are a bad range."""
    x = random(*shape, seed=seed)
    return x + 0.15 * x**3


def linear(inputs=None, weight=None, rescale=None):
    torch.manual_seed(0)
    op = rescaled(nn.Linear(12, 5), rescale)
    with torch.no_grad():
        op.weight.copy_(outliers(5, 12, seed=3))
    samples = [(outliers(40, 12, seed=1),), (outliers(25, 12, seed=2),)]
    if rescale is GeluShift:
        samples = [(F.gelu(2 * x),) for (x,) in samples]
    return (
        equip(
            op,
            input=inputs or UniformQuantizer(3),
            weight=weight or UniformQuantizer(3, axis=-2),
        ),
        samples,
    )


def conv(**options):
    torch.manual_seed(0)
    op = QuantConv2d.from_float(nn.Conv2d(4, 6, 3, **options))
    with torch.no_grad():
        op.weight.copy_(outliers(*op.weight.shape, seed=3))
    equip(op, input=UniformQuantizer(3), weight=UniformQuantizer(3, axis=-4))
    return op, [sampled(op, op.activations(outliers(2, 4, 9, 9, seed=1)), 50)]


def matmul(left, right, probabilities=False):
    op = equip(QuantMatMul(), left=left, right=right)
    tensors = [
        (outliers(3, 2, 7, 4, seed=1), outliers(3, 2, 4, 7, seed=2)),
        (outliers(2, 2, 5, 4, seed=3), outliers(2, 2, 4, 5, seed=4)),
    ]
    if probabilities:
        tensors = [((2 * a @ b).softmax(-1), b.mT) for a, b in tensors]
    return op, tensors


def heads(bits=3):
    return UniformQuantizer(bits, axis=-3)


CASES = {
    'linear weight': (lambda: linear(), 'weight'),
    'linear weight, quantized input': (
        lambda: linear(inputs=covering(outliers(40, 12, seed=1), 3)),
        'weight',
    ),
    'linear weight, one range': (lambda: linear(weight=UniformQuantizer(3)), 'weight'),
    'linear weight, post-norm': (lambda: linear(rescale=Rescale), 'weight'),
    'linear weight, post-GELU': (
        lambda: linear(adalog(3, 25, 2.0), rescale=GeluShift),
        'weight',
    ),
    'linear input': (
        lambda: linear(weight=covering(outliers(5, 12, seed=3), 4, -2)),
        'input',
    ),
    'linear input, post-norm': (lambda: linear(rescale=Rescale), 'input'),
    'linear input, post-GELU': (
        lambda: linear(
            AdaLogQuantizer(3), covering(outliers(5, 12, seed=3), 4, -2), GeluShift
        ),
        'input',
    ),
    'conv weight': (lambda: conv(padding=1, stride=2), 'weight'),
    'conv weight, groups': (lambda: conv(groups=2), 'weight'),
    'conv input': (lambda: conv(), 'input'),
    'queries': (lambda: matmul(heads(), heads()), 'left'),
    'keys': (
        lambda: matmul(covering(outliers(3, 2, 7, 4, seed=1), 3, -3), heads()),
        'right',
    ),
    'probabilities': (
        lambda: matmul(AdaLogQuantizer(3, fixed_scale=1.0), heads(), True),
        'left',
    ),
    'probabilities, uniform': (
        lambda: matmul(UniformQuantizer(3), heads(), True),
        'left',
    ),
    'values': (lambda: matmul(adalog(3, 30), heads(), True), 'right'),
}
UNIFORM = [
    case for case in CASES if case not in ('linear input, post-GELU', 'probabilities')
]


# The output error, in numpy and float64.


def compute(op, operands):
    operands = [np.asarray(x, np.float64) for x in operands]
    if op.kind == 'matmul':
        return np.matmul(*operands)
    if op.kind == 'linear':
        x, weight = operands
        bias = op.bias.detach().double().numpy()
        if isinstance(op.rescale, Rescale):
            bias = (
                bias
                + (
                    op.weight.detach().double()
                    @ (op.rescale.scale.double() * op.rescale.shift.double())
                ).numpy()
            )
        elif isinstance(op.rescale, GeluShift):
            bias = bias - float(op.rescale.shift) * weight.sum(1)
        return x @ weight.T + bias
    return F.conv2d(
        *(torch.from_numpy(x) for x in operands),
        op.bias.detach().double(),
        op.stride,
        0,
        op.dilation,
        op.groups,
    ).numpy()


def by_group(quantizer, squares):
    """Summed for each channel or head of the quantizer, or all."""
    if quantizer.axis is None:
        return np.array([squares.sum()])
    return squares.sum(tuple(d for d in range(squares.ndim) if d != 1))


@torch.no_grad()
def output_error(op, role, samples, rounded=None):
    """Error of the output, by group of a role, with the quantizers as they are, or a
    function in place of the role's.
    """
    total = 0
    for activations in samples:
        operands = []
        for name, operand in zip(op.roles, op.operands(*activations), strict=True):
            operand, quantizer = operand.numpy(), op.quantizer(name)
            if name == role and rounded:
                operands.append(rounded(operand))
            else:
                operands.append(
                    oracle_of(quantizer, operand) if quantizer.params else operand
                )
        expected = compute(op, [x.numpy() for x in op.operands(*activations)])
        total = total + by_group(
            op.quantizer(role), (compute(op, operands) - expected) ** 2
        )
    return total


def exhausted(op, role, samples, scales=160):
    """The least error, by group, that any scale between the widest and narrowest range
    gives with the zero points that FPCS tries.

    Or, for a logarithm, any base with any scale.
    """
    quantizer, index = op.quantizer(role), op.roles.index(role)
    operands = [op.operands(*activations)[index].detach() for activations in samples]
    if isinstance(quantizer, AdaLogQuantizer):
        high = max(float(x.max()) for x in operands)
        found = [
            output_error(
                op,
                role,
                samples,
                rounded=lambda x, s=s, q=q: log_rounded(x, q, s, quantizer.bits),
            )
            for s in (
                [quantizer.fixed_scale]
                if quantizer.fixed_scale
                else np.linspace(0.2, 1, 40) * high
            )
            for q in range(10, 138)
        ]
        return np.min(found, 0)
    levels, first = (
        2**quantizer.bits,
        quantizer.candidates(
            torch.cat([quantizer.grouped(x) for x in operands], 1), 128
        ),
    )
    scale, zero_point = (
        first.params[name].double().numpy() for name in ('scale', 'zero_point')
    )
    margin = first.spacing.double().numpy() / 2
    fractions = np.linspace(0, 1, scales)[:, None]
    wanted = (scale.min(0) - margin) * (1 - fractions) + (
        scale.max(0) + margin
    ) * fractions  # (scales, groups)
    shape = () if quantizer.axis is None else (-1, *[1] * (-quantizer.axis - 1))
    least = np.inf
    for z in range(levels):
        allowed = (zero_point == z).any(0)
        for s in (
            wanted.reshape(scales, *shape if shape else (1,)) if allowed.any() else ()
        ):
            s = s if shape else s.item()
            error = output_error(
                op,
                role,
                samples,
                rounded=lambda x, s=s, z=z: (
                    s * (np.clip(np.rint(x / s) + z, 0, levels - 1) - z)
                ),
            )
            least = np.minimum(least, np.where(allowed, error, np.inf))
    return least


TABLES = {}


def log_rounded(x, q, scale, bits):
    if (bits, q) not in TABLES:
        TABLES[bits, q] = adalog_values(bits, q).astype(np.float64)
    with np.errstate(divide='ignore'):
        k = np.minimum(
            np.rint(-np.log2(np.clip(x.astype(np.float64) / scale, 0, 1)) * 37 / q),
            2**bits,
        ).astype(int)
    return scale * TABLES[bits, q][k]


@pytest.mark.parametrize('case', CASES)
def test_the_search_finds_what_all_ranges_tried_find(case):
    make, role = CASES[case]
    op, samples = make()
    best = exhausted(op, role, samples)
    others = {
        name: quantizer.params
        for name, quantizer in op.quantizers().items()
        if name != role
    }
    search(op, role, samples, plan(**WHOLE))
    found = output_error(op, role, samples)
    assert (
        found.shape == best.shape
        and found.sum() <= 1.01 * best.sum()
        and (found <= 1.05 * best).all()
    )
    for name, params in others.items():
        now = op.quantizer(name).params
        assert (now is None) == (params is None) and all(
            torch.equal(now[key], params[key]) for key in params or ()
        )


LARGE = {
    'linear weight': (lambda: large_linear(), 'weight'),
    'linear input': (lambda: large_linear(), 'input'),
    'queries': (lambda: large_matmul(heads(4)), 'left'),
    'keys': (lambda: large_matmul(heads(4)), 'right'),
    'probabilities': (
        lambda: large_matmul(AdaLogQuantizer(4, fixed_scale=1.0)),
        'left',
    ),
    'values': (lambda: large_matmul(AdaLogQuantizer(4, fixed_scale=1.0)), 'right'),
}


def large_linear():
    """Correlated tokens, as real ones are."""
    op = QuantLinear.from_float(nn.Linear(48, 96))
    x = random(2048, 48) * torch.exp(-0.05 * torch.arange(48)) @ random(
        48, 48, seed=1
    ) + random(48, seed=2)
    with torch.no_grad():
        op.weight.copy_(outliers(96, 48, seed=3))
    return equip(op, input=UniformQuantizer(4), weight=UniformQuantizer(4, axis=-2)), [
        (x,)
    ]


def large_matmul(left):
    """Windows enough for 4096 rows."""
    x, y = outliers(84, 2, 49, 32, seed=1), outliers(84, 2, 32, 49, seed=2)
    samples = [(x, y)] if left.axis else [((0.2 * x @ y).softmax(-1), y.mT)]
    return equip(QuantMatMul(), left=left, right=heads(4)), samples


@pytest.mark.parametrize('case', list(LARGE))
def test_screening_a_part_of_the_rows_by_a_low_rank_finds_as_good_a_range(case):
    make, role = LARGE[case]
    op, samples = make()
    search(op, role, samples, plan(**WHOLE))
    best = output_error(op, role, samples).sum()
    op.quantizer(role).clear()
    search(op, role, samples, plan())
    assert (
        output_error(op, role, samples).sum()
        <= (1.06 if case == 'values' else 1.02) * best
    )  # of a few windows each row is massive


@pytest.mark.parametrize('seed', range(4))
def test_all_channels_of_values_are_screened(seed):
    """One of which, that no fixed stride would meet, is much wider than the others.
    Without it the error is four times as large.
    """
    values = random(84, 2, 49, 32, seed=10 * seed + 1)
    values[..., 5] *= 8
    samples = [((2 * random(84, 2, 49, 49, seed=10 * seed)).softmax(-1), values)]
    op = equip(QuantMatMul(), left=AdaLogQuantizer(4, fixed_scale=1.0), right=heads(4))
    search(op, 'right', samples, plan(**WHOLE))
    best = output_error(op, 'right', samples).sum()
    op.right_quantizer.clear()
    search(op, 'right', samples, plan())
    assert output_error(op, 'right', samples).sum() <= 1.1 * best


@pytest.mark.parametrize('case', CASES)
def test_a_search_never_makes_things_worse(case):
    """However few candidates it has, and however badly they are screened."""
    make, role = CASES[case]
    op, samples = make()
    search(op, role, samples, plan(**WHOLE))
    before = output_error(op, role, samples)
    for options in (
        dict(steps=1, width=1, candidates=1, rank=1, screen=4),
        dict(steps=3, width=2, candidates=4, rank=1, screen=13),
    ):
        search(op, role, samples, plan(**options))
        after = output_error(op, role, samples)
        assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize('case', UNIFORM)
def test_a_search_is_better_than_the_extremes(case):
    make, role = CASES[case]
    op, samples = make()
    index, quantizer = op.roles.index(role), op.quantizer(role)
    with torch.no_grad():
        values = torch.cat(
            [quantizer.grouped(op.operands(*a)[index]) for a in samples], 1
        )
    params = quantizer.range_params(values.amin(1), values.amax(1))
    quantizer.set(
        **{name: quantizer.ungrouped(value) for name, value in params.items()}
    )
    worst = output_error(op, role, samples)
    quantizer.clear()
    search(op, role, samples, plan(**WHOLE))
    assert output_error(op, role, samples).sum() < 0.95 * worst.sum()


@pytest.mark.parametrize('count', [128, 64, 16])
def test_a_search_of_a_base_finds_log2(count):
    """With powers of two for probabilities log2 is exact."""
    op = equip(QuantMatMul(), left=AdaLogQuantizer(4, fixed_scale=1.0))
    rows = torch.tensor(list(itertools.permutations([0.5, 0.25, 0.125, 0.125])))[
        None, None
    ]
    samples = [(rows, random(1, 1, 4, 3))]
    search(op, 'left', samples, plan(candidates=count))
    assert torch.equal(op.left_quantizer(rows), rows)


def test_parameters_have_the_shape_of_the_operand():
    for case, role, shape in (
        ('conv weight', 'weight', (6, 1, 1, 1)),
        ('queries', 'left', (2, 1, 1)),
        ('linear weight', 'weight', (5, 1)),
        ('linear weight, one range', 'weight', ()),
        ('probabilities', 'left', ()),
        ('linear input', 'input', ()),
    ):
        op, samples = CASES[case][0]()
        for _ in range(2):
            search(op, role, samples, plan(candidates=16))
            assert all(
                value.shape == shape for value in op.quantizer(role).params.values()
            )
    op, samples = CASES['conv weight'][0]()
    search(op, 'weight', samples, plan())
    assert op.weight_quantizer.zero_point.dtype == torch.int32


# Channels and heads by themselves.


@pytest.mark.parametrize('rescale', [None, Rescale, GeluShift])
def test_channels_are_searched_by_themselves(rescale):
    """A channel's range does not depend on the other channels."""
    inputs = (
        adalog(3, 25, 2.0)
        if rescale is GeluShift
        else covering(outliers(40, 12, seed=1), 4)
    )
    op, samples = linear(inputs, rescale=rescale)
    search(op, 'weight', samples, plan())
    for channel in range(5):
        alone = rescaled(nn.Linear(12, 1), rescale)
        equip(alone, input=inputs, weight=UniformQuantizer(3, axis=-2))
        with torch.no_grad():
            alone.weight.copy_(op.weight[channel : channel + 1])
            alone.bias.copy_(op.bias[channel : channel + 1])
        search(alone, 'weight', samples, plan())
        same_range(
            alone.weight_quantizer.params, op.weight_quantizer.params, 0, channel
        )


def same_range(alone, together, here, there):
    assert alone['zero_point'][here] == together['zero_point'][there]
    assert alone['scale'][here].item() == pytest.approx(
        together['scale'][there].item(), rel=1e-3
    )


@pytest.mark.parametrize('role', ['left', 'right'])
def test_heads_are_searched_by_themselves(role):
    op, samples = matmul(heads(), heads())
    search(op, role, samples, plan(**WHOLE))
    for head in range(2):
        alone = equip(QuantMatMul(), left=heads(), right=heads())
        one = [
            tuple(x[:, head : head + 1] for x in activations) for activations in samples
        ]
        search(alone, role, one, plan(**WHOLE))
        same_range(alone.quantizer(role).params, op.quantizer(role).params, 0, head)


def test_groups_of_a_convolution_are_searched_by_themselves():
    op, samples = conv(groups=2)
    search(op, 'weight', samples, plan(**WHOLE))
    for group in range(2):
        alone = QuantConv2d.from_float(nn.Conv2d(2, 3, 3))
        equip(alone, weight=UniformQuantizer(3, axis=-4))
        with torch.no_grad():
            alone.weight.copy_(op.weight[3 * group : 3 * group + 3])
        one = [(samples[0][0][:, 2 * group : 2 * group + 2],)]
        search(alone, 'weight', one, plan(**WHOLE))
        for channel in range(3):
            same_range(
                alone.weight_quantizer.params,
                op.weight_quantizer.params,
                channel,
                3 * group + channel,
            )


def test_weights_and_samples_are_left_as_they_are():
    op, samples = linear()
    before = [op.weight.clone(), samples[0][0].clone()]
    for role in ('weight', 'input'):
        search(op, role, samples, plan(candidates=16))
    assert torch.equal(op.weight, before[0]) and torch.equal(samples[0][0], before[1])
    assert op.weight.requires_grad and op.weight.grad is None


# Weights of rows, all tokens.


@pytest.mark.parametrize('role', ['weight', 'input'])
def test_rows_count_as_much_as_they_stand_for(role):
    """A row of weight three is the row three times."""
    weight = covering(outliers(5, 12, seed=3), 4, -2) if role == 'input' else None
    op, samples = linear(weight=weight)
    x = samples[0][0]
    counts = torch.arange(40) % 4
    repeated = [(x.repeat_interleave(counts, 0),)]
    search(op, role, repeated, plan(**WHOLE))
    expected = output_error(op, role, repeated)
    op.quantizer(role).clear()
    search(op, role, [(x,)], plan(**WHOLE), counts.float())
    assert output_error(op, role, repeated).sum() <= 1.02 * expected.sum()
    op.quantizer(role).clear()
    search(op, role, [(x,)], plan(**WHOLE), counts.flip(0).float())
    assert output_error(op, role, repeated).sum() > 1.02 * expected.sum()


@pytest.mark.parametrize('rescale', [None, Rescale, GeluShift])
def test_a_weight_is_searched_on_sums_as_on_the_tokens(rescale):
    inputs = (
        adalog(3, 25, 2.0)
        if rescale is GeluShift
        else covering(outliers(40, 12, seed=1), 4)
    )
    op, samples = linear(inputs, rescale=rescale)
    everything = [(torch.cat([x for (x,) in samples]),)]
    best = exhausted(op, 'weight', everything)
    block = Block(
        'layer', op, [Call(activations) for activations in samples], {'layer': op}
    )
    search_weight(op, block.grams()['layer'], samples, plan(**WHOLE))
    found = output_error(op, 'weight', everything)
    assert found.sum() <= 1.01 * best.sum() and (found <= 1.05 * best).all()


def test_sums_of_one_token_or_of_zeros_are_searched():
    for tokens in (torch.zeros(20, 12), outliers(1, 12), torch.ones(3, 12)):
        op, _ = linear()
        gram = Gram()
        gram.add(tokens[None], tokens[None] - tokens[None].round())
        search_weight(op, gram, [(tokens,)], plan())
        assert op.weight_quantizer.params is not None


@pytest.mark.parametrize(
    ('case', 'role'),
    [
        *(
            (case, role)
            for role in ('weight', 'input')
            for case in (
                'linear weight',
                'linear weight, post-norm',
                'linear weight, one range',
                'conv weight',
                'conv weight, groups',
            )
        ),
        ('queries', 'left'),
        ('queries', 'right'),
        ('values', 'right'),
    ],
)
def test_parameters_are_searched_on_the_error_of_the_values_themselves(case, role):
    op, samples = CASES[case][0]()
    quantizer, index = op.quantizer(role), op.roles.index(role)
    values = torch.cat(
        [
            quantizer.grouped(op.operands(*a)[index].detach())
            for a in (samples[:1] if role == 'weight' else samples)
        ],
        1,
    )
    screens = [own_error(values[:, None, None])]
    params = fpcs(quantizer, values, screens, [screens], plan())
    grid = quantizer.candidates(values, 128)
    lowest, highest = (
        grid.params['scale'].amin(0) - grid.spacing / 2,
        grid.params['scale'].amax(0) + grid.spacing / 2,
    )
    best = np.inf
    for z in range(2**quantizer.bits):
        tried = (grid.params['zero_point'] == z).any(0).numpy()
        for scale in np.linspace(lowest.double(), highest.double(), 300):
            best = np.minimum(
                best,
                np.where(tried, own_error_at(values, quantizer.bits, scale, z), np.inf),
            )
    found = own_error_at(
        values, quantizer.bits, *(value.double().numpy() for value in params.values())
    )
    assert found.sum() <= 1.01 * best.sum() and (found <= 1.05 * best).all()


def own_error_at(values, bits, scale, zero_point):
    """Squared error of each row of values."""
    x, scale, zero_point = (
        values.double().numpy(),
        np.reshape(scale, (-1, 1)),
        np.reshape(zero_point, (-1, 1)),
    )
    return (
        (
            scale
            * (np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1) - zero_point)
            - x
        )
        ** 2
    ).sum(1)


# FPCS itself.


class Known:
    """An objective with its least value at a known scale and zero point for each group."""

    def __init__(self, scale, zero_point):
        self.scale, self.zero_point = torch.tensor(scale), torch.tensor(zero_point)
        self.asked = []

    def errors(self, quantizer, params):
        self.asked.append(params)
        return (params['scale'] / self.scale).log().square().double() + (
            params['zero_point'] - self.zero_point
        ).square()


VALUES = random(3, 200, seed=7)


def test_the_least_is_found_in_few_grids():
    known, exact = (Known([0.3, 0.35, 0.28], [7, 5, 9]) for _ in range(2))
    found = fpcs(UniformQuantizer(4, axis=-2), VALUES, [known], [[exact]], plan())
    assert (
        found['zero_point'].tolist() == [7, 5, 9]
        and len(known.asked) == 6
        and len(exact.asked) == 1
    )
    np.testing.assert_allclose(found['scale'].numpy(), known.scale.numpy(), rtol=1e-3)


def test_the_present_parameters_win_if_they_are_better_by_the_exact_objective():
    known, misled = Known([0.3] * 3, [7] * 3), Known([0.4] * 3, [8] * 3)
    present = {
        'scale': torch.tensor([0.3, 3.0, 0.3]),
        'zero_point': torch.tensor([7, 7, 7], dtype=torch.int32),
    }
    found = fpcs(
        UniformQuantizer(4, axis=-2), VALUES, [misled], [[known]], plan(), present
    )
    assert (found['scale'] == torch.tensor([0.3, 3.0, 0.3])).tolist() == [
        True,
        False,
        True,
    ]
    assert found['zero_point'].tolist() == [7, 8, 7] or found['zero_point'][1] in (7, 8)


def test_parts_add_up():
    first, second = Known([0.3, 0.3, 0.3], [7, 7, 7]), Known([0.3, 0.3, 0.3], [7, 7, 9])
    found = fpcs(
        UniformQuantizer(4, axis=-2), VALUES, [first, second], [[first, second]], plan()
    )
    assert found['zero_point'].tolist() == [7, 7, 8]


@pytest.mark.parametrize(
    ('steps', 'width', 'expected'),
    [
        (6, 16, [1, 1, 16, 1, 1, 8]),
        (6, 1, [1, 1, 1, 1, 1, 1]),
        (4, 8, [1, 1, 8, 4]),
        (3, 8, [1, 1, 8]),
        (2, 8, [1, 4]),
        (1, 8, [4]),
    ],
)
@pytest.mark.parametrize('has_present', [False, True])
def test_the_best_of_every_grid_are_compared_exactly(
    steps, width, expected, has_present
):
    """One of each, and more of the third and of the last."""
    screened, exact = (
        Known([0.3, 0.35, 0.28], [7, 5, 9]),
        Known([0.3, 0.35, 0.28], [7, 5, 9]),
    )
    present = (
        {
            'scale': torch.full((3,), 9.0),
            'zero_point': torch.full((3,), 3, dtype=torch.int32),
        }
        if has_present
        else None
    )
    fpcs(
        UniformQuantizer(4, axis=-2),
        VALUES,
        [screened],
        [[exact]],
        plan(steps=steps, width=width),
        present,
    )
    grids, (compared,) = list(screened.asked), exact.asked
    assert len(grids) == steps and len(compared['scale']) == sum(expected) + has_present
    if present:
        assert all(torch.equal(compared[name][0], present[name]) for name in present)
    start = has_present
    for grid, count in zip(grids, expected, strict=True):
        errors = screened.errors(None, grid)
        best = errors.sort(0).values[:count]
        found = screened.errors(
            None,
            {name: value[start : start + count] for name, value in compared.items()},
        )
        assert torch.equal(found, best)
        start += count


@pytest.mark.parametrize('has_present', [False, True])
def test_a_first_comparison_leaves_a_few_for_the_last_and_the_present(has_present):
    screened, some, whole = (
        Known([scale, scale, scale], [7, 5, 9]) for scale in (0.3, 0.31, 0.32)
    )
    present = (
        {
            'scale': torch.full((3,), 9.0),
            'zero_point': torch.full((3,), 3, dtype=torch.int32),
        }
        if has_present
        else None
    )
    found = fpcs(
        UniformQuantizer(4, axis=-2),
        VALUES,
        [screened],
        [[some], [whole]],
        plan(),
        present,
    )
    (first,), (last,) = some.asked, whole.asked
    assert len(last['scale']) == LAST + has_present < len(first['scale'])
    if present:
        assert torch.equal(last['scale'][0], present['scale'])
    best = some.errors(None, first).sort(0).values[:LAST]
    assert torch.equal(
        some.errors(None, {name: value[has_present:] for name, value in last.items()}),
        best,
    )
    errors = whole.errors(None, last)
    assert torch.equal(
        whole.errors(None, {name: value[None] for name, value in found.items()})[0],
        errors.amin(0),
    )


@pytest.mark.parametrize(
    'quantizer',
    [UniformQuantizer(4), AdaLogQuantizer(4)],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_a_grid_is_made_for_all_values_whatever_is_screened(quantizer):
    """Small values are screened, and one is large."""
    small = random(1, 300).abs()
    values = torch.cat([small, torch.tensor([[50.0]])], 1)
    screens, exact = (
        [own_error(small[:, None, None])],
        [[own_error(values[:, None, None])]],
    )
    found = fpcs(
        quantizer, values, screens, exact, plan(width=1, candidates=16, steps=1)
    )
    assert (
        found['scale'] > 0.05
        and quantizer.fake_quantize(
            values, **{name: value[0] for name, value in found.items()}
        )[0, -1]
        > 1
    )


def test_constant_and_zero_operands_are_searched():
    for values in (
        torch.zeros(2, 1, 1, 30),
        torch.full((2, 1, 1, 30), 0.3),
        torch.full((2, 1, 1, 30), -7.0),
    ):
        for root in (random(1, 1, 30, 5), torch.zeros(1, 1, 30, 5)):
            part = Objective(values, root, torch.zeros(2, 1, 1, 5))
            screens = [own_error(values)]
            for exact in (screens, [part]):
                found = fpcs(
                    UniformQuantizer(4, axis=-2),
                    values.flatten(1),
                    screens,
                    [exact],
                    plan(),
                )
                assert (
                    torch.isfinite(found['scale']).all() and (found['scale'] > 0).all()
                )
                rounded = UniformQuantizer(4, axis=-4).fake_quantize(
                    values, *(value.view(2, 1, 1, 1) for value in found.values())
                )
                assert (rounded - values).abs().max() <= 1e-3 * values.abs().max()


# The literal reference of the whole method.


@torch.no_grad()
def calibrated(op, *activations):
    """An operation after AdaLog with all of its activations as a sample."""
    outputs_of(
        AdaLog(rows=10**6, screen=10**6),
        Block('layer', op, [Call(activations)], {'layer': op}),
    )
    return op


@torch.no_grad()
def linear_ratio(seed, bits):
    x = random(96, 16, seed=seed) * torch.exp(0.5 * random(16, seed=seed + 100))
    layer = nn.Linear(16, 10)
    layer.weight.copy_(0.3 * random(10, 16, seed=seed + 200))
    _, _, error = brute_force.search_linear(x, layer.weight, bits, bits)
    op = calibrated(
        equip(
            QuantLinear.from_float(layer),
            input=UniformQuantizer(bits),
            weight=UniformQuantizer(bits, axis=-2),
        ),
        x,
    )
    return output_error(op, 'input', [(x,)])[0] / error


@torch.no_grad()
def gelu_ratio(seed, bits):
    x = F.gelu(
        1.5 * random(200, 16, seed=seed) * torch.exp(0.3 * random(16, seed=seed + 100))
    )
    layer = nn.Linear(16, 10)
    layer.weight.copy_(0.3 * random(10, 16, seed=seed + 200))
    _, _, error = brute_force.search_gelu_linear(
        x, layer.weight, bits, bits, refinements=1
    )  # the paper's
    op = equip(
        rescaled(layer, GeluShift),
        input=AdaLogQuantizer(bits),
        weight=UniformQuantizer(bits, axis=-2),
    )
    return output_error(calibrated(op, x), 'input', [(x,)])[0] / error


@torch.no_grad()
def qk_ratio(seed, bits):
    q, k = (
        random(4, 2, 20, 8, seed=seed),
        random(4, 2, 20, 8, seed=seed + 1) * torch.exp(0.5 * random(8, seed=5)),
    )
    _, _, error = brute_force.search_qk(q, k, bits)
    op = calibrated(equip(QuantMatMul(), left=heads(bits), right=heads(bits)), q, k.mT)
    return output_error(op, 'left', [(q, k.mT)]).sum() / error


@torch.no_grad()
def pv_ratio(seed, bits):
    p, v = (
        (2 * random(4, 2, 20, 20, seed=seed)).softmax(-1),
        random(4, 2, 20, 8, seed=seed + 1) * torch.exp(0.5 * random(8, seed=5)),
    )
    _, _, error = brute_force.search_pv(p, v, bits)
    op = calibrated(
        equip(
            QuantMatMul(),
            left=AdaLogQuantizer(bits, fixed_scale=1.0),
            right=heads(bits),
        ),
        p,
        v,
    )
    return output_error(op, 'right', [(p, v)]).sum() / error


@pytest.mark.parametrize('bits', [3, 4, 6])
@pytest.mark.parametrize(
    'ratio', [linear_ratio, gelu_ratio, qk_ratio, pv_ratio], ids=lambda f: f.__name__
)
def test_the_error_is_that_of_the_literal_reference(ratio, bits):
    """Which scores every candidate of the published search by computing the layer on
    all tokens.
    """
    ratios = [ratio(seed, bits) for seed in range(6)]
    assert math.prod(ratios) ** (1 / 6) <= 1.01 and max(ratios) <= (
        1.06 if ratio is gelu_ratio else 1.02
    )


@torch.no_grad()
@pytest.mark.parametrize('rank', [16, 64, 10**6])
@pytest.mark.parametrize('form', ['gram', 'sample'])
def test_weights_are_screened_well_where_tokens_are_few_and_one_direction_is_massive(
    form, rank
):
    """M has no inverse then, and eigenvalues of many sizes: in float32 the screen's
    best rows would be noise.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 300, generator=generator).clamp(min=-0.17) * 0.1
    x += (
        12
        * torch.rand(300, generator=generator) ** 4
        * (torch.randn(60, 1, generator=generator) * 0.05 + 1)
    )
    weight = torch.randn(20, 300, generator=generator) * 0.05
    op = equip(
        QuantLinear(300, 20, bias=False),
        input=covering(x * 0.9, 3),
        weight=UniformQuantizer(4, axis=-2),
    )
    op.weight.copy_(weight)
    rounded, gram = op.input_quantizer(x), Gram()
    gram.add(rounded[None], (rounded - x)[None])

    def error(quantizer):
        return float((rounded @ quantizer(weight).t() - x @ weight.t()).square().sum())

    exact, best = [gram.objective(weight[None], 20)], UniformQuantizer(4, axis=-2)
    best.set(
        **{
            name: value[:, None]
            for name, value in fpcs(best, weight, exact, [exact], plan()).items()
        }
    )
    if form == 'gram':
        search_weight(op, gram, [(x,)], plan(rank=rank))
    else:
        search(op, 'weight', [(x,)], plan(rank=rank))
    assert error(op.weight_quantizer) < 1.05 * error(best)
