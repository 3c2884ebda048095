"""Tables by class of quantizer: subclasses are found, and what is missing is named."""

import pytest
import torch
from torch import nn

from mmptq.layers import QuantConv2d, QuantLinear, QuantMatMul
from mmptq.quantizers import DeMaxQuantizer, Float, Quantizer, UniformQuantizer
from mmptq.quantizers.dispatch import entry_for, entry_for_pair
from mmptq.runtime import coders, matmul, to_integer
from mmptq.runtime.base import input_coder, integer_weight
from mmptq.runtime.coders import CODERS, Uniform, coder
from mmptq.runtime.errors import NoIntegerForm, required

from ..conftest import adalog, equip
from .conftest import IMAGES, ready, whole

pytestmark = pytest.mark.usefixtures('uncompiled')


class NearlyUniform(UniformQuantizer):
    """A user's quantizer that changes nothing."""


class Unknown(Quantizer):
    """A user's quantizer that no table knows."""

    param_names = ('scale',)


def as_class(quantizer, kind):
    """A calibrated quantizer as one of a subclass."""
    quantizer.__class__ = kind
    return quantizer


def test_an_entry_is_that_of_the_nearest_class():
    table = {Quantizer: 'any', UniformQuantizer: 'uniform'}
    assert (
        entry_for(table, UniformQuantizer(4))
        == entry_for(table, NearlyUniform(4))
        == 'uniform'
    )
    assert entry_for(table, Float(4)) == 'any'
    assert entry_for({NearlyUniform: 1}, UniformQuantizer(4)) is None
    with pytest.raises(NoIntegerForm, match=r'^Float has no entry in here\.TABLE$'):
        required({UniformQuantizer: 1}, Float(4), 'here.TABLE')


def test_an_entry_of_a_pair_is_that_of_the_nearest_classes_the_left_one_first():
    table = {
        (UniformQuantizer, Quantizer): 'left',
        (Quantizer, UniformQuantizer): 'right',
    }
    uniform, subclass, other = UniformQuantizer(4), NearlyUniform(4), Float(4)
    assert entry_for_pair(table, uniform, uniform) == 'left'
    assert entry_for_pair(table, subclass, other) == 'left'
    assert entry_for_pair(table, other, subclass) == 'right'
    assert entry_for_pair(table, other, other) is None


def test_a_subclass_has_the_coder_of_its_base():
    expected, found = (
        coder(whole(0.5, 3, 4)),
        coder(as_class(whole(0.5, 3, 4), NearlyUniform)),
    )
    assert isinstance(found, Uniform) and found == expected
    integers, scale, value = integer_weight(
        equip(
            QuantLinear(2, 1),
            input=whole(1, 0, 4),
            weight=as_class(whole(0.5, 3, 4), NearlyUniform),
        )
    )
    assert (
        integers.shape == (1, 2)
        and scale.tolist() == [0.5]
        and torch.equal(value, integers * 0.5)
    )


def test_a_quantizer_that_a_table_lacks_is_named():
    with pytest.raises(
        NoIntegerForm, match=r'^Unknown has no entry in mmptq\.runtime\.coders\.CODERS$'
    ):
        coder(Unknown(4))
    weight = equip(QuantLinear(2, 1), input=whole(1, 0, 4), weight=adalog(4, 37))
    with pytest.raises(
        NoIntegerForm,
        match=r'^AdaLogQuantizer has no entry in mmptq\.runtime\.base\.WEIGHTS$',
    ):
        integer_weight(weight)
    with pytest.raises(
        NoIntegerForm,
        match=(
            r'a product of Unknown and UniformQuantizer operands has no entry in'
            r' .*PAIRS'
        ),
    ):
        matmul.pair_for(Unknown(4), whole(1, 0, 4))


def test_demax_before_a_layer_is_not_called_float():
    left = DeMaxQuantizer(4)
    left.set(**left.observed([torch.rand(1, 1, 2, 3)]))
    with pytest.raises(NoIntegerForm, match='a step for each row'):
        input_coder(equip(QuantLinear(3, 5), input=left, weight=whole(1, 0, 4)))


def test_pairs_are_found_along_both_classes():
    subclass = as_class(whole(1, 0, 4), NearlyUniform)
    assert matmul.pair_for(subclass, subclass) is matmul.UNIFORM_PAIR
    assert matmul.pair_for(adalog(4, 37), subclass) is matmul.ADALOG_PAIR
    assert matmul.pair_for(DeMaxQuantizer(4), subclass) is matmul.DEMAX_PAIR


@torch.no_grad()
def test_a_model_with_a_quantizer_that_no_table_knows_says_so_and_runs():
    backbone = ready('mmdet swin')
    layer = backbone.stages[0].blocks[0].ffn.layers[1]
    as_class(layer.input_quantizer, type('OwnQuantizer', (UniformQuantizer,), {}))
    expected = to_integer(ready('mmdet swin'))
    assert to_integer(backbone) == expected  # a subclass is what its base is

    backbone = ready('mmdet swin')
    layer = backbone.stages[0].blocks[0].ffn.layers[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            coders,
            'CODERS',
            {
                key: value
                for key, value in CODERS.items()
                if key is not UniformQuantizer
            },
        )
        paths = to_integer(backbone)
    assert set(paths.values()) >= {
        'simulated: UniformQuantizer has no entry in mmptq.runtime.coders.CODERS'
    }
    for before, after in zip(
        ready('mmdet swin')(IMAGES[0]), backbone(IMAGES[0]), strict=True
    ):
        assert torch.equal(before, after)


def test_every_kind_of_operation_says_what_its_quantizer_lacks():
    unknown = Unknown(4)
    weight = whole(0.1, 8, 4)
    for op in (
        equip(QuantLinear(3, 5), input=unknown, weight=weight),
        equip(QuantConv2d.from_float(nn.Conv2d(3, 4, 3)), input=unknown, weight=weight),
    ):
        with pytest.raises(NoIntegerForm, match=r'Unknown has no entry in .*CODERS'):
            input_coder(op)
    with pytest.raises(NoIntegerForm, match='Unknown'):
        matmul.IntegerMatMul(equip(QuantMatMul(), left=weight, right=unknown))
