"""A whole model in integers is its simulation: the same codes but at edges, and with
these the same outputs.
"""

import copy
import math

import pytest
import torch

from mmptq import QuantizationError
from mmptq.layers import QuantLinear
from mmptq.runtime import to_integer
from mmptq.runtime.coders import AdaLog, DeMax, Uniform
from mmptq.runtime.linear import IntegerLinear
from mmptq.runtime.lockstep import demax_codes, lockstep, pairs

from ..conftest import image
from .conftest import BACKBONES, RECIPES, ready

pytestmark = pytest.mark.usefixtures('uncompiled')


def pair(name, recipe):
    """A calibrated backbone, and in integers."""
    simulated, integers = ready(name, recipe), ready(name, recipe)
    to_integer(integers, fuse=False)
    return simulated, integers


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('name', BACKBONES)
def test_whole_backbones_agree_to_1e_4_on_every_image(name, recipe):
    """Free running they do not: a code at an edge may go to the other side, and others
    after it.
    """
    simulated, integers = pair(name, recipe)
    before = copy.deepcopy(simulated.state_dict())
    for seed in range(3):
        x = image(56, 56, seed=seed) if 'eva' in name else image(49, 70, seed=seed)
        found = lockstep(simulated, integers, x)
        assert (
            found.error <= 1e-5 and found.farthest <= 1e-3 and found.values <= 1e-6
        ), found
        assert found.codes > 1e4 and found.moved <= 1e-3 * found.codes, found
        plain = simulated(x)
        assert all(
            torch.equal(a, b) for a, b in zip(plain, simulated(x), strict=True)
        )  # all is put back
    assert all(
        torch.equal(value, before[key]) for key, value in simulated.state_dict().items()
    )
    assert 'forward' not in vars(
        next(
            module for module in integers.modules() if isinstance(module, IntegerLinear)
        )
    )


@pytest.mark.parametrize(
    'recipe', ['minmax_w4a4 mixed', 'adalog_w4a4 mixed', 'mmptq_w4a4_uniform mixed']
)
@pytest.mark.parametrize('name', ['mmdet swin', 'mmseg vit'])
def test_recipes_by_layer_agree_as_well(name, recipe):
    simulated, integers = pair(name, recipe)
    found = lockstep(simulated, integers, image(49, 70))
    assert found.error <= 1e-5 and found.farthest <= 1e-3 and found.values <= 1e-6, (
        found
    )
    assert found.codes > 1e4 and found.moved <= 1e-3 * found.codes, found
    fused = ready(name, recipe)
    paths = to_integer(fused)
    simulated_paths = {path for path in paths.values() if path.startswith('simulated')}
    assert simulated_paths == {
        'simulated: a product of Float and Float operands has no entry in'
        ' mmptq.runtime.matmul.PAIRS'
    }
    with torch.no_grad():
        assert all(
            (a - b).norm() <= 0.02 * b.norm()
            for a, b in zip(fused(image(49, 70)), simulated(image(49, 70)), strict=True)
        )


@pytest.mark.parametrize(
    'layer, attribute, seen',
    [
        ('attn.w_msa.qkv', 'gain', 'farthest'),
        ('attn.w_msa.qkv', 'offset', 'farthest'),
        ('ffn.layers.1', 'gain', 'error'),
    ],
)
@pytest.mark.parametrize('recipe', ['minmax_w8a8', 'adalog_w4a4', 'uqvit_w4a4'])
def test_a_wrong_model_is_seen(recipe, layer, attribute, seen):
    """What a layer computes is off by a hundredth: its readers' codes lie across no
    edge any more, or the outputs differ.
    """
    simulated, integers = pair('mmdet swin', recipe)
    module = integers.get_submodule(f'stages.1.blocks.0.{layer}')
    setattr(module, attribute, getattr(module, attribute) * 1.01)
    found = lockstep(simulated, integers, image(49, 70))
    assert getattr(found, seen) > {'farthest': 1e-2, 'error': 1e-4}[seen], found


@pytest.mark.parametrize(
    'recipe, scaled',
    [
        ('minmax_w8a8', lambda coder: coder._replace(scale=coder.scale * 1.01)),
        (
            'adalog_w4a4',
            lambda coder: (
                coder._replace(table=coder.table * 0.99)
                if isinstance(coder, AdaLog)
                else coder
            ),
        ),
    ],
)
def test_codes_that_are_worth_something_else_are_seen(recipe, scaled):
    """In the model's own arithmetic all fits: its coders are wrong, and so is what they
    are compared by.
    """
    simulated, integers = pair('mmdet swin', recipe)
    for module in integers.modules():
        if isinstance(module, IntegerLinear):
            module.coder = scaled(module.coder)
    assert lockstep(simulated, integers, image(49, 70)).values > 5e-3


