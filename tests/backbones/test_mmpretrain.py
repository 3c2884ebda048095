"""mmpretrain's ViT and Swin, where mmpretrain is installed."""

import pytest
import torch

from mmptq.backbones import find_spec
from mmptq.calibration import Call, calibrate, operations
from mmptq.checkpoints.reading import is_calibrated

from ..conftest import build_in, fast, image, randomized

pytest.importorskip('mmpretrain.models')

VIT = dict(
    arch=dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32),
    img_size=(48, 32),
    out_type='featmap',
)
SWIN = dict(
    arch=dict(embed_dims=8, depths=[2, 1], num_heads=[2, 4]),
    window_size=4,
    out_indices=(0, 1),
    pad_small_map=True,
)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(VIT, type='mmpretrain.VisionTransformer', out_indices=[0, 2]),
        dict(
            VIT,
            type='mmpretrain.VisionTransformer',
            out_indices=[0, 2],
            layer_cfgs=dict(ffn_type='swiglu_fused'),
        ),
        dict(VIT, type='mmpretrain.DistilledVisionTransformer', out_indices=[0, 2]),
        dict(VIT, type='mmpretrain.DeiT3', out_indices=[0, 2]),
        dict(SWIN, type='mmpretrain.SwinTransformer'),
    ],
    ids=['ViT', 'SwiGLU', 'DeiT', 'DeiT III', 'Swin'],
)
def test_every_layer_is_quantized(cfg):
    torch.manual_seed(0)
    reference = randomized(build_in('mmdet', cfg))
    backbone = randomized(
        build_in('mmdet', dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=fast()))
    )
    backbone.load_state_dict(reference.state_dict(), strict=True)
    inputs = [image(61, 70, seed) for seed in range(2)]

    def errors():
        with torch.no_grad():
            return [
                float((a - b).norm() / b.norm())
                for a, b in zip(backbone(inputs[0]), reference(inputs[0]), strict=True)
            ]

    assert max(errors()) <= 1e-6
    names = find_spec(backbone).block_names(backbone)
    calibrate(
        backbone,
        names,
        [Call((x,)) for x in inputs],
        backbone.quantization.recipe.build_method(),
        seed=0,
    )
    assert backbone.quantization.skipped == {}
    assert is_calibrated(backbone) and len(operations(backbone)) > 12
    assert all(0.01 < error < 0.3 for error in errors())
