"""The second stage of AdaLog: what is learned, that it is what is kept, and that
nothing else changes.
"""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from mmptq.apis import load_recipe
from mmptq.backbones import Recipe, find_spec
from mmptq.calibration import Block, Call, calibrate, operations
from mmptq.calibration.blockwise import BlockResult, calibrate_block, sqnr_db
from mmptq.layers import GeluShift, QuantConv2d, QuantLinear, QuantMatMul, Rescale
from mmptq.methods import (
    BRECQ,
    AdaLog,
    AdaLogBRECQ,
    MinMax,
    UQViT,
    adaround,
    brecq,
    lsq,
)
from mmptq.quantizers import AdaLogQuantizer, Float, Quantizer, UniformQuantizer

from ..conftest import (
    FAST,
    SWIN,
    VIT,
    adalog,
    build_in,
    covering,
    equip,
    image,
    oracle_adalog,
    oracle_of,
    outputs_of,
    quantizable,
    quantizers_of,
    randomized,
    rescaled,
    uniform,
)

QUICK = dict(FAST, iterations=40, batch=2, weight_lr=0.2, scale_lr=1e-3)


class Toy(nn.Module):
    """A LayerNorm, a linear layer, GELU, another one, and the input added; as many
    tokens as there are.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1 = QuantLinear.from_float(nn.Linear(8, 12))
        self.fc2 = QuantLinear.from_float(nn.Linear(12, 8))
        self.fc1.rescale, self.fc2.rescale = Rescale(), GeluShift()
        equip(self.fc1, input=UniformQuantizer(3), weight=UniformQuantizer(3, axis=-2))
        equip(self.fc2, input=AdaLogQuantizer(3), weight=UniformQuantizer(3, axis=-2))

    def forward(self, x):
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def toy(seed=0, **options):
    """The block of a toy, and its options."""
    torch.manual_seed(1)
    module = randomized(Toy())
    calls = [
        Call(
            (
                torch.randn(
                    1, tokens, 8, generator=torch.Generator().manual_seed(tokens)
                ),
            )
        )
        for tokens in (40, 25, 60, 33)
    ]
    return Block('toy', module, calls, operations(module), seed), AdaLogBRECQ(
        **{**QUICK, **options}
    )


def unit(family, number, name='adalog_w4a4', images=2):
    """A block of a small real backbone."""
    backbone = quantizable(*family, name)
    name = find_spec(backbone).block_names(backbone)[number]
    module, seen = backbone.get_submodule(name), []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(Call(args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for seed in range(images):
            backbone(image(33 + 12 * seed, 40, seed))
    handle.remove()
    return Block(name, module, seen, operations(module, f'{name}.'))


SWIN_UNITS = [
    pytest.param(lambda number=number: unit(('mmdet', SWIN), number), id=name)
    for number, name in enumerate(['patch_embed', 'block', 'shifted', 'downsample'])
]


def searched(block):
    """A block after the first stage, its targets and its error."""
    targets = [brecq.tensors(output) for output in outputs_of(AdaLog(**FAST), block)]
    return block, targets, brecq.block_error(block, targets)


def weights_of(block):
    return {
        name: op.weight.detach().clone()
        for name, op in block.ops.items()
        if 'weight' in op.roles
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The whole.


@pytest.mark.parametrize(
    'make', [lambda: toy()[0], *SWIN_UNITS, lambda: unit(('mmseg', VIT), 1)]
)
def test_the_error_of_a_block_becomes_less(make):
    _, targets, before = searched(make())
    block = make()
    outputs = outputs_of(AdaLogBRECQ(**QUICK), block)
    for output, target in zip(outputs, targets, strict=True):
        assert all(
            torch.equal(*pair)
            for pair in zip(brecq.tensors(output), target, strict=True)
        )
    assert brecq.block_error(block, targets) < 0.99 * before
    assert block.float_parameters.keys() == {
        f'{name}.weight' for name in weights_of(block)
    }
    for op in block.ops.values():
        assert all(
            (quantizer.scale > 0).all() and torch.isfinite(quantizer.scale).all()
            for quantizer in op.quantizers().values()
        )


def test_rounding_and_scales_both_learn():
    _, targets, before = searched(toy()[0])
    errors = {}
    for name, options in (
        ('weights', dict(scale_lr=0)),
        ('scales', dict(weight_lr=0, scale_lr=1e-2)),
        ('both', {}),
    ):
        block, method = toy(**options)
        outputs_of(method, block)
        errors[name] = brecq.block_error(block, targets)
    assert errors['both'] < errors['weights'] < before and errors['scales'] < before


@pytest.mark.parametrize('make', [lambda: toy()[0], *SWIN_UNITS[::3]])
def test_weights_are_rounded_to_one_of_the_codes_beside_them(make):
    first, block = searched(make())[0], make()
    plain = weights_of(first)
    outputs_of(AdaLogBRECQ(**{**QUICK, 'weight_lr': 0.5}), block)
    changed = 0
    for name, op in block.ops.items():
        if 'weight' in op.roles:
            quantizer, other = (
                op.quantizer('weight'),
                first.ops[name].quantizer('weight'),
            )
            assert same(quantizer.params, other.params)
            rounded, before = (
                quantizer(adaround.as_read(op, op.weight)),
                adaround.as_read(op, plain[name]),
            )
            ends = (
                quantizer.scale * (end - quantizer.zero_point)
                for end in (0, quantizer.levels - 1)
            )
            error = (rounded - before.clamp(*ends)).abs() / quantizer.scale
            assert error.max() < 1.001
            changed += (error > 0.501).sum()
            kept = (adaround.as_read(op, op.weight) - rounded).abs() / quantizer.scale
            assert kept.max() < 0.451
            if not isinstance(adaround.op_rescale(op), Rescale):
                assert kept.max() < 1e-4
    assert changed > 10


def test_nothing_else_changes():
    first, (block, method) = searched(toy()[0])[0], toy()
    outputs_of(method, block)
    for (name, before), after in zip(
        first.module.state_dict().items(),
        block.module.state_dict().values(),
        strict=True,
    ):
        learned = name in (
            'fc1.weight',
            'fc2.weight',
            'fc1.input_quantizer.scale',
            'fc2.input_quantizer.scale',
        )
        assert torch.equal(before, after) != learned, name
    assert all(parameter.grad is None for parameter in block.module.parameters())
    assert all(
        not {'forward', 'correction'} & vars(module).keys()
        for module in block.module.modules()
    )


def test_probabilities_keep_their_scale():
    block = unit(('mmdet', SWIN), 1)
    outputs_of(AdaLogBRECQ(**QUICK), block)
    pv = next(op for name, op in block.ops.items() if name.endswith('pv'))
    assert pv.left_quantizer.scale == 1


@pytest.mark.parametrize('kind', ['tuple', 'dict'])
def test_outputs_of_any_form(kind):
    block, method = toy()
    plain = block.module
    forms = {
        'tuple': lambda y: (y, (3, 4), torch.arange(3)),
        'dict': lambda y: dict(a=[y], b=None, c=2 * y),
    }
    block.module = lambda x: forms[kind](plain(x))
    outputs = outputs_of(method, block)
    assert block.float_parameters and isinstance(
        outputs[0], dict if kind == 'dict' else tuple
    )
    assert [len(brecq.tensors(output)) for output in outputs] == [
        1 + (kind == 'dict')
    ] * 4


def test_where_outputs_hold_no_tensors_there_is_only_the_search():
    block, method = toy()
    first = searched(toy()[0])[0]
    plain = block.module
    block.module = lambda x: [str(plain(x).sum().item())]
    outputs_of(method, block)
    assert not block.float_parameters and same(block.state(), first.state())


def test_without_anything_to_learn_the_search_stands():
    op = equip(QuantLinear.from_float(nn.Linear(4, 3)), input=Float(), weight=Float())
    block = Block('float', op, [Call((torch.randn(5, 4),))], {'fc': op})
    targets = [brecq.tensors(output) for output in block.run_float()]
    assert (
        not brecq.reconstruct(block, targets, AdaLogBRECQ(**QUICK).reconstruction)
        and not block.float_parameters
    )


def test_products_alone_learn_their_scales():
    generator = torch.Generator().manual_seed(0)
    op = equip(
        QuantMatMul(), left=UniformQuantizer(3), right=UniformQuantizer(3, axis=-3)
    )
    calls = [
        Call(
            (
                torch.randn(3, 2, 9, 8, generator=generator),
                torch.randn(3, 2, 8, 9, generator=generator),
            )
        )
    ]
    block, targets, before = searched(Block('qk', op, calls, {'qk': op}))
    assert brecq.reconstruct(block, targets, AdaLogBRECQ(**QUICK).reconstruction)
    assert (
        brecq.block_error(block, targets) < before
        and op.right_quantizer.scale.shape == (2, 1, 1)
        and not block.float_parameters
    )


# What is worse is taken back.


def spoil(block, targets, options):
    for name, weight in weights_of(block).items():
        block.set_weight(name, 2 * weight)
    for op in block.ops.values():
        op.input_quantizer.set(
            **{**op.input_quantizer.params, 'scale': 3 * op.input_quantizer.scale}
        )
    return True


@pytest.mark.parametrize('worse', ['spoilt', 'diverged', 'unfinished', 'equal'])
def test_what_is_not_better_is_taken_back(worse, monkeypatch):
    first, (block, method) = searched(toy()[0])[0], toy()
    if worse == 'diverged':
        method = AdaLogBRECQ(**{**QUICK, 'iterations': 20})
        object.__setattr__(
            method.reconstruction, 'scale_lr', 1e37
        )  # more than may be asked for
    else:
        monkeypatch.setattr(
            brecq,
            'reconstruct',
            {
                'spoilt': spoil,
                'unfinished': lambda *args: spoil(*args) is None,
                'equal': lambda *args: True,
            }[worse],
        )
    outputs_of(method, block)
    assert (
        same(block.state(), first.state())
        and same(weights_of(block), weights_of(first))
        and not block.float_parameters
    )


@pytest.mark.parametrize('lr', [0.01, 10.0])
def test_scales_stay_positive_whatever_the_rate(lr):
    block, targets, _ = searched(toy()[0])
    before = {
        name: quantizer.scale for name, quantizer in quantizers_of(block.module).items()
    }
    assert brecq.reconstruct(
        block, targets, AdaLogBRECQ(**{**QUICK, 'scale_lr': lr}).reconstruction
    )
    for name, quantizer in quantizers_of(block.module).items():
        assert (quantizer.scale >= 0.0099 * before[name]).all()


# Rounding.


def rounding_of(op, generator):
    """The rounding of an operation's weight, at random."""
    rounding = adaround.Rounding(op, op.quantizer('weight'))
    with torch.no_grad():
        rounding.logits.copy_(torch.randn(rounding.logits.shape, generator=generator))
    return rounding


