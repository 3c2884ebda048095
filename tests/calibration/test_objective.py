"""The error of an operation's output for many parameters at once, against the operation
itself, one parameter after another.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mmptq.calibration import Block, Call, Gram, Objective, operations
from mmptq.calibration import objective as objective_module
from mmptq.calibration.objective import (
    PIECE,
    by_channel,
    own_error,
    screen,
    shared_by_channels,
)
from mmptq.calibration.search import objectives
from mmptq.layers import GeluShift, QuantConv2d, QuantLinear, QuantMatMul, Rescale
from mmptq.quantizers import AdaLogQuantizer, UniformQuantizer

from ..conftest import adalog, covering, equip, rescaled, sampled


def objective(*args, every=1):
    return objectives(*args, thin=(every,))[0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The direct way.


@torch.no_grad()
def output(op, operands):
    """The operation in float64, on operands that were rounded in float32."""
    return copy.deepcopy(op).double().compute(*(x.double() for x in operands))


@torch.no_grad()
def quantized(op, activations):
    return [
        quantizer(x)
        for quantizer, x in zip(
            op.quantizers().values(), op.operands(*activations), strict=True
        )
    ]


def direct(op, role, samples, params, weights=None, targets=None):
    """Squared error of the output against the float output, (n, groups), with each of
    the parameters set in turn.

    Weights are what each row of a linear layer's output counts; targets are other
    inputs of the float operation, if it has such.
    """
    quantizer = op.quantizer(role)
    before = quantizer.params
    errors = []
    for number in range(len(next(iter(params.values())))):
        quantizer.set(
            **{
                name: quantizer.ungrouped(value[number])
                for name, value in params.items()
            }
        )
        error = 0
        for activations, target in zip(samples, targets or samples, strict=True):
            difference = output(op, quantized(op, activations)) - output(
                op, op.operands(*target)
            )
            difference = (
                difference
                if weights is None
                else difference * weights.double().sqrt()[:, None]
            )
            keep = None if quantizer.axis is None else 1  # output channels or heads
            error = error + difference.square().sum(
                [d for d in range(difference.ndim) if d != keep]
            ).reshape(-1)
        errors.append(error)
    quantizer.set(**before) if before else quantizer.clear()
    return torch.stack(errors)


def linear(x, rescale=None, weight_axis=-2, bias=True, inner=7, out=5):
    torch.manual_seed(0)
    op = rescaled(nn.Linear(inner, out, bias), rescale)
    inputs = (
        adalog(4, 25, 3.0)
        if rescale is GeluShift
        else covering(op.rescale(x) if rescale else x, 4)
    )
    return equip(op, input=inputs, weight=covering(op.operands(x)[1], 3, weight_axis))


def conv(groups=1, weight_axis=-4, **options):
    torch.manual_seed(0)
    op = QuantConv2d.from_float(nn.Conv2d(4, 6, 3, groups=groups, **options))
    return equip(
        op, input=covering(random(50, 4), 4), weight=covering(op.weight, 3, weight_axis)
    )


def conv_samples(op, seed):
    return [
        sampled(op, op.activations(random(2, 4, 9, 9, seed=seed + number)), 13, seed)
        for number in range(2)
    ]


def tokens(rows, seed, inner=7):
    return [
        (random(rows, inner, seed=seed),),
        (random(rows + 3, inner, seed=seed + 1),),
    ]


def gelu(rows, seed):
    return [(nn.functional.gelu(2 * x),) for (x,) in tokens(rows, seed)]


def windows(seed, probabilities=False):
    samples = [
        (random(4, 2, 6, 5, seed=seed), random(4, 2, 5, 7, seed=seed + 1)),
        (random(2, 2, 9, 5, seed=seed + 2), random(2, 2, 5, 8, seed=seed + 3)),
    ]
    return (
        [(left.mul(2).softmax(-1), right) for left, right in samples]
        if probabilities
        else samples
    )


def matmul(left, right):
    return equip(QuantMatMul(), left=left, right=right)


def head(seed=0, bits=3):
    return covering(random(2, 40, seed=seed)[None, :, None], bits, -3)


LINEARS = [
    dict(),
    dict(bias=False),
    dict(weight_axis=None),
    dict(rescale=Rescale),
    dict(rescale=Rescale, bias=False),
    dict(rescale=Rescale, weight_axis=None),
    dict(rescale=GeluShift),
    dict(rescale=GeluShift, bias=False),
    dict(rescale=GeluShift, weight_axis=None),
]


def name_of(options):
    return (
        ', '.join(
            f'{key}={getattr(value, "__name__", value)}'
            for key, value in options.items()
        )
        or 'plain'
    )


def cases():
    """By name: an operation, a role, and a function that samples its activations with a
    seed.
    """
    for options in LINEARS:
        for rows in (5, 40):  # fewer than inner, and more: the two forms
            sample = gelu if options.get('rescale') is GeluShift else tokens
            for role in ('input', 'weight'):
                yield (
                    f'linear {role}, {name_of(options)}, {rows} rows',
                    lambda options=options, sample=sample: linear(
                        sample(40, 1)[0][0], **options
                    ),
                    role,
                    lambda op, seed, sample=sample, rows=rows: sample(rows, seed),
                )
    for groups in (1, 2):
        for axis in (-4, None):
            for role in ('input', 'weight'):
                yield (
                    f'conv {role}, groups={groups}, axis={axis}',
                    lambda g=groups, a=axis: conv(g, a),
                    role,
                    conv_samples,
                )
    yield (
        'conv weight, dilated',
        lambda: conv(1, dilation=2, padding=1),
        'weight',
        conv_samples,
    )
    yield (
        'conv weight, as many groups as channels',
        lambda: equip(
            QuantConv2d.from_float(nn.Conv2d(4, 4, 3, groups=4)),
            weight=covering(random(4, 1, 3, 3), 3, -4),
        ),
        'weight',
        conv_samples,
    )
    for role in ('left', 'right'):
        yield (
            f'queries and keys, {role}',
            lambda: matmul(head(1), head(2)),
            role,
            lambda op, seed: windows(seed),
        )
        yield (
            f'probabilities and values, {role}',
            lambda: matmul(adalog(3, 30), head(2)),
            role,
            lambda op, seed: windows(seed, True),
        )
        yield (
            f'one range for all heads, {role}',
            lambda: matmul(covering(random(9), 3), covering(random(9), 4)),
            role,
            (lambda op, seed: windows(seed)),
        )


CASES = {name: case for name, *case in cases()}


def candidates(op, role, samples, count=12):
    """Some of a quantizer's own, (n, groups)."""
    quantizer, index = op.quantizer(role), op.roles.index(role)
    values = torch.cat(
        [
            quantizer.grouped(op.operands(*activations)[index])
            for activations in samples
        ],
        1,
    )
    grid = quantizer.candidates(values.detach(), 128)
    if isinstance(quantizer, AdaLogQuantizer):
        grid = (
            quantizer.refine(
                grid, torch.rand(grid.params['q'].shape).double(), values, 128, 16
            )
            or grid
        )
    every = max(1, len(grid.params['scale']) // count)
    return {name: value[::every] for name, value in grid.params.items()}


def up_to_a_constant(found, expected, rtol=1e-4):
    found, expected = found - found[:1], expected - expected[:1]
    assert (found - expected).abs().max() <= rtol * expected.abs().max()


@pytest.mark.parametrize('other', ['float', 'quantized'])
@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_errors_are_those_of_the_operation(case, other):
    make, role, sample = CASES[case]
    torch.manual_seed(0)
    op = make()
    samples = sample(op, 10)
    params = candidates(op, role, samples)
    for name, quantizer in op.quantizers().items():
        if name != role and other == 'float':
            quantizer.clear()
    parts = [objective(op, role, activations) for activations in samples]
    found = torch.stack([part.errors(op.quantizer(role), params) for part in parts])
    assert found.dtype == torch.float64
    for part, errors, activations in zip(parts, found, samples, strict=True):
        expected = direct(op, role, [activations], params)
        assert (
            errors.shape
            == expected.shape
            == (len(params['scale']), part.values.shape[0])
        )
        if part.is_gram:
            up_to_a_constant(errors, expected)
        else:
            np.testing.assert_allclose(errors, expected, rtol=1e-4)
        assert (expected.amax(0) > 1.02 * expected.amin(0)).all()


@pytest.mark.parametrize('case', [case for case in CASES if case.startswith('linear')])
@torch.no_grad()
def test_rows_count_as_much_as_they_stand_for(case):
    make, role, sample = CASES[case]
    op = make()
    samples = sample(op, 10)[:1]
    weights = torch.exp(2 * random(len(samples[0][0]), seed=3))
    params = candidates(op, role, samples)
    part = objective(op, role, samples[0], weights)
    found, expected = (
        part.errors(op.quantizer(role), params),
        direct(op, role, samples, params, weights),
    )
    if part.is_gram:
        up_to_a_constant(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    up_to_a_constant(
        screen(part, 10**6).errors(op.quantizer(role), params), expected, 0.01
    )
    assert not torch.allclose(direct(op, role, samples, params), expected, rtol=0.1)


def rows_of(part, whole):
    """Where the rows (rows, inner) stand in others."""
    return (part[:, None] == whole).all(-1).int().argmax(1)


@torch.no_grad()
def test_a_thinned_objective_is_that_of_some_rows():
    """Weighted rows: large ones more often, so that the error is nearly that of all of
    them.
    """
    x = random(400, 7)
    x[::160] *= 50
    op = linear(x)
    weights = torch.exp(random(400, seed=3))
    params = candidates(op, 'input', [(x,)])
    whole, thin = objectives(op, 'input', (x,), weights, (1, 4))
    index = rows_of(thin.values[0, 0], x)
    assert (
        thin.values.shape == (1, 1, 100, 7)
        and thin.counts.shape == (1, 100)
        and torch.equal(thin.values[0, 0], x[index])
    )
    assert set(range(0, 400, 160)) <= set(
        index.tolist()
    )  # massive rows are never missed
    found = thin.errors(op.input_quantizer, params)
    np.testing.assert_allclose(
        found, direct(op, 'input', [(x[index],)], params, thin.counts[0]), rtol=1e-4
    )
    error = (found / whole.errors(op.input_quantizer, params)).log().abs().mean()
    plain = weights[::4] * 4
    assert error < 0.1
    assert (
        error
        < 0.5
        * (
            direct(op, 'input', [(x[::4],)], params, plain)
            / direct(op, 'input', [(x,)], params, weights)
        )
        .log()
        .abs()
        .mean()
    )


@pytest.mark.parametrize(
    ('batch', 'rows', 'every'),
    [(9, 12, 4), (4, 7, 3), (2, 32, 16), (40, 32, 16), (1, 5, 5)],
)
@torch.no_grad()
def test_a_thinned_product_has_rows_of_each_of_the_batch(batch, rows, every):
    left, right = random(batch, 2, 6, 5), random(batch, 2, 5, rows, seed=1)
    op = matmul(head(1), head(2))
    params = candidates(op, 'right', [(left, right)])
    thin = objective(op, 'right', (left, right), every=every)
    few = rows // every
    assert thin.values.shape == (2, batch, few, 5) and thin.counts.shape == (batch, few)
    chosen = [
        rows_of(thin.values[0, number], right.mT[number, 0]) for number in range(batch)
    ]
    for number, index in enumerate(chosen):
        assert torch.equal(rows_of(thin.values[1, number], right.mT[number, 1]), index)
    expected = sum(
        float(weight)
        * direct(op, 'right', [(left[[number]], right[[number]][..., [place]])], params)
        for number, index in enumerate(chosen)
        for place, weight in zip(index, thin.counts[number], strict=True)
    )
    np.testing.assert_allclose(
        thin.errors(op.right_quantizer, params), expected, rtol=1e-4
    )


@torch.no_grad()
def test_few_rows_are_not_thinned():
    x = random(43, 7)
    op = linear(x)
    for weights in (None, torch.exp(random(43, seed=3))):
        rows = [
            part.values.shape[2]
            for part in objectives(op, 'input', (x,), weights, (1, 44, 43, 2))
        ]
        assert rows == [43, 43, 1, 21]


def grouped():
    """A convolution in two groups, the second of which has much larger values."""
    op = conv(2)
    x = random(64, 4, 3, 3) * torch.tensor([1.0, 1, 30, 30])[:, None, None]
    return op, x, torch.exp(random(64, seed=3))


@torch.no_grad()
def test_a_thinned_convolution_has_all_groups():
    op, x, weights = grouped()
    assert objective(op, 'input', (x,), weights, every=4).values.shape == (1, 2, 16, 18)


@torch.no_grad()
def test_weighted_rows_of_all_groups_of_a_convolution_count_whatever_the_pieces(
    monkeypatch,
):
    op, x, weights = grouped()
    part = objective(op, 'input', (x,), weights)
    params = candidates(op, 'input', [(x,)])
    expected = part.errors(op.input_quantizer, params)
    monkeypatch.setattr(objective_module, 'PIECE', 64)
    np.testing.assert_allclose(
        part.errors(op.input_quantizer, params), expected, rtol=1e-4
    )


def test_both_forms_are_met():
    def is_gram(case):
        make, role, sample = CASES[case]
        op = make()
        return {
            objective(op, role, activations).is_gram for activations in sample(op, 10)
        }

    with torch.no_grad():
        assert is_gram('linear weight, plain, 5 rows') == {False, True} and is_gram(
            'linear weight, plain, 40 rows'
        ) == {True}
        assert is_gram('conv weight, groups=1, axis=-4') == {False} and is_gram(
            'conv weight, groups=2, axis=-4'
        ) == {False}


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_the_two_forms_agree(case):
    """M and l in place of the root and the residual, whichever the search chooses."""
    make, role, sample = CASES[case]
    op = make()
    samples = sample(op, 10)
    params = candidates(op, role, samples)
    part = objective(op, role, samples[0])
    if part.is_gram:
        return
    other = Objective(
        part.values,
        part.root @ part.root.mT,
        part.residual @ part.root.mT,
        is_gram=True,
    )
    up_to_a_constant(
        other.errors(op.quantizer(role), params),
        part.errors(op.quantizer(role), params),
    )
    columns = random(part.root.shape[-2], 3)
    torch.testing.assert_close(
        other.gram(columns), part.gram(columns), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(other.diagonal(), part.diagonal(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.linear(), part.linear(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('is_gram', [False, True])
@pytest.mark.parametrize(
    ('groups', 'batch', 'rows', 'inner', 'columns', 'shared'),
    [
        (1, 1, 3000, 40, 9, False),
        (1, 300, 17, 30, 5, False),
        (6, 40, 30, 9, 8, False),
        (200, 1, 1, 400, 6, True),
        (1, 1, 1, PIECE // 4, 2, False),
    ],
)
def test_sums_over_pieces_are_the_sum(
    groups, batch, rows, inner, columns, shared, is_gram
):
    """More values and candidates than are rounded at a time, along each dimension."""
    values = random(groups, batch, rows, inner)
    root, residual = (
        random(1 if shared else groups, batch, inner, columns, seed=1),
        random(groups, batch, rows, columns, seed=2),
    )
    if is_gram and inner > 1000:
        return
    part = (
        Objective(values, root @ root.mT, residual @ root.mT, True)
        if is_gram
        else Objective(values, root, residual)
    )
    quantizer = UniformQuantizer(3, axis=-4)
    params = {
        name: value[::9]
        for name, value in quantizer.candidates(values.flatten(1), 128).params.items()
    }
    found = part.errors(quantizer, params)
    for number, (scale, zero_point) in enumerate(zip(*params.values(), strict=True)):
        scale, zero_point = (x.view(-1, 1, 1, 1) for x in (scale, zero_point))
        delta = (quantizer.fake_quantize(values, scale, zero_point) - values).double()
        product = delta @ root.double()
        expected = (product + residual).square() - (
            residual.double().square() if is_gram else 0
        )
        size = float(product.square().sum((1, 2, 3)).max())
        np.testing.assert_allclose(
            found[number], expected.sum((1, 2, 3)), rtol=2e-4, atol=1e-4 * size
        )


# The screen.


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_a_screen_of_full_rank_is_the_exact_objective(case):
    make, role, sample = CASES[case]
    op = make()
    samples = sample(op, 10)
    params = candidates(op, role, samples, 60)
    part = objective(op, role, samples[1])
    cheap, exact = (
        one.errors(op.quantizer(role), params) for one in (screen(part, 10**6), part)
    )
    up_to_a_constant(cheap, exact, 0.01)
    chosen = exact.gather(0, cheap.argmin(0)[None])[0]
    spread = exact.amax(0) - exact.amin(0)
    assert (chosen - exact.amin(0) <= 0.005 * spread).all()
    for group in range(part.values.shape[0]):  # apart from near ties it ranks alike
        near, far = (
            np.sort(exact[:, group].numpy()),
            exact[:, group].numpy()[np.argsort(cheap[:, group].numpy())],
        )
        assert np.abs(near - far).max() <= 0.01 * float(spread[group])


def correlated(rows, inner, decay, seed=0):
    """Tokens whose covariance falls off as real activations' do."""
    generator = torch.Generator().manual_seed(seed)
    mix, _ = torch.linalg.qr(torch.randn(inner, inner, generator=generator))
    return (
        torch.randn(rows, inner, generator=generator)
        * torch.exp(-decay * torch.arange(inner))
        @ mix
    )


@torch.no_grad()
def test_a_screen_of_low_rank_comes_near_and_its_diagonal_is_exact():
    x = correlated(300, 40, 0.15)
    op = equip(
        QuantLinear.from_float(nn.Linear(40, 20)),
        input=covering(x, 4),
        weight=covering(random(20, 40), 4, -2),
    )
    part = objective(op, 'weight', (x,))
    assert part.is_gram
    gram = part.root[0, 0].double()
    errors = []
    for rank in (1, 8, 40):
        cheap = screen(part, rank)
        factor = cheap.factor[0, 0].double()
        assert factor.shape == (40, rank)
        near = factor @ factor.T + torch.diag(cheap.rest[0, 0].double())
        torch.testing.assert_close(
            near.diagonal(),
            gram.diagonal(),
            rtol=1e-3,
            atol=1e-4 * gram.diagonal().max().item(),
        )
        errors.append(((near - gram).norm() / gram.norm()).item())
    assert errors[0] > errors[1] > errors[2] and errors[1] < 0.1 and errors[2] < 1e-4


@torch.no_grad()
def test_the_best_rows_are_those_of_least_error():
    """They take back what the other operand's rounding did."""
    x = random(200, 7) @ random(7, 7, seed=5)
    op = linear(x)
    equip(op, input=covering(x, 4), weight=op.weight_quantizer)
    best = screen(objective(op, 'weight', (x,)), 7).best.flatten(1).double()
    x_q, target = op.input_quantizer(x).double(), x.double() @ op.weight.double().T
    assert (best - op.weight.double()).abs().max() > 0.02
    expected = torch.linalg.lstsq(x_q, target).solution.T
    torch.testing.assert_close(best, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize('rank', [1, 8, 100])
@pytest.mark.parametrize(
    'what',
    [
        'zero values',
        'zero root',
        'constant',
        'zero everything',
        'one token',
        'tiny',
        'huge',
    ],
)
@torch.no_grad()
def test_screens_of_odd_inputs_are_finite(what, rank):
    values, root = random(3, 1, 1, 9), random(1, 1, 9, 40)
    if what in ('zero values', 'zero everything'):
        values = torch.zeros_like(values)
    if what in ('zero root', 'zero everything'):
        root = torch.zeros_like(root)
    if what == 'constant':
        values, root = torch.full_like(values, 0.3), torch.full_like(root, 0.7)
    if what == 'one token':
        root = root[..., :1]
    if what in ('tiny', 'huge'):
        root = root * (1e-12 if what == 'tiny' else 1e12)
    quantizer = UniformQuantizer(4, axis=-2)
    params = quantizer.candidates(values.flatten(1), 32).params
    for residual in (
        torch.zeros(3, 1, 1, root.shape[-1]),
        0.1 * root.square().mean().sqrt() * random(3, 1, 1, root.shape[-1], seed=4),
    ):
        for part in (
            Objective(values, root, residual),
            Objective(values, root @ root.mT, residual @ root.mT, True),
        ):
            for one in (part, screen(part, rank)):
                assert torch.isfinite(one.errors(quantizer, params)).all()


@torch.no_grad()
def test_own_error_is_that_of_the_values_themselves():
    values = random(3, 2, 8, 5)
    quantizer = UniformQuantizer(3, axis=-3)
    params = quantizer.candidates(values.flatten(1), 64).params
    found = own_error(values).errors(quantizer, params)
    for number in range(0, 64, 7):
        chosen = {
            name: value[number].view(3, 1, 1, 1) for name, value in params.items()
        }
        expected = (
            (quantizer.fake_quantize(values, **chosen) - values)
            .double()
            .square()
            .sum((1, 2, 3))
        )
        np.testing.assert_allclose(found[number], expected, rtol=1e-5)


# Sums over tokens.


@pytest.mark.parametrize('pieces', [1, 2, 7, 300])
def test_sums_stream(pieces, monkeypatch):
    """In as many calls as one likes, and pieces of calls."""
    x, y = random(2, 300, 6), random(2, 300, 6, seed=1)
    once, streamed = Gram(), Gram()
    once.add(x, x - y)
    monkeypatch.setattr(Gram, 'TOKENS', 17)
    for part in zip(x.chunk(pieces, 1), y.chunk(pieces, 1), strict=True):
        streamed.add(part[0], part[0] - part[1])
    for gram in (once, streamed):
        part = gram.objective(torch.eye(6).expand(2, 6, 6), 1)
        torch.testing.assert_close(part.root[0], x.mT @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            part.linear()[0].mT, x.mT @ (x - y), rtol=1e-5, atol=1e-4
        )


def test_sums_are_exact_enough_for_small_differences():
    """Of a million tokens whose rounding error is a thousandth, in pieces of very
    different size.
    """
    x = random(1, 2**20, 4)
    y = x + 1e-3 * random(1, 2**20, 4, seed=1)
    gram, start = Gram(), 0
    for end in (1, 7, 7, 50000, 2**19, 2**20):
        gram.add(x[:, start:end], (x - y)[:, start:end])
        start = end
    part = gram.objective(torch.eye(4)[None], 1)
    expected = x[0].double().T @ (x - y)[0].double()
    torch.testing.assert_close(
        part.linear()[0, 0].mT.double(),
        expected,
        rtol=1e-4,
        atol=1e-4 * expected.abs().max().item(),
    )


@pytest.mark.parametrize('count', [1, 3, 12, 500, Gram.TOKENS + 1, 3 * Gram.TOKENS])
@pytest.mark.parametrize('axis', [-2, None])
@torch.no_grad()
def test_sums_decide_the_error_over_all_tokens(count, axis):
    x = random(count, 7)
    targets = x + 0.1 * random(count, 7, seed=1)
    op = linear(x if count > 1 else random(9, 7), weight_axis=axis)
    gram = Gram()
    rounded = op.input_quantizer(x)
    gram.add(rounded[None], (rounded - targets)[None])
    params = candidates(op, 'weight', [(x,)])
    weight = op.weight[None]
    found = gram.objective(weight, 1 if axis is None else 5).errors(
        op.weight_quantizer, params
    )
    up_to_a_constant(
        found, direct(op, 'weight', [(x,)], params, targets=[(targets,)]), 1e-3
    )


MODULES = {
    'linear': lambda: linear(random(40, 7)),
    'linear, one range': lambda: linear(random(40, 7), weight_axis=None),
    'post-norm': lambda: linear(random(40, 7), rescale=Rescale),
    'post-GELU': lambda: linear(random(40, 7), rescale=GeluShift, bias=False),
    'patch embedding': lambda: equip(
        QuantConv2d.from_float(nn.Conv2d(3, 6, 4, 4)),
        input=covering(random(99), 4),
        weight=covering(random(6, 3, 4, 4), 3, -4),
    ),
    'patch embedding, one range': lambda: equip(
        QuantConv2d.from_float(nn.Conv2d(3, 6, 4, 4)),
        input=covering(random(99), 4),
        weight=covering(random(6, 3, 4, 4), 3),
    ),
    'patches with gaps, groups, padding': lambda: equip(
        QuantConv2d.from_float(nn.Conv2d(4, 6, (2, 3), (3, 3), 1, groups=2)),
        input=covering(random(99), 4),
        weight=covering(random(6, 2, 2, 3), 3, -4),
    ),
}


@pytest.mark.parametrize('name', MODULES)
@torch.no_grad()
def test_a_block_sums_over_all_tokens_of_all_calls(name):
    """Whatever the shapes of the calls; the error is that of the operation on all of
    them.
    """
    torch.manual_seed(0)
    op = MODULES[name]()
    shapes = (
        [(13, 7), (2, 9, 7), (1, 3, 4, 7)]
        if op.kind == 'linear'
        else [(1, op.in_channels, 16, 20), (2, op.in_channels, 9, 17)]
    )
    inputs = [random(*shape, seed=number) for number, shape in enumerate(shapes)]
    block = Block('block', op, [Call((x,)) for x in inputs], operations(op, 'block'))
    gram = block.grams()['block']
    activations = [op.activations(x) for x in inputs]
    params = candidates(op, 'weight', activations[:1])
    weight = op.factors(*op.operands(*sampled(op, activations[0], 5)))[1][0]
    groups = (
        1 if op.weight_quantizer.axis is None else weight.shape[0] * weight.shape[1]
    )
    found = gram.objective(weight, groups).errors(op.weight_quantizer, params)
    expected = direct(
        op,
        'weight',
        [(x.reshape(-1, 7) if op.kind == 'linear' else x,) for (x,) in activations],
        params,
    )
    up_to_a_constant(found, expected, 1e-3)


def test_output_channels_are_rows_of_their_groups():
    rows = torch.arange(24.0).view(2, 3, 4)  # heads, columns, inner
    assert torch.equal(by_channel(rows, 6)[:, 0, 0], rows.view(6, 4)) and torch.equal(
        by_channel(rows, 1)[0], rows
    )
    root = torch.arange(2.0)[:, None, None].expand(2, 4, 4)
    assert shared_by_channels(root, rows, 6)[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert shared_by_channels(root, rows, 1).shape == (
        1,
        2,
        4,
        4,
    ) and shared_by_channels(root[:1], rows[:1], 3).shape == (1, 1, 4, 4)


@torch.no_grad()
def test_outputs_in_a_space_of_fewer_dimensions_are_measured_in_it():
    """The error of 20 outputs of 7 inputs, but for a constant, from 7 columns."""
    for rescale, x in ((None, tokens(40, 1)[0][0]), (GeluShift, gelu(40, 1)[0][0])):
        op = linear(x, rescale, out=20)
        params = candidates(op, 'input', [(x,)])
        part = objective(op, 'input', (x,))
        assert part.root.shape == (1, 1, 7, 7) and part.residual.shape == (1, 1, 40, 7)
        up_to_a_constant(
            part.errors(op.input_quantizer, params), direct(op, 'input', [(x,)], params)
        )


@torch.no_grad()
def test_a_product_thinned_to_one_row_of_each_of_the_batch_is_screened_by_its_outputs():
    left, right = random(40, 2, 6, 5).softmax(-1), random(40, 2, 5, 16, seed=1)
    left[36] = 0  # a window without a score: its M is zero
    op = matmul(head(1), head(2))
    thin = objective(op, 'right', (left, right), every=16)
    assert thin.values.shape == (2, 40, 1, 5)
    params = candidates(op, 'right', [(left, right)])
    cheap = screen(thin, 32)
    assert cheap.rest is None  # rank 32 holds all 6 columns of the output
    np.testing.assert_allclose(
        cheap.errors(op.right_quantizer, params),
        thin.errors(op.right_quantizer, params),
        rtol=1e-4,
    )