def test_codes_of_another_calibration_are_seen():
    simulated, other = ready('mmdet swin'), ready('mmdet swin')
    for module in other.modules():
        if isinstance(module, QuantLinear):
            module.input_quantizer.scale.mul_(0.5)
    to_integer(other, fuse=False)
    found = lockstep(simulated, other, image(49, 70))
    assert max(found.values, found.farthest) > 0.1


def test_not_a_number_is_no_agreement():
    simulated, integers = pair('mmdet swin', 'minmax_w8a8')
    integers.norm1.weight.data.mul_(torch.nan)
    assert math.isnan(lockstep(simulated, integers, image(49, 70)).error)
    simulated, integers = pair('mmdet swin', 'minmax_w8a8')
    x = image(49, 70)
    x[0, 0, 3, 3] = torch.nan
    found = lockstep(simulated, integers, x)
    assert math.isnan(found.farthest) and found.moved


def test_positions_and_codes_by_hand():
    """Halves are edges; beyond them a code is wrong by the rest."""

    def beyond(x, codes, coder):
        return max(
            float((position - code).abs().max()) - 0.5
            for position, code in pairs(x, codes, coder)
        )

    half = Uniform(torch.tensor(2.0), torch.tensor(1.0), 3, torch.tensor(0.5))
    x = torch.tensor([0.26, -9.0, 9.0])  # 0.52 steps; cut at -1 and 2
    assert beyond(x, (torch.tensor([1.0, -1.0, 2.0]),), half) < 0
    assert beyond(x, (torch.tensor([0.0, -1.0, 2.0]),), half) == pytest.approx(
        0.02, abs=1e-6
    )
    log = AdaLog(
        torch.tensor(1.0),
        torch.tensor(-1.0),
        3,
        torch.tensor([6.0, 3.0, 3.0, 0.0, torch.nan]),
        torch.tensor(1 / 6),
    )
    x = torch.tensor(
        [2.0**-0.6, 2.0**-1.9, 0.0]
    )  # codes 1, 2, of one value, and the last
    assert beyond(x, (torch.tensor([3.0, 3.0, 0.0]),), log) < 0
    assert beyond(x, (torch.tensor([6.0, 3.0, 0.0]),), log) == pytest.approx(
        0.1, abs=1e-6
    )
    rows = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    codes, step, maxima, positions = demax_codes(rows, DeMax(3, 1, False))
    assert beyond(rows, (codes, step, maxima, positions), DeMax(3, 1, False)) < 0
    assert codes.tolist() == [[0, 3, 2, 0]] and positions.tolist() == [[0]]
    assert beyond(
        rows,
        (codes - torch.tensor([0, 0, 1, 0]), step, maxima, positions),
        DeMax(3, 1, False),
    ) == pytest.approx(0.5, abs=1e-5)
    assert (
        beyond(rows, (codes, step, maxima, positions + 1), DeMax(3, 1, False)) > 1
    )  # that is not the largest
    assert (
        beyond(rows, (codes, (step * 1.01), maxima, positions), DeMax(3, 1, True)) > 1
    )  # no rounding to float16


def test_models_that_are_no_pair_are_refused():
    simulated, fused = ready('mmdet swin'), ready('mmdet swin')
    to_integer(fused)
    for other in (simulated, fused, torch.nn.Linear(2, 2)):
        with pytest.raises(QuantizationError, match=r'to_integer\(copy, fuse=False\)'):
            lockstep(simulated, other, image(49, 70))
    simulated, integers = pair('mmdet swin', 'minmax_w8a8')
    simulated.train()
    with pytest.raises(QuantizationError, match='training mode'):
        lockstep(simulated, integers, image(49, 70))
    partly = ready('mmdet swin')
    for block in partly.modules():
        if type(block).__name__ == 'SwinBlock':
            block.register_forward_hook(lambda *_: None)
    to_integer(partly)
    with pytest.raises(QuantizationError, match='fuse=False'):  # patch mergings are
        lockstep(ready('mmdet swin'), partly, image(49, 70))


@pytest.mark.parametrize('twice', ['simulated', 'integers'])
def test_models_that_call_their_operations_differently_often_are_refused(twice):
    simulated, integers = pair('mmdet swin', 'minmax_w8a8')
    blocks = {'simulated': simulated, 'integers': integers}[twice].stages[1].blocks
    blocks.append(blocks[0])
    with pytest.raises(
        QuantizationError, match=r'stages\.1\.blocks\.0\..* is called more often in'
    ):
        lockstep(simulated, integers, image(49, 70))