def name_of(op):
    return (
        f'{op.kind} {type(getattr(op, "rescale", None)).__name__}'
        f' {op.weight_quantizer.axis}'
    )


def kinds():
    torch.manual_seed(0)
    for axis in (-2, None):
        for cls in (None, Rescale, GeluShift):
            op = rescaled(nn.Linear(64, 6), cls)
            yield equip(
                op,
                input=uniform(-1, 2),
                weight=covering(adaround.as_read(op, op.weight), 4, axis),
            )
    conv = QuantConv2d.from_float(nn.Conv2d(3, 5, 2))
    yield equip(conv, weight=covering(conv.weight, 3, -4))
    yield equip(
        conv, weight=uniform([-0.1] * 5, [0.05] * 5, 2, -4)
    )  # most of the weight is cut


@pytest.mark.parametrize('op', kinds(), ids=name_of)
def test_the_weight_that_is_kept_rounds_as_was_learned(op):
    generator = torch.Generator().manual_seed(0)
    weight, quantizer = op.weight.detach().clone(), op.quantizer('weight')
    correction = (
        op.rescale.correction(op.weight)
        if isinstance(op, QuantLinear) and op.rescale
        else None
    )
    read = adaround.as_read(op, weight).detach()
    rounding = rounding_of(op, generator)
    rounding.soft = rounding.values = quantizer.decode(
        rounding.decided(), **quantizer.params
    )
    learned = [
        function(op.weight)
        for _, name, function in rounding.stand_ins()
        if name == 'correction'
    ]
    below = torch.floor(read * quantizer.scale.reciprocal())
    expected = (below + (rounding.logits >= 0) + quantizer.zero_point).clamp(
        0, quantizer.levels - 1
    )
    assert torch.equal(rounding.decided(), expected.to(torch.int16))
    Block('layer', op, [], {'layer': op}).set_weight('layer', rounding.weight())
    kept_codes = quantizer.encode(adaround.as_read(op, op.weight), **quantizer.params)
    assert rounding.is_kept() and torch.equal(kept_codes, expected.to(torch.int16))
    assert quantizer.levels < 16 or (op.weight != weight).all()
    if correction is not None:
        kept = op.rescale.correction(op.weight)
        torch.testing.assert_close(kept, learned[0], rtol=1e-4, atol=1e-4)
        assert (
            (kept - correction).abs() < 1e-4
        ).sum() >= 5  # one row is at the ends of its cells


