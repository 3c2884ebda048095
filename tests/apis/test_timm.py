"""The config for models of timm, made small, from a float checkpoint to a quantized
one.
"""

import pytest
import torch
from mmengine.config import Config

from mmptq import QuantizationError
from mmptq.apis import load_packed, pack, quantize
from mmptq.backbones.timm_import import import_timm

from ..conftest import build_in
from .conftest import FEW, ROOT

try:
    import_timm()
except QuantizationError as error:
    pytest.skip(str(error), allow_module_level=True)

CONFIG = str(ROOT / 'configs' / 'timm' / 'upernet_swin-tiny-timm.py')
SMALL = {
    'model.backbone.embed_dim': 8,
    'model.backbone.depths': (1, 1, 2, 1),
    'model.backbone.num_heads': (1, 1, 2, 2),
    'model.decode_head.in_channels': [8, 16, 32, 64],
    'model.auxiliary_head.in_channels': 32,
}


def test_the_whole_road_without_the_weights_that_training_began_with(
    demo_data, tmp_path
):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(SMALL)
    torch.manual_seed(0)
    model = build_in('mmseg', cfg.model)
    start = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.init_weights()  # as a Runner's training does
    assert all(
        torch.equal(value, start[key])
        for key, value in model.backbone.state_dict().items()
    )
    torch.save(model.state_dict(), tmp_path / 'float.pth')

    options = {**FEW, **SMALL, 'model.backbone.pretrained': 'absent.safetensors'}
    summary = quantize(
        CONFIG,
        tmp_path / 'float.pth',
        'minmax_w8a8',
        work_dir=str(tmp_path),
        cfg_options=options,
        calib_images=2,
    )
    rows = [
        row for row in summary['layers'] if row['name'].startswith('backbone.model.')
    ]
    assert len(rows) == 1 + 5 * 6 + 3 and all(row['reason'] is None for row in rows)
    assert summary['float']['metrics'].keys() == summary['quantized']['metrics'].keys()
    assert (
        Config.fromfile(tmp_path / 'quantized.py').model.backbone.backbone.pretrained
        is None
    )
    packed = load_packed(
        pack(CONFIG, str(tmp_path / 'quantized.pth'), cfg_options=options)
    )
    bias = 'backbone.model.layers.0.blocks.0.mlp.fc1.bias'
    assert torch.equal(
        packed.state_dict()[bias],
        torch.load(tmp_path / 'quantized.pth', weights_only=True)['state_dict'][bias],
    )
