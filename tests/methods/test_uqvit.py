"""UQ-ViT: the greedy block search beside one that computes everything anew, and inputs
at the edge.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import mmptq.methods.uqvit as uqvit
from mmptq import QuantizationError
from mmptq.apis import load_recipe
from mmptq.backbones import find_spec
from mmptq.calibration import Block, Call, calibrate, operations
from mmptq.checkpoints.reading import is_calibrated
from mmptq.layers import QuantLinear, QuantMatMul, Rescale
from mmptq.methods import UQViT
from mmptq.quantizers import (
    AdaLogQuantizer,
    DeMaxQuantizer,
    UniformQuantizer,
    calibrated_parts,
)

from ..conftest import (
    VIT,
    equip,
    image,
    oracle_of,
    oracle_uniform,
    outputs_of,
    quantizable,
)

SMALL = dict(rows=64)


def calls(*sizes):
    return [Call((image(*size, seed=seed),)) for seed, size in enumerate(sizes)]


def calibrated(family, name='uqvit_w4a4', method=None, inputs=None):
    backbone = quantizable(*family, name)
    names = find_spec(backbone).block_names(backbone)
    return backbone, calibrate(
        backbone, names, inputs or calls((45, 57), (32, 70)), method or UQViT(**SMALL)
    )


def rescaled_linear(site, in_features=6, out_features=5, bits=4, seed=0):
    torch.manual_seed(seed)
    op = equip(
        QuantLinear.from_float(nn.Linear(in_features, out_features)),
        input=UniformQuantizer(bits),
        weight=UniformQuantizer(bits, axis=-2),
    )
    op.sites = {'input': site, 'weight': 'weight'}
    op.rescale = Rescale()
    return op


class Anew:
    """A block that is computed anew each time."""

    def __init__(self, module, first):
        self.run = module


@contextmanager
def anew(module, first):
    yield Anew(module, first)


def test_the_replay_changes_nothing(family, monkeypatch):
    states = []
    for patched in (False, True):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(uqvit, 'replayed', anew)
            results = calibrated(family)[1]
            states.append(
                {
                    key: value
                    for result in results
                    for key, value in result.params.items()
                }
            )
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items()
    )


def test_everything_is_calibrated_and_uniform(family):
    backbone, results = calibrated(family)
    assert is_calibrated(backbone) and all(
        np.isfinite(value) for result in results for value in result.sqnr_db.values()
    )
    kinds = {
        key.rpartition('.')[2]: type(part)
        for key, part in calibrated_parts(backbone).items()
        if not key.endswith('left_quantizer')
    }
    assert kinds == {
        'input_quantizer': UniformQuantizer,
        'weight_quantizer': UniformQuantizer,
        'rescale': Rescale,
        'right_quantizer': UniformQuantizer,
    }
    lefts = {
        type(op.quantizer('left'))
        for op in operations(backbone).values()
        if isinstance(op, QuantMatMul)
    }
    assert lefts == {UniformQuantizer, DeMaxQuantizer}
    assert all(
        quantizer.uniform
        for op in operations(backbone).values()
        for quantizer in op.quantizers().values()
    )
    with torch.no_grad():
        assert all(torch.isfinite(x).all() for x in backbone(image(50, 41)))


def test_repqvit_is_alpha_zero_and_log_sqrt2(family):
    backbone, _ = calibrated(
        family, 'repqvit_w4a4', UQViT(alphas=[0.0], plain_alphas=[None], **SMALL)
    )
    for name, op in operations(backbone).items():
        if isinstance(op, QuantLinear):
            assert (op.rescale is not None) == (op.sites['input'] == 'post_norm'), name
        elif isinstance(op, QuantMatMul) and op.sites['left'] == 'post_softmax':
            assert (
                isinstance(op.quantizer('left'), AdaLogQuantizer)
                and op.quantizer('left').q == 18.5
                and op.quantizer('left').scale == 1
            )


def test_groups_are_searched_in_order_with_probabilities_float_for_the_first(
    family, monkeypatch
):
    seen = []

    def errors(block, op, candidates, targets, images):
        name = next(key for key, other in block.ops.items() if other is op)
        floats = [
            key for key, other in block.ops.items() if 'forward' in other.__dict__
        ]
        pv = next(
            (
                other.quantizer('left')
                for other in block.ops.values()
                if other.sites.get('left') == 'post_softmax'
            ),
            None,
        )
        seen.append(
            (name, len(candidates), floats, pv is not None and 'forward' in pv.__dict__)
        )
        return torch.arange(len(candidates), dtype=torch.float64)

    monkeypatch.setattr(uqvit, 'output_errors', errors)
    backbone, _ = calibrated(family)
    blocks = {}
    for name, count, floats, passed in seen:
        blocks.setdefault(
            next(
                block
                for block in find_spec(backbone).block_names(backbone)
                if name.startswith(f'{block}.')
            ),
            [],
        ).append((name, count, floats, passed))
    for searched in blocks.values():
        if len(searched) == 1:  # patch merging
            assert searched[0][1:] == (6, [], False)
            continue
        proj, fc1, fc2 = (one[0] for one in searched[1:])
        assert [one[1] for one in searched] == [6, 12, 6, 12]
        assert [set(one[2]) for one in searched] == [
            {proj, fc1, fc2},
            {fc1, fc2},
            {fc2},
            set(),
        ]
        assert [one[3] for one in searched] == [True, False, False, False]


def test_a_candidate_leaves_the_race_when_it_is_surely_worse():
    errors = torch.tensor(
        [[1, 2, 3, 4.0], [1.5, 2.5, 3.4, 4.6], [2, 1, 4, 3.5], [1, 2, 3, 4.001]],
        dtype=torch.float64,
    )
    # differences: none; 0.5, 0.5, 0.4, 0.6: 0.5 with standard error 0.041; 0.125 with
    # 0.52; 0.00025 with 0.00025
    assert uqvit.in_the_race(errors, 3) == [0, 2, 3]
    assert uqvit.in_the_race(errors, 0.9) == [0, 2]
    assert (
        uqvit.in_the_race(errors, 13)
        == uqvit.in_the_race(errors, float('inf'))
        == [0, 1, 2, 3]
    )
    assert uqvit.in_the_race(errors[:, :3], 0.5) == [0, 1, 2, 3]  # too few calls


@torch.no_grad()
def test_the_error_is_that_of_the_blocks_output():
    """A block that is one layer and a residual, by the equations; a race ends with the
    same alpha.
    """

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = rescaled_linear('post_gelu')
            self.fc2 = nn.Linear(5, 6)

        def forward(self, x):
            return x + self.fc2(self.fc(x))

    module = Residual()
    generator = torch.Generator().manual_seed(1)
    inputs = [
        Call(
            (
                torch.randn(7, 6, generator=generator)
                * torch.tensor([1, 1, 9, 1, 1, 0.1]),
            )
        )
        for _ in range(12)
    ]
    block = Block('block', module, inputs, {'fc': module.fc})
    targets = block.observe(UQViT().rows)
    candidates = UQViT()._candidates(
        module.fc, block.samples['fc'][0][0], block.counts['fc']
    )
    assert len(candidates) == 12
    for images, counted in (
        (2, [inputs[0], inputs[6]]),
        (1, inputs[:1]),
        (20, inputs),
        (None, inputs),
    ):
        errors = uqvit.output_errors(
            block, module.fc, candidates, targets, images, sure=float('inf')
        )
        for candidate, error in zip(candidates, errors, strict=True):
            r, w = (
                candidate.rescale['scale'].double().numpy(),
                module.fc.weight.double().numpy(),
            )
            wq = oracle_uniform(
                (module.fc.weight * candidate.rescale['scale']).numpy(),
                candidate.weight['scale'].numpy(),
                candidate.weight['zero_point'].numpy(),
                4,
            )
            total = 0
            for call in counted:
                x = call.args[0].double().numpy()
                xq = oracle_uniform(
                    (call.args[0] / candidate.rescale['scale']).numpy(),
                    candidate.input['scale'].numpy(),
                    candidate.input['zero_point'].numpy(),
                    4,
                )
                total += (
                    ((xq @ wq.T - x @ w.T) @ module.fc2.weight.double().numpy().T) ** 2
                ).sum()
            assert float(error) == pytest.approx(total, rel=1e-3) and (r >= 1).all()
    raced = uqvit.output_errors(block, module.fc, candidates, targets, None)
    left = raced.isinf()
    assert left.any() and raced.argmin() == errors.argmin()
    assert (raced[~left] <= errors[~left]).all()  # a race of one is over
    outputs_of(UQViT(), block)
    best = int(errors.argmin())  # on all images
    assert torch.equal(module.fc.rescale.scale, candidates[best].rescale['scale'])
    assert torch.equal(
        module.fc.weight_quantizer(module.fc.weight * module.fc.rescale.scale),
        candidates[best].rounded,
    )


@pytest.mark.parametrize('bits', [3, 6, 8])
@torch.no_grad()
def test_the_largest_magnitudes_are_of_the_quantized_input_but_at_6_bits(bits):
    op = rescaled_linear('post_gelu', bits=bits)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 0.3
    channels = uqvit.least_error(op.input_quantizer, x.t())
    expected = (
        x.abs().amax(0)
        if bits == 6
        else torch.stack(
            [
                torch.as_tensor(
                    oracle_uniform(
                        x[:, j].numpy(),
                        channels['scale'][j].numpy(),
                        channels['zero_point'][j].numpy(),
                        bits,
                    )
                )
                .abs()
                .max()
                for j in range(6)
            ]
        )
    )
    torch.testing.assert_close(
        uqvit.largest_magnitudes(op.input_quantizer, channels, x), expected
    )


@torch.no_grad()
def test_a_few_large_channels_are_worth_an_alpha():
    op = rescaled_linear('post_gelu', 32, 16)
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(3))
    x[:, :3] *= 30
    errors = {}
    for alphas in ([None], list(UQViT.plain_alphas)):
        for part in calibrated_parts(op).values():
            part.clear()
        outputs_of(
            UQViT(plain_alphas=alphas), Block('layer', op, [Call((x,))], {'layer': op})
        )
        errors[len(alphas)] = float((op(x) - op.float_forward(x)).square().sum())
    assert errors[12] < 0.7 * errors[1]


EDGES = {
    'zero': lambda x: x * 0,
    'constant': lambda x: x * 0 + 0.7,
    'negative': lambda x: -x.abs() - 0.1,
    'dead channels': lambda x: x * torch.tensor([0, 1, 0, 1, 0, 1.0]),
    'constant channels': lambda x: torch.cat([x[:, :3], x[:, 3:] * 0 - 2], 1),
    'one large token': lambda x: torch.cat([x[:1] * 1e6, x[1:]]),
    'tiny': lambda x: x * 1e-20,
    'one token': lambda x: x[:1],
}


@pytest.mark.parametrize('site', ['post_norm', 'post_attention', 'post_gelu'])
@pytest.mark.parametrize('edge', EDGES)
@pytest.mark.parametrize('weight', ['random', 'zero', 'zero column'])
@torch.no_grad()
def test_r_is_finite_and_positive_whatever_comes(site, edge, weight):
    op = rescaled_linear(site)
    if weight != 'random':
        op.weight[:, 0 if weight == 'zero column' else slice(None)] = 0
    x = EDGES[edge](torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    outputs_of(
        UQViT(alphas=[0, 0.25, 1], plain_alphas=[0, 0.5, 1]),
        Block('layer', op, [Call((x,))], {'layer': op}),
    )
    assert (
        torch.isfinite(op.rescale.scale).all()
        and (op.rescale.scale > 0).all()
        and torch.isfinite(op.rescale.shift).all()
    )
    assert torch.isfinite(op(x)).all()
    if edge in ('zero', 'dead channels') and site == 'post_norm':
        torch.testing.assert_close(op.rescale.scale[0], torch.tensor(1.0))
    if edge == 'zero':
        torch.testing.assert_close(op(x), op.float_forward(x))


def test_a_block_without_tensors_as_outputs_cannot_compare_alphas():
    """Heads give boxes and masks in objects of their own."""
    op, x = rescaled_linear('linear'), torch.randn(40, 6)
    block = Block(
        'heads', lambda batch: [str(op(batch))], [Call((x,))], {'heads.fc': op}
    )
    with pytest.raises(
        QuantizationError,
        match=(
            r'^heads\.fc: alphas .* heads give no tensors; drop .* rescale .* site'
            r' linear'
        ),
    ):
        outputs_of(UQViT(**SMALL), block)


def test_masked_rows_and_single_entries_of_attention_are_exact():
    op = equip(
        QuantMatMul(), left=DeMaxQuantizer(4), right=UniformQuantizer(4, axis=-3)
    )
    op.sites = {'left': 'post_softmax', 'right': 'value'}
    scores = torch.randn(
        2, 2, 5, 5, generator=torch.Generator().manual_seed(0)
    ).softmax(-1)
    scores[:, :, [0, 4]] = 0
    scores[:, :, 3] = torch.eye(5)[2]
    values = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    outputs_of(UQViT(), Block('pv', op, [Call((scores, values))], {'pv': op}))
    p = op.left_quantizer(scores)
    assert torch.equal(p[:, :, [0, 3, 4]], scores[:, :, [0, 3, 4]]) and not torch.equal(
        p, scores
    )
    expected = p.double().numpy() @ oracle_of(
        op.right_quantizer, values.numpy()
    ).astype(float)
    np.testing.assert_allclose(op(scores, values).detach().numpy(), expected, atol=1e-5)
    assert op.left_quantizer.effective_bits == pytest.approx(4 + (2 * 32 + 3) / 5)


@pytest.mark.parametrize(
    'name', ['uqvit_w3a3', 'uqvit_w8a8', 'uqvit_w4a4_fast', 'uqvit_w2a2']
)
def test_bits_and_recipes(name):
    method = {
        key: value
        for key, value in load_recipe(name)['method'].items()
        if key != 'type'
    }
    backbone, _ = calibrated(('mmseg', VIT), name, UQViT(**{**method, 'rows': 64}))
    assert is_calibrated(backbone)


def test_one_image_and_images_of_other_shapes(family):
    for inputs in (calls((33, 40)), calls((33, 40), (64, 31), (20, 90))):
        backbone, _ = calibrated(family, inputs=inputs, method=UQViT(images=2, **SMALL))
        assert is_calibrated(backbone)


def test_results_are_repeatable_and_taken_up_again(family):
    first, again = (calibrated(family)[1] for _ in range(2))
    backbone = quantizable(*family, 'uqvit_w4a4')
    names = find_spec(backbone).block_names(backbone)
    inputs = calls((45, 57), (32, 70))
    rest = calibrate(
        backbone,
        names,
        inputs,
        UQViT(**SMALL),
        done={result.name: result for result in first[:2]},
    )
    for results in (again, rest):
        assert all(
            torch.equal(value, b.params[key])
            for a, b in zip(first, results, strict=True)
            for key, value in a.params.items()
        )


@pytest.mark.parametrize(
    'options, named',
    [
        (dict(alphas=[]), 'alphas'),
        (dict(alphas=[0, 1.5]), 'alphas'),
        (dict(alphas=[None]), 'alphas'),
        (dict(alphas=0.1), 'alphas'),
        (dict(alphas=['0']), 'alphas'),
        (dict(alphas=range(2)), 'alphas'),
        (dict(alphas=[float('nan')]), 'alphas'),
        (dict(plain_alphas=[-0.1]), 'plain_alphas'),
        (dict(plain_alphas=[]), 'plain_alphas'),
        (dict(plain_alphas=[True]), 'plain_alphas'),
        (dict(images=0), 'images'),
        (dict(images=1.5), 'images'),
        (dict(rows=0), 'rows'),
        (dict(propagate_error=1), 'propagate_error'),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=f'^{named} must be'):
        UQViT(**options)