def test_a_correction_that_the_cells_cannot_hold_is_learned_as_it_will_be():
    """A shift of one channel, whose weight is rounded up by more than half a step."""
    op = rescaled(nn.Linear(4, 3), Rescale)
    op.rescale.set(scale=torch.ones(4), shift=torch.tensor([0.0, 2.0, 0.0, 0.0]))
    with torch.no_grad():
        op.weight.copy_(
            torch.tensor(
                [[0.0, 1.2, 2.0, 3.0], [0.0, 1.6, 2.0, 3.0], [0.0, 1.2, 2.0, 3.0]]
            )
        )
    equip(op, input=uniform(0, 3), weight=uniform([0.0] * 3, [3.0] * 3, 2, -2))
    rounding = rounding_of(op, torch.Generator())
    with torch.no_grad():
        rounding.logits.copy_(torch.tensor([40.0, 40.0, -40.0])[:, None].expand(-1, 4))
    rounding.refresh()
    (_, _, _), (_, _, correction) = rounding.stand_ins()
    learned, before = (
        correction(op.weight).detach(),
        op.rescale.correction(op.weight).detach(),
    )
    Block('layer', op, [], {'layer': op}).set_weight('layer', rounding.weight())
    torch.testing.assert_close(op.rescale.correction(op.weight), learned)
    torch.testing.assert_close(
        learned - before, torch.tensor([0.7, 0, 0])
    )  # 2 (2 - 0.45 - 1.2)
    assert rounding.is_kept()


