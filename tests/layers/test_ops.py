"""Quantized operations against torch's own, an independent formula, and their samples."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmptq.layers import GeluShift, QuantConv2d, QuantLinear, QuantMatMul, Rescale
from mmptq.layers.ops import pick, prefer_large
from mmptq.quantizers import UniformQuantizer

from ..conftest import adalog, covering, equip, oracle_of, rescaled, sampled

CONVS = [
    dict(),
    dict(stride=2, bias=False),
    dict(padding=1),
    dict(padding=(2, 1), stride=(2, 3)),
    dict(padding=2, dilation=2),
    dict(padding='same', dilation=(1, 3)),
    dict(padding=1, groups=2),
    dict(padding=1, groups=4, stride=2),
    dict(padding=1, padding_mode='reflect'),
    dict(padding=1, padding_mode='circular', dilation=(2, 1)),
    dict(kernel_size=(1, 4), stride=(1, 4)),
]


def conv(options, out=6):
    torch.manual_seed(0)
    return nn.Conv2d(4, out * options.get('groups', 1), **{'kernel_size': 3, **options})


def calibrated(op, x, bits=4):
    """A linear layer or convolution with its input per tensor, its weight per output
    channel.
    """
    return equip(
        op, input=covering(x, bits), weight=covering(op.weight, bits, op.weight_axis)
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def places(rows, full):
    """For every row, the one row of the full output that it is, to rounding."""
    distance = (rows[:, None] - full[None]).abs().amax(-1)
    found = distance.argmin(1)
    assert distance.amin(1).max() < 1e-5
    return found.tolist()


# Float.


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(12,), (5, 12), (2, 7, 12), (2, 3, 4, 12)])
def test_uncalibrated_linear_is_nn_linear(shape, bias):
    layer, x = nn.Linear(12, 5, bias), torch.randn(shape)
    assert torch.equal(equip(QuantLinear.from_float(layer))(x), layer(x))


@pytest.mark.parametrize('options', CONVS, ids=str)
def test_uncalibrated_conv_is_conv2d(options):
    layer, x = conv(options), torch.randn(2, 4, 13, 17)
    op = equip(QuantConv2d.from_float(layer))
    assert torch.equal(op(x), layer(x))
    if layer.padding_mode == 'zeros':
        assert torch.equal(
            op(x),
            F.conv2d(
                x,
                layer.weight,
                layer.bias,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            ),
        )


def test_uncalibrated_matmul_is_matmul():
    left, right = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 4, 6)
    assert torch.equal(equip(QuantMatMul())(left, right), left @ right)


@pytest.mark.parametrize(
    'plain',
    [nn.Linear(17, 5), nn.Linear(17, 5, bias=False), *map(conv, CONVS)],
    ids=str,
)
def test_a_layer_made_float_again_is_the_layer_that_it_was(plain):
    plain.eval()
    again = equip(
        (QuantLinear if isinstance(plain, nn.Linear) else QuantConv2d).from_float(plain)
    ).to_float()
    assert (
        type(again) is type(plain) and str(again) == str(plain) and not again.training
    )
    assert (
        again.weight is plain.weight
        and again.bias is plain.bias
        and list(again.state_dict()) == list(plain.state_dict())
    )
    x = torch.randn(2, 4, 13, 17)
    assert torch.equal(again(x), plain(x))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kind', ['linear', 'conv'])
def test_parameters_are_shared_and_keep_their_names(kind, bias):
    layer = nn.Linear(4, 5, bias) if kind == 'linear' else nn.Conv2d(4, 5, 3, bias=bias)
    layer.eval()
    layer.weight.requires_grad_(False)
    op = equip((QuantLinear if kind == 'linear' else QuantConv2d).from_float(layer))
    assert op.kind == kind and isinstance(op, type(layer)) and not op.training
    assert op.weight is layer.weight and op.bias is layer.bias
    assert list(op.state_dict()) == list(layer.state_dict())
    assert dict(op.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.randn(2, 4) if kind == 'linear' else torch.randn(1, 4, 5, 5)
    assert torch.equal(op(x), layer(x))


def test_quantizers_are_children_by_role():
    weight = UniformQuantizer(4, axis=-2)
    op = equip(QuantLinear.from_float(nn.Linear(3, 2)), weight=weight)
    assert op.weight_quantizer is op.quantizer('weight') is weight
    assert (
        list(op.quantizers())
        == ['input', 'weight']
        == [name.removesuffix('_quantizer') for name, _ in op.named_children()]
    )


# Quantized.


def test_quantized_linear_is_the_formula():
    x = torch.randn(7, 9, 12, generator=seeded())
    op = calibrated(QuantLinear.from_float(nn.Linear(12, 5)), x)
    x_q, w_q = (
        oracle_of(op.input_quantizer, x.numpy()),
        oracle_of(op.weight_quantizer, op.weight.detach().numpy()),
    )
    expected = (
        np.einsum('bti,oi->bto', x_q.astype(float), w_q.astype(float))
        + op.bias.detach().double().numpy()
    )
    np.testing.assert_allclose(op(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (op(x) - F.linear(x, op.weight, op.bias)).abs().max() > 1e-2


@pytest.mark.parametrize('options', CONVS, ids=str)
def test_quantized_conv_is_the_formula(options):
    x = (
        torch.randn(2, 4, 9, 11, generator=seeded()) + 0.5
    )  # a zero point beside the middle
    op = calibrated(QuantConv2d.from_float(conv(options)), x)
    x_q, w_q = (
        torch.from_numpy(oracle_of(quantizer, tensor.detach().numpy()))
        for quantizer, tensor in (
            (op.input_quantizer, x),
            (op.weight_quantizer, op.weight),
        )
    )
    plain = conv(options)
    with torch.no_grad():
        plain.weight.copy_(w_q)
        expected = plain(x_q)  # pads after the quantization
    torch.testing.assert_close(op(x), expected, rtol=1e-5, atol=1e-5)
    assert (op(x) - conv(options)(x)).abs().max() > 1e-2


def test_quantized_matmul_is_the_formula():
    left, right = (
        torch.rand(3, 2, 5, 4, generator=seeded()),
        torch.randn(3, 2, 4, 6, generator=seeded()),
    )
    op = equip(QuantMatMul(), left=adalog(4, 30), right=covering(right, 4, -3))
    expected = oracle_of(op.left_quantizer, left.numpy()).astype(float) @ oracle_of(
        op.right_quantizer, right.numpy()
    ).astype(float)
    np.testing.assert_allclose(op(left, right).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (op(left, right) - left @ right).abs().max() > 1e-2


# Samples.


def test_pick():
    assert pick(100, 7, seeded(), torch.device('cpu')).tolist() == list(range(7))
    found = pick(5, 1000, seeded(), torch.device('cpu')).tolist()
    assert (
        len(set(found)) == 5
        and found == sorted(found)
        and found != pick(5, 1000, seeded(1), torch.device('cpu')).tolist()
    )


@pytest.mark.parametrize('rows', [1, 10, 41])
@pytest.mark.parametrize('shape', [(42, 8), (2, 21, 8), (2, 3, 7, 8)])
def test_linear_samples_give_rows_of_the_output(shape, rows):
    x = torch.randn(shape, generator=seeded())
    op = calibrated(QuantLinear.from_float(nn.Linear(8, 5)), x)
    sample = sampled(op, (x,), rows)
    for compute in (lambda *a: op.compute(*op.operands(*a)), op.quantized):
        assert len(places(compute(*sample), compute(x).flatten(0, -2))) == rows


@pytest.mark.parametrize('shape', [(42, 8), (2, 21, 8), (2, 3, 7, 8)])
@pytest.mark.parametrize('rows', [42, 1000])
def test_where_there_are_fewer_tokens_all_are_taken_once(shape, rows):
    x = torch.randn(shape, generator=seeded())
    op = QuantLinear.from_float(nn.Linear(8, 5))
    found = op.places((x,), rows, seeded())
    assert torch.equal(op.take((x,), found)[0], x.view(-1, 8)) and torch.equal(
        found.counts, torch.ones(42)
    )
    assert torch.equal(op.take((x,))[0], x.view(-1, 8))


def test_linear_samples_count_what_they_stand_for():
    """Large tokens are drawn more often; with their weights any sum over tokens is
    right on average.
    """
    x = torch.randn(2000, 8, generator=seeded())
    x[::500] *= 60  # four massive activations
    op = QuantLinear.from_float(nn.Linear(8, 5))
    energy = x.double().square().sum(1)
    sums = {
        'tokens': torch.ones(2000),
        'energy': energy,
        'first': x[:, 0].double(),
        'fourth': energy.square(),
    }
    drawn = [op.places((x,), 100, seeded(seed)) for seed in range(200)]
    assert all(len(place.index[0]) == len(place.counts) == 100 for place in drawn)
    assert all(
        (place.index[0].unique()[:, None] == torch.arange(0, 2000, 500)).any(0).all()
        for place in drawn
    )  # never missed
    for name, values in sums.items():
        estimates = torch.stack(
            [(place.counts * values[place.index[0]]).sum() for place in drawn]
        )
        error = estimates.std() / 200**0.5
        assert (
            estimates.mean() - values.sum()
        ).abs() < 4 * error + 1e-4 * values.abs().sum(), name
    estimates = torch.stack(
        [(place.counts * energy[place.index[0]]).sum() for place in drawn]
    )
    plain = torch.stack(
        [
            20 * energy[pick(100, 2000, seeded(seed), x.device)].sum()
            for seed in range(200)
        ]
    )
    assert estimates.std() < 0.1 * plain.std()


@pytest.mark.parametrize('value', [0.0, 3.0])
def test_linear_samples_of_equal_tokens(value):
    found = QuantLinear(8, 5).places((torch.full((300, 8), value),), 20, seeded())
    torch.testing.assert_close(found.counts, torch.full((20,), 15.0))
    assert len(found.index[0].unique()) == 20


@pytest.mark.parametrize('weighted', [False, True])
def test_a_systematic_sample_is_right_on_average(weighted):
    """Over all places where it may start, for the sum of anything."""
    norms = torch.randn(300, generator=seeded()).abs()
    norms[::90] *= 40
    weights = torch.exp(torch.randn(300, generator=seeded(1))) if weighted else None
    counts = torch.ones(300) if weights is None else weights
    starts = (torch.arange(2000) + 0.5) / 2000
    for values in (
        torch.ones(300),
        norms.square(),
        torch.randn(300, generator=seeded(2)),
        norms.square().square(),
    ):
        estimates = []
        for start in starts.tolist():
            index, found = prefer_large(norms, 50, start, weights)
            assert len(index) == len(found) == 50 and (index.diff() >= 0).all()
            estimates.append(float(values[index].double() @ found.double()))
        expected = float(values.double() @ counts.double())
        assert sum(estimates) / 2000 == pytest.approx(
            expected, abs=0.01 * float(values.abs().double() @ counts.double())
        )


def test_half_of_a_systematic_sample_is_in_proportion_to_energy():
    norms = torch.ones(1000)
    norms[7] = 1000  # nearly all the energy
    index, weights = prefer_large(norms, 100, 0.5)
    assert 49 <= int((index == 7).sum()) <= 52 and float(
        weights.sum()
    ) == pytest.approx(1000, rel=0.05)
    assert float(weights[index == 7].sum()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize('count', [5, 6, 1000])
def test_where_there_are_no_more_rows_all_are_taken(count):
    for weights in (None, torch.tensor([3.0, 0, 1, 2, 5])):
        index, found = prefer_large(
            torch.tensor([1.0, 0, 9, 9, 1]), count, 0.3, weights
        )
        assert index.tolist() == [0, 1, 2, 3, 4] and found.tolist() == (
            [1] * 5 if weights is None else weights.tolist()
        )


@pytest.mark.parametrize('options', CONVS, ids=str)
@pytest.mark.parametrize('rows', [10, 1000])
def test_conv_samples_give_rows_of_the_output(options, rows):
    x = torch.randn(2, 4, 9, 11, generator=seeded()) + 0.5
    op = calibrated(QuantConv2d.from_float(conv(options)), x, 8)
    activations = op.activations(x)
    sample = sampled(op, activations, rows)
    for compute in (lambda *a: op.compute(*op.operands(*a)), op.quantized):
        full = compute(*activations)
        out = compute(*sample)
        assert out.shape[1:] == (full.shape[1], 1, 1)
        full = full.movedim(1, -1).flatten(0, 2)
        found = places(out.flatten(1), full)
        assert len(found) == min(rows, len(full))
        if compute == op.quantized:  # two receptive fields may be alike
            continue
        assert len(set(found)) == len(found)


@pytest.mark.parametrize('options', CONVS, ids=str)
def test_conv_samples_count_what_they_stand_for(options):
    """Receptive fields of large values are drawn more often; with their weights any sum
    over fields is right on average.
    """
    x = torch.randn(3, 4, 24, 26, generator=seeded())
    x[1, :, 12, 12] *= 100
    op = QuantConv2d.from_float(conv(options))
    activations = op.activations(x)
    fields = (
        op.take(activations)[0][:, :, :: op.dilation[0], :: op.dilation[1]]
        .flatten(1)
        .double()
    )
    energy = fields.square().sum(1)
    drawn = [op.places(activations, 40, seeded(seed)) for seed in range(200)]
    assert all(len(place.index[0]) == len(place.counts) == 40 for place in drawn)
    massive = (energy > 0.3 * energy.max()).nonzero().flatten()
    if op.dilation == (1, 1):  # what lies between is averaged as well
        assert all((place.index[0][:, None] == massive).any() for place in drawn)
    for values in (torch.ones(len(energy)), energy, fields[:, 0]):
        estimates = torch.stack(
            [(place.counts * values[place.index[0]]).sum() for place in drawn]
        )
        assert (
            estimates.mean() - values.sum()
        ).abs() < 4 * estimates.std() / 200**0.5 + 1e-3 * values.abs().sum()


@pytest.mark.parametrize('leading', [(6,), (2, 3)])
@pytest.mark.parametrize(
    ('rows', 'windows', 'length'),
    [(1, 1, 1), (4, 1, 4), (7, 1, 7), (20, 3, 7), (1000, 6, 7)],
)
def test_matmul_samples_give_rows_and_columns_of_the_output(
    leading, rows, windows, length
):
    left, right = (
        torch.randn(*leading, 2, 7, 4, generator=seeded()),
        torch.randn(*leading, 2, 4, 5, generator=seeded(1)),
    )
    op = equip(QuantMatMul(), left=covering(left, 4, -3), right=covering(right, 4, -3))
    sample = sampled(op, (left, right), rows)
    columns = sample[1].shape[-1]
    assert sample[0].shape == (windows, 2, length, 4) and sample[1].shape == (
        windows,
        2,
        4,
        columns,
    )
    assert 1 <= columns <= min(rows, 5) and (rows < 20 or columns == 5)
    for compute in (op.compute, op.quantized):
        full, out = compute(left, right).reshape(6, 2, 7, 5), compute(*sample)
        assert out.shape == (windows, 2, length, columns)
        assert all((full - value).abs().min() < 1e-5 for value in out.flatten())
        for head in range(2 if columns == 5 else 0):
            found = places(out[:, head].flatten(0, 1), full[:, head].flatten(0, 1))
            assert len(set(found)) == windows * length


def test_matmul_samples_are_of_the_same_windows_rows_and_columns_in_both_operands():
    """Each element of the product says where it stands."""
    windows, heads, length, columns = 5, 2, 6, 7
    place = torch.arange(float(windows * heads * length)).view(
        windows, heads, length, 1
    )
    left = torch.cat([place, torch.ones_like(place)], -1)  # (.., place of the row, 1)
    right = torch.stack(
        [torch.ones(columns), 1000 * torch.arange(float(columns))]
    ).expand(windows, heads, 2, columns)
    out = QuantMatMul().compute(*sampled(QuantMatMul(), (left, right), 4))
    row, column = out % 1000, out // 1000
    assert (row.diff(dim=-1) == 0).all() and (row.diff(dim=-2) > 0).all()
    assert (
        (column.diff(dim=-1) > 0).all()
        and (column.diff(dim=-2) == 0).all()
        and (column[:, 0] == column[:, 1]).all()
    )
    assert (row[:, 1] - row[:, 0] == length).all()


def test_without_places_all_is_taken():
    x = torch.randn(2, 4, 9, 11, generator=seeded())
    op = QuantConv2d.from_float(conv(dict(padding=1, stride=2)))
    full = op.compute(*op.operands(*op.activations(x))).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(
        op.compute(*op.operands(*op.take(op.activations(x)))).flatten(1),
        full,
        rtol=1e-5,
        atol=1e-5,
    )
    left, right = torch.randn(2, 3, 2, 7, 4), torch.randn(2, 3, 2, 4, 5)
    taken = QuantMatMul().take((left, right))
    assert torch.equal(taken[0], left.view(6, 2, 7, 4)) and torch.equal(
        taken[1], right.view(6, 2, 4, 5)
    )


# The operation as a product.


def product(op, operands):
    """(left + offset) @ right^T of an operation's factors, in the shape of its output."""
    left, right = op.factors(*operands)
    assert (
        torch.equal(left.flatten().sort().values, operands[0].flatten().sort().values)
        or op.kind == 'conv'
    )  # value by value
    left = left if op.offset() is None else left + op.offset()
    assert (
        left.ndim == right.ndim == 4
        and left.shape[-1] == right.shape[-1]
        and left.shape[1] == right.shape[1]
    )
    out = left @ right.mT  # (batch, heads, rows, columns)
    if op.kind == 'matmul':
        return out
    assert len(out) == len(left) == len(right) == 1
    return (
        out[0].movedim(0, 1).flatten(1)
    )  # (rows, heads * columns), in the order of output channels


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('rescale', [None, Rescale, GeluShift])
def test_linear_factors_are_the_operation_but_for_a_constant(rescale, bias):
    x = torch.randn(40, 12, generator=seeded())
    op = calibrated(rescaled(nn.Linear(12, 5, bias), rescale), x)
    sample = sampled(op, (x,), 20)
    constant = []
    for operands in (
        op.operands(*sample),
        (
            op.input_quantizer(op.operands(*sample)[0]),
            op.weight_quantizer(op.operands(*sample)[1]),
        ),
    ):
        difference = op.compute(*operands) - product(op, operands)
        assert (difference - difference[:1]).abs().max() < 1e-4  # of rows: a bias
        constant.append(difference[0])
    torch.testing.assert_close(
        *constant, rtol=0, atol=1e-4
    )  # and no matter what is rounded
    if rescale is None:
        torch.testing.assert_close(
            constant[0], op.bias if bias else torch.zeros(5), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize('options', CONVS, ids=str)
def test_conv_factors_are_the_operation_but_for_the_bias(options):
    x = torch.randn(2, 4, 9, 11, generator=seeded())
    op = calibrated(QuantConv2d.from_float(conv(options)), x)
    sample = sampled(op, op.activations(x), 20)
    for operands in (
        op.operands(*sample),
        (op.input_quantizer(sample[0]), op.weight_quantizer(op.weight)),
    ):
        bias = 0 if op.bias is None else op.bias
        torch.testing.assert_close(
            product(op, operands) + bias,
            op.compute(*operands).flatten(1),
            rtol=1e-5,
            atol=1e-5,
        )
    left, right = op.factors(*op.operands(*sample))
    assert (
        left.shape[1] == right.shape[1] == op.groups
        and right[0].numel() == op.weight.numel()
    )
    assert torch.equal(right.flatten(), op.weight.flatten())


def test_matmul_factors_are_the_operation():
    operands = (
        torch.randn(3, 2, 7, 4, generator=seeded()),
        torch.randn(3, 2, 4, 5, generator=seeded(1)),
    )
    op = QuantMatMul()
    assert (
        torch.equal(product(op, operands), op.compute(*operands))
        and op.factors(*operands)[0] is operands[0]
    )


@pytest.mark.parametrize(
    ('op', 'streams'),
    [
        (QuantLinear(4, 3), True),
        (QuantMatMul(), False),
        (QuantConv2d(3, 4, 4, 4), True),
        (QuantConv2d(3, 4, (2, 4), (3, 4)), True),
        (QuantConv2d(3, 4, 1), True),
        (QuantConv2d(3, 4, 3), False),
        (QuantConv2d(3, 4, (4, 1), (3, 1)), False),
        (QuantConv2d(3, 4, 2, 4, dilation=2), False),
    ],
    ids=str,
)
def test_rows_are_summed_where_receptive_fields_do_not_overlap(op, streams):
    assert op.streams is streams


@pytest.mark.parametrize('rescale', [None, Rescale, GeluShift])
def test_float_forward_is_the_float_layer_whatever_is_calibrated(rescale):
    x, layer = torch.randn(5, 12), nn.Linear(12, 5)
    op = calibrated(rescaled(layer, rescale), x, 2)
    assert torch.equal(op.float_forward(x), layer(x)) and not torch.allclose(
        op(x), layer(x), atol=1e-2
    )
    images = torch.randn(1, 4, 8, 8)
    convolution = calibrated(QuantConv2d.from_float(conv(dict(padding=1))), images, 2)
    assert torch.equal(convolution.float_forward(images), conv(dict(padding=1))(images))
    assert not torch.allclose(
        convolution(images), convolution.float_forward(images), atol=1e-2
    )
    left, right = torch.rand(1, 2, 5, 4), torch.randn(1, 2, 4, 6)
    matmul = equip(QuantMatMul(), left=adalog(2, 30), right=covering(right, 2, -3))
    assert torch.equal(
        matmul.float_forward(left, right), left @ right
    ) and not torch.allclose(matmul(left, right), left @ right, atol=1e-2)


@pytest.mark.parametrize(
    'op',
    [QuantLinear(8, 5), QuantConv2d(8, 5, 3), QuantMatMul()],
    ids=lambda op: op.kind,
)
def test_samples_are_seeded(op):
    activations = {
        'linear': (torch.randn(300, 8),),
        'conv': (torch.randn(2, 8, 20, 20),),
        'matmul': (torch.randn(40, 2, 9, 4), torch.randn(40, 2, 4, 9)),
    }[op.kind]
    first, again, other = (sampled(op, activations, 20, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
