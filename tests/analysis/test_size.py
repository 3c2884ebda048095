"""Sizes, by hand."""

from torch import nn

from mmptq.analysis.size import model_size
from mmptq.layers import QuantLinear
from mmptq.quantizers import UniformQuantizer


def test_size_counts_packed_weights_scales_and_what_stays_float():
    linear = QuantLinear.from_float(nn.Linear(1024, 512))
    linear.set_quantizers(
        {'input': 'linear', 'weight': 'weight'},
        {'input': UniformQuantizer(4), 'weight': UniformQuantizer(4, axis=-2)},
    )
    model = nn.Sequential(linear, nn.LayerNorm(512))
    size = model_size(model).to_dict()
    assert size['float_mib'] == round((1024 * 512 + 512 + 2 * 512) * 4 / 2**20, 3)
    assert size['quantized_mib'] == round(
        (1024 * 512 / 2 + 512 * 5 + 3 * 512 * 4) / 2**20, 3
    )