def test_a_rounding_starts_where_the_weight_is():
    torch.manual_seed(0)
    op = equip(
        QuantLinear.from_float(nn.Linear(16, 6)),
        weight=covering(torch.randn(6, 16), 4, -2),
    )
    quantizer = op.quantizer('weight')
    rounding = adaround.Rounding(op, quantizer)
    rounding.refresh()
    ends = (
        quantizer.scale * (end - quantizer.zero_point)
        for end in (0, quantizer.levels - 1)
    )
    torch.testing.assert_close(
        rounding.values.detach(), op.weight.detach().clamp(*ends), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(
        rounding.decided(), quantizer.encode(op.weight, **quantizer.params)
    )


def test_a_decided_rounding_costs_nothing():
    op = equip(
        QuantLinear.from_float(nn.Linear(4, 3)),
        weight=covering(torch.randn(3, 4), 4, -2),
    )
    rounding = adaround.Rounding(op, op.quantizer('weight'))
    for value, cost in ((10.0, 0), (-10.0, 0), (0.0, 12)):
        with torch.no_grad():
            rounding.logits.fill_(value)
        assert rounding.penalty(2).item() == cost and set(
            rounding.up().flatten().tolist()
        ) == {0.5 + 0.05 * value}
    with torch.no_grad():
        rounding.logits.fill_(0.5)
    assert rounding.penalty(20).item() > rounding.penalty(2).item()


def test_the_penalty_decides_every_rounding():
    undecided, weight = {}, adaround.Rounding.weight
    for warmup in (0.2, 1):
        block, targets, _ = searched(toy()[0])
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                adaround.Rounding,
                'weight',
                lambda self, seen=seen: seen.append(self.up().detach()) or weight(self),
            )
            brecq.reconstruct(
                block,
                targets,
                BRECQ(
                    iterations=150, batch=2, weight_lr=0.1, scale_lr=1e-3, warmup=warmup
                ),
            )
        undecided[warmup] = np.mean(
            [((up > 0.01) & (up < 0.99)).float().mean() for up in seen]
        )
    assert undecided[0.2] < 0.05 < 0.2 < undecided[1]


