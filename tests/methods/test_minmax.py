"""Min-max: the true extremes of all calls."""

import numpy as np
import pytest
import torch

from mmptq.backbones import find_spec
from mmptq.calibration import Block, Call, calibrate, operations
from mmptq.layers import QuantMatMul
from mmptq.methods import MinMax
from mmptq.quantizers import UniformQuantizer

from ..conftest import equip, image, oracle_range, outputs_of, quantizable


@torch.no_grad()
def operands(backbone, calls):
    """The operands of every operation in ordinary forwards, by operation and role."""
    seen, handles = {}, []
    for name, op in operations(backbone).items():

        def keep(op, inputs, name=name):
            for role, operand in zip(
                op.roles, op.operands(*op.activations(*inputs)), strict=True
            ):
                seen.setdefault((name, role), []).append(operand.numpy())

        handles.append(op.register_forward_pre_hook(keep))
    for call in calls:
        backbone(*call.args)
    for handle in handles:
        handle.remove()
    return seen


def test_ranges_are_the_extremes_of_all_calls(family):
    backbone, plain = (quantizable(*family, 'minmax_w4a4') for _ in range(2))
    calls = [
        Call((image(45, 57, seed=1),)),
        Call((2 * image(33, 90, seed=2),)),
        Call((image(40, 40, seed=3),)),
    ]
    calibrate(
        backbone, find_spec(backbone).block_names(backbone), calls, MinMax(rows=4)
    )
    seen = operands(plain, calls)
    assert len(seen) == 2 * len(operations(backbone))
    for (name, role), values in seen.items():
        quantizer = operations(backbone)[name].quantizer(role)
        axis = quantizer.axis
        low, high = (
            f(
                [
                    f(
                        v,
                        axis=(
                            None
                            if axis is None
                            else tuple(d for d in range(-v.ndim, 0) if d != axis)
                        ),
                    )
                    for v in values
                ],
                axis=0,
            )
            for f in (np.amin, np.amax)
        )
        scale, zero_point = oracle_range(low, high, quantizer.bits)
        np.testing.assert_allclose(
            quantizer.scale.numpy().ravel(),
            scale.ravel(),
            rtol=1e-6,
            err_msg=f'{name} {role}',
        )
        assert np.array_equal(quantizer.zero_point.numpy().ravel(), zero_point.ravel())
        assert quantizer.scale.numel() == (1 if axis is None else values[0].shape[axis])


def test_every_call_counts_and_outliers_are_covered():
    op = equip(
        QuantMatMul(), left=UniformQuantizer(4, axis=-3), right=UniformQuantizer(4)
    )
    calls = [Call((torch.rand(5, 2, 6, 3), torch.rand(5, 2, 3, 6))) for _ in range(4)]
    calls[2].args[0][3, 1, 4, 2] = 30
    calls[1].args[1][0, 0, 2, 5] = -15
    block = Block('pv', op, calls, {'pv': op})
    outputs = outputs_of(MinMax(rows=1), block)
    assert (
        op.left_quantizer.scale.shape == (2, 1, 1)
        and op.right_quantizer.scale.shape == ()
    )
    assert (
        op.left_quantizer.scale[1].item() == pytest.approx(2)
        and op.left_quantizer.scale[0] < 1 / 14
    )
    assert op.right_quantizer.scale * op.right_quantizer.zero_point == pytest.approx(
        15, rel=0.05
    )
    assert all(
        torch.equal(output, call.args[0] @ call.args[1])
        for output, call in zip(outputs, calls, strict=True)
    )
    assert sum(len(sample[0]) for sample in block.samples['pv']) == 4


def test_all_zero_activations_stay_zero():
    op = equip(QuantMatMul())
    outputs_of(
        MinMax(),
        Block(
            'qk',
            op,
            [Call((torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3, 2)))],
            {'qk': op},
        ),
    )
    assert (
        op.left_quantizer.scale == 1
        and (op(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3, 2)) == 0).all()
    )
