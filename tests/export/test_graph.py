"""What becomes of a quantizer in a graph, by the table of its class."""

import pytest
import torch

from mmptq import QuantizationError
from mmptq.export.graph import Call, Operation
from mmptq.quantizers import Float, Quantizer, UniformQuantizer


def test_a_quantizer_that_has_no_form_is_named_and_a_subclass_has_that_of_its_base():
    class Unknown(Quantizer):
        """A user's quantizer."""

        param_names = ('scale',)

    class OwnUniform(UniformQuantizer):
        """Another one, which changes nothing."""

    operation = Operation(Call('stages.0.fc', ('x',), 'y'))
    with pytest.raises(
        QuantizationError,
        match=(
            r'stages\.0\.fc: Unknown has no entry in mmptq\.export\.graph\.ACTIVATIONS'
        ),
    ):
        operation.quantized('x', Unknown(4))
    quantizer = OwnUniform(4)
    quantizer.set(
        scale=torch.tensor(0.5), zero_point=torch.tensor(3, dtype=torch.int32)
    )
    operation.quantized('x', quantizer)
    assert [node.op_type for node in operation.nodes] == [
        'QuantizeLinear',
        'Clip',
        'DequantizeLinear',
    ]
    assert operation.quantized('x', Float(4)) == 'x'