def test_the_exponent_falls_from_20_to_2_after_the_warm_up():
    options = BRECQ(iterations=1000)
    found = [brecq.beta_at(step, options) for step in (0, 199, 200, 600, 1000)]
    assert found == [None, None, 20, pytest.approx(11), pytest.approx(2)]
    assert (
        brecq.beta_at(999, BRECQ(iterations=1000, warmup=1)) is None
        and brecq.beta_at(0, BRECQ(warmup=0)) == 20
    )


# Activations.


class Learner(brecq.Learned):
    """What is learned of a single quantizer of an activation."""

    def __init__(self, quantizer):
        super().__init__(Block('none', None, [], {}))
        self.activations.append(lsq.Activation(quantizer))


def inputs_of(quantizer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 50, 7, generator=generator)
    return (
        x.abs() * torch.exp2(-6 * torch.rand(x.shape, generator=generator))
        if isinstance(quantizer, AdaLogQuantizer)
        else x
    )


@pytest.mark.parametrize(
    'quantizer',
    [
        *(
            adalog(bits, q, scale)
            for bits, q in ((3, 11), (4, 25), (6, 37), (8, 13))
            for scale in (1.0, 0.77)
        ),
        adalog(4, 18.5, 0.5, strict=True),
        uniform(-1, 2, 4),
        uniform([-1, -2], [0.5, 2], 3, -3),
    ],
    ids=str,
)
def test_the_forward_is_what_the_quantizer_decodes(quantizer):
    """Bit by bit, AdaLog's rounded table included, at scales that are not those of the
    search.
    """
    x = inputs_of(quantizer)
    learned = Learner(quantizer)
    (activation,) = learned.activations
    for factor in (1, 0.9, 1.3):
        with torch.no_grad():
            activation.scale.mul_(factor)
        params = {**quantizer.params, 'scale': activation.scale.detach()}
        with learned.in_place():
            y, shifted = (
                quantizer(x.clone().requires_grad_()),
                quantizer(x, lambda x: x / 2),
            )
        assert y.requires_grad and torch.equal(
            y.detach(), quantizer.decode(quantizer.encode(x, **params), **params)
        )
        assert torch.equal(
            shifted.detach(),
            quantizer.decode(quantizer.encode(x / 2, **params), **params),
        )
    if isinstance(
        quantizer, AdaLogQuantizer
    ):  # the equations, apart from values at the edge of a cell
        scale = float(activation.scale.detach())
        expected = oracle_adalog(
            x.numpy(),
            float(quantizer.q),
            quantizer.bits,
            scale=scale,
            strict=quantizer.strict,
        )
        with learned.in_place():
            assert np.mean(quantizer(x).detach().numpy() != expected) < 0.001


def test_the_block_in_training_is_the_block_that_is_kept():
    """With decided roundings, the outputs that are differentiated are those of the
    ordinary forward afterwards.
    """
    block, _, _ = searched(toy()[0])
    learned = brecq.Learned(block)
    with torch.no_grad():
        for rounding in learned.roundings.values():
            rounding.logits.copy_(
                40
                * torch.randn(
                    rounding.logits.shape, generator=torch.Generator().manual_seed(3)
                ).sign()
            )
            rounding.refresh()
        for scale in learned.scales:
            scale *= 1.07
    with learned.in_place():
        trained = block.run()
    assert learned.finish(block)
    for a, b in zip(trained, block.run(), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_the_gradient_of_a_uniform_quantizer_by_hand():
    quantizer = uniform(-1, 2, 2)  # s = 1, codes -1 to 2
    x = torch.tensor([-3.0, -1.2, 0.4, 1.7, 2.4, 9.0], requires_grad=True)
    scale = quantizer.scale.clone().requires_grad_()
    y = lsq.StraightThrough.apply(x, scale, quantizer)
    assert y.tolist() == [-1, -1, 0, 2, 2, 2]
    for index, (by_x, by_scale) in enumerate(
        ((0, -1), (1, 0.2), (1, -0.4), (1, 0.3), (1, -0.4), (0, 2))
    ):
        gradients = torch.autograd.grad(y[index], (x, scale), retain_graph=True)
        assert (
            gradients[0][index] == by_x
            and gradients[0].sum() == by_x
            and gradients[1].item() == pytest.approx(by_scale, abs=1e-6)
        )


def test_the_gradient_of_adalog_by_hand():
    quantizer = adalog(4, 37, 2.0)
    x = torch.tensor([-0.1, 0.0, 1e-9, 0.9, 1.7, 2.5], requires_grad=True)
    scale = quantizer.scale.clone().requires_grad_()
    y = lsq.StraightThrough.apply(x, scale, quantizer)
    assert y.tolist() == [0, 0, 0, 1, 2, 2]
    for index, (by_x, by_scale) in enumerate(
        ((0, 0), (1, 0), (1, 0), (1, 0.05), (1, 0.15), (0, 1))
    ):
        gradients = torch.autograd.grad(y[index], (x, scale), retain_graph=True)
        assert gradients[0][index] == by_x and gradients[1].item() == pytest.approx(
            by_scale, abs=1e-6
        )


def test_scales_of_heads_have_gradients_of_their_own():
    quantizer = uniform([-1, -1], [1, 1], 3, -3)
    scale = quantizer.scale.clone().requires_grad_()
    x = torch.randn(4, 2, 5, 6)
    lsq.StraightThrough.apply(x, scale, quantizer)[:, 1].sum().backward()
    assert scale.grad.shape == (2, 1, 1) and scale.grad[0] == 0 and scale.grad[1] != 0


class Halves(Quantizer):
    """Rounds to halves; a stranger without parameters."""

    param_names = ()

    def forward(self, x, before=None):
        return ((before(x) if before else x).detach() * 2).round() / 2


def test_quantizers_without_a_scale_pass_the_gradient():
    for quantizer in (Halves(4), Float(8)):
        learned = Learner(quantizer)
        x = torch.randn(5, 3, requires_grad=True)
        with learned.in_place():
            y = quantizer(x)
        y.sum().backward()
        assert (
            not learned.scales
            and torch.equal(y, Halves(4)(x) if quantizer.bits == 4 else x)
            and (x.grad == 1).all()
        )


@pytest.mark.parametrize(
    'make', [lambda: toy()[0], *SWIN_UNITS, lambda: unit(('mmseg', VIT), 1)]
)
def test_gradients_reach_every_weight_and_scale(make):
    block, targets, _ = searched(make())
    learned = brecq.Learned(block)
    assert len(learned.logits) == len(weights_of(block)) and len(learned.scales) >= len(
        learned.logits
    )
    with learned.in_place():
        brecq.differentiate(block, targets, [1], learned, None)
    assert all(
        torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
        for x in [*learned.logits, *learned.scales]
    )
    assert all(
        parameter.grad is None
        for op in block.ops.values()
        for parameter in op.parameters()
    )


def test_a_batch_is_a_mean_over_tokens():
    """The gradient over two calls is that of the whole in one, and does not depend on
    the number of tokens.
    """
    gradients = []
    for lengths in ([60, 25], [85]):
        block, targets, _ = searched(toy()[0])
        x = torch.cat(
            [call.args[0] for call in block.calls[2:0:-1]], 1
        )  # 60 and 25 tokens
        block.calls = [Call((part,)) for part in x.split(lengths, 1)]
        y = torch.cat([target[0] for target in targets[2:0:-1]], 1)
        learned = brecq.Learned(block)
        with learned.in_place():
            brecq.differentiate(
                block,
                [[part] for part in y.split(lengths, 1)],
                list(range(len(lengths))),
                learned,
                None,
            )
        gradients.append([x.grad for x in [*learned.logits, *learned.scales]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Seeds.


def test_the_seed_of_the_block_decides_and_nothing_else():
    states = {}
    for name, seed, world in (('first', 0, 5), ('again', 0, 6), ('other', 1, 5)):
        block, method = toy(seed=seed)
        torch.manual_seed(world)
        before = torch.get_rng_state()
        outputs_of(method, block)
        assert torch.equal(before, torch.get_rng_state())
        states[name] = block.state()
    assert same(states['first'], states['again']) and not same(
        states['first'], states['other']
    )


def test_it_does_not_matter_whether_gradients_are_on():
    (plain, method), (within, _) = toy(), toy()
    outputs_of(method, plain)
    with torch.no_grad():
        outputs_of(method, within)
    assert same(plain.state(), within.state())


# Interrupted runs.


def reloaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_holds_the_weights_that_changed():
    (block, method), (fresh, _) = toy(), toy()
    floats = weights_of(fresh)
    result, outputs = calibrate_block(block, method)
    assert {'fc1.weight', 'fc2.weight', 'fc1.rescale.scale'} <= result.params.keys()
    assert same(
        block.float_parameters,
        {f'{name}.weight': value for name, value in floats.items()},
    )
    done = BlockResult(**reloaded(vars(result)))
    _, again = calibrate_block(fresh, method, done)
    assert all(
        torch.equal(*pair) for pair in zip(outputs, again, strict=True)
    ) and same(fresh.state(), block.state())
    assert same(fresh.module.state_dict(), block.module.state_dict())
    assert all(
        torch.equal(*pair) for pair in zip(fresh.run(), block.run(), strict=True)
    )
    fresh.restore_parameters()
    assert same(weights_of(fresh), floats) and not any(
        key.endswith('.weight') for key in fresh.state()
    )


def test_a_search_alone_stores_no_weights():
    block, _, _ = searched(toy()[0])
    assert not any(key.endswith('.weight') for key in block.state())


def test_signal_to_noise_is_against_the_float_weights():
    block, method = toy()
    result, _ = calibrate_block(block, method)
    for name, op in block.ops.items():
        (x,), counts = block.samples[name][0], block.counts[name]
        own = sqnr_db(op, block.samples[name], counts)
        with torch.no_grad():
            target = nn.functional.linear(
                x, block.float_parameters[f'{name}.weight'], op.bias
            )
            signal, noise = (
                (y.double().square().sum(1) @ counts.double()).item()
                for y in (target, op(x) - target)
            )
        assert (
            result.sqnr_db[name]
            == pytest.approx(10 * math.log10(signal / noise), abs=0.01)
            and result.sqnr_db[name] < own - 0.1
        )


def names_of(backbone):
    return find_spec(backbone).block_names(backbone)


def run(family, method, **options):
    backbone = quantizable(*family)
    inputs = [Call((image(33, 40, seed=1),)), Call((image(40, 33, seed=2),))]
    return backbone, calibrate(backbone, names_of(backbone), inputs, method, **options)


@pytest.mark.parametrize('propagate', [False, True])
@pytest.mark.parametrize(
    'family', [('mmdet', SWIN), ('mmseg', VIT)], ids=['swin', 'vit']
)
def test_a_resumed_run_is_the_whole_run(family, propagate):
    method = AdaLogBRECQ(**{**QUICK, 'iterations': 20}, propagate_error=propagate)
    whole, results = run(family, method)
    assert any(key.endswith('.weight') for result in results for key in result.params)
    for count in (2, len(results)):
        done = {
            result.name: BlockResult(**reloaded(vars(result)))
            for result in results[:count]
        }
        resumed, again = run(family, method, done=done)
        assert same(whole.state_dict(), resumed.state_dict())
        assert all(
            same(a.params, b.params) and a.sqnr_db == b.sqnr_db
            for a, b in zip(results, again, strict=True)
        )
    fresh = quantizable(*family)
    fresh.load_state_dict(whole.state_dict(), strict=True)
    with torch.no_grad():
        assert all(
            torch.equal(*pair)
            for pair in zip(fresh(image(33, 40)), whole(image(33, 40)), strict=True)
        )


@pytest.mark.parametrize('propagate', [False, True])
def test_blocks_are_reconstructed_towards_the_float_model(propagate):
    """Through the whole backbone, on the calibration images."""
    family = ('mmdet', SWIN)
    call = image(33, 40, seed=1)
    outputs = {}
    for name, method in (
        ('search', AdaLog(**FAST, propagate_error=propagate)),
        ('both', AdaLogBRECQ(**{**QUICK, 'iterations': 60}, propagate_error=propagate)),
    ):
        with torch.no_grad():
            outputs[name] = run(family, method)[0](call)
    with torch.no_grad():
        plain = randomized_float(family)(call)
    errors = {
        name: sum(
            (x - y).square().sum().item() for x, y in zip(found, plain, strict=True)
        )
        for name, found in outputs.items()
    }
    assert errors['both'] < errors['search']


def randomized_float(family):
    torch.manual_seed(0)
    return randomized(build_in(*family))


# The recipe.


def test_the_recipe():
    raw = load_recipe('adalog_w4a4_brecq')
    loaded = Recipe.from_dict(raw)
    method, plain = loaded.build_method(), Recipe.from_dict(load_recipe('adalog_w4a4'))
    assert (
        type(method) is AdaLogBRECQ
        and loaded.name == 'adalog_w4a4_brecq'
        and loaded.quantizers == plain.quantizers
    )
    search, learning = method.stages()
    assert (
        learning.iterations,
        learning.batch,
        learning.weight_lr,
        learning.scale_lr,
    ) == (
        20000,
        32,
        1e-3,
        4e-5,
    )  # the paper's
    searching = {
        field.name: getattr(plain.build_method(), field.name)
        for field in dataclasses.fields(AdaLog)
    }
    assert {name: getattr(search, name) for name in searching} == searching


def test_the_recipe_runs():
    raw = load_recipe('adalog_w3a3_brecq')
    raw['method'].update(QUICK)
    block = unit(('mmseg', VIT), 1, raw)
    outputs_of(Recipe.from_dict(raw).build_method(), block)
    assert (
        block.float_parameters
        and block.ops['layers.0.ffn.layers.1'].quantizer('input').bits == 3
    )


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('iterations', 0),
        ('batch', 0),
        ('weight_lr', -1e-3),
        ('scale_lr', math.nan),
        ('weight_lr', math.inf),
        ('warmup', 1.5),
        ('warmup', -0.1),
        ('rounds', 0),
        ('weight_lr', 1e3),
        ('scale_lr', 1e30),
        ('weight_lr', '1e-3'),
        ('scale_lr', True),
        ('weight_lr', None),
        ('warmup', math.nan),
        ('warmup', True),
        ('warmup', '0.2'),
    ],
)
def test_options_that_make_no_sense_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        AdaLogBRECQ(**{option: value})


def test_codes_in_the_end_by_the_equations():
    block, method = toy()
    outputs_of(method, block)
    for op in block.ops.values():
        read = adaround.as_read(op, op.weight).detach()
        assert np.array_equal(
            oracle_of(op.weight_quantizer, read.numpy()),
            op.weight_quantizer(read).numpy(),
        )


# A stage of its own.

LEARNING = BRECQ(
    **{name: QUICK[name] for name in ('iterations', 'batch', 'weight_lr', 'scale_lr')}
)


def uniform_toy(seed=0):
    """A toy for methods whose ranges are uniform."""
    block, _ = toy(seed)
    equip(
        block.module.fc2, input=UniformQuantizer(3), weight=UniformQuantizer(3, axis=-2)
    )
    return block


@pytest.mark.parametrize(
    'first', [UQViT(rows=64), MinMax()], ids=lambda stage: type(stage).__name__
)
def test_it_improves_what_another_method_found(first):
    plain, both = uniform_toy(), uniform_toy()
    if isinstance(first, MinMax):
        for block in (plain, both):
            block.module.fc1.rescale = block.module.fc2.rescale = None
    targets = [brecq.tensors(output) for output in outputs_of(first, plain)]
    again = outputs_of([first, LEARNING], both)
    assert all(
        torch.equal(output, target[0])
        for output, target in zip(again, targets, strict=True)
    )
    assert brecq.block_error(both, targets) < 0.99 * brecq.block_error(plain, targets)
    assert both.float_parameters.keys() == {'fc1.weight', 'fc2.weight'}


def test_what_does_not_improve_another_method_is_taken_back(monkeypatch):
    plain, both = uniform_toy(), uniform_toy()
    outputs_of(UQViT(rows=64), plain)
    monkeypatch.setattr(brecq, 'reconstruct', spoil)
    outputs_of([UQViT(rows=64), LEARNING], both)
    assert (
        same(both.state(), plain.state())
        and same(weights_of(both), weights_of(plain))
        and not both.float_parameters
    )


def test_two_stages_are_what_their_short_name_stands_for():
    block, method = toy()
    outputs_of(method, block)
    other, _ = toy()
    outputs_of([AdaLog(**FAST), LEARNING], other)
    assert (
        same(block.state(), other.state())
        and block.float_parameters.keys() == other.float_parameters.keys()
    )
