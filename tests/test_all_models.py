"""Every Swin and ViT of mmdet and mmsegmentation, in the models of their configs and
ours: converted, calibrated, saved, loaded.

Weights are random and images are of 64 x 64 pixels. Widths are the configs' own, and
depths are up to Swin-S and ViT-S; larger ones have fewer layers (``SHALLOW``). BEiT and
MAE take images of one size only, so theirs is set (``SMALL``).
"""

import io
import logging
import re
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmptq.apis import load_recipe
from mmptq.calibration import operations
from mmptq.checkpoints.reading import is_calibrated, load_checked
from mmptq.engine.calibration import calibrate_model, quantization
from mmptq.engine.data import CalibrationSet, load_config
from mmptq.layers import QuantOp
from mmptq.wrapping.configs import quantized_config

ROOT = Path(__file__).parents[1]
SIZE = 64

SHALLOW = {
    r'swin-b': {'depths': (2, 2, 3, 2)},
    r'swin-l': {'depths': (1, 1, 2, 1)},
    r'(vit|deit)-[bl]|mae-base|beit': {'num_layers': 4, 'out_indices': (0, 1, 2, 3)},
    r'segmenter_vit-[bl]': {'num_layers': 4, 'out_indices': (3,)},
}
SMALL = {'beit': {'img_size': (SIZE, SIZE)}, 'mae-base': {'img_size': (SIZE, SIZE)}}
FEW = {'dino': {'num_queries': 50}}
"""64 x 64 pixels have no 900 places for queries."""
PROPOSALS = 20
"""Of a region proposal network; else their heads take most of the time."""

DETECTORS = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    'configs/mmdet/cascade-mask-rcnn_swin-t.py',
    'configs/mmdet/cascade-mask-rcnn_swin-s.py',
    'configs/mmdet/cascade-mask-rcnn_swin-b.py',
    'configs/mmdet/mask-rcnn_vit-b16.py',
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
    'mmdet::mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py',
    'mmdet::mask2former/mask2former_swin-b-p4-w12-384-in21k_8xb2-lsj-50e_coco-panoptic.py',
    'mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic.py',
    'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
]
SEGMENTORS = [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::swin/swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::swin/swin-base-patch4-window12-in1k-384x384-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-s16_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-s16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-b_mask_8xb1-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-l_mask_8xb1-160k_ade20k-512x512.py',
    'mmseg::setr/setr_vit-l_naive_8xb2-160k_ade20k-512x512.py',
    'mmseg::setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512.py',
    'mmseg::setr/setr_vit-l_mla_8xb2-160k_ade20k-512x512.py',
    'mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py',
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py',
    'mmseg::beit/beit-large_upernet_8xb1-amp-160k_ade20k-640x640.py',
    'mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py',
    'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py',
    'mmseg::mask2former/mask2former_swin-s_8xb2-160k_ade20k-512x512.py',
    'mmseg::mask2former/mask2former_swin-b-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py',
    'mmseg::mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py',
]
WHOLE = {
    'configs/mmdet/cascade-mask-rcnn_swin-t.py': {
        'ConvTranspose2d has no quantized form': 3
    },
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py': {
        'MultiheadAttention has no quantized form': 18
    },
    'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py': {
        'MultiheadAttention has no quantized form': 6
    },
    'mmseg::vit/vit_deit-s16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py': {
        'runs in training only': 2
    },
    'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py': {
        'MultiheadAttention has no quantized form': 2
    },
    'mmseg::setr/setr_vit-l_mla_8xb2-160k_ade20k-512x512.py': {
        'runs in training only': 4
    },
}
"""Models whose necks and heads are quantized as well, and what is not."""


def config_of(name):
    """A config with no pretrained weights, cut to size."""
    cfg = load_config(name if '::' in name else str(ROOT / name))
    cfg.model.pop('pretrained', None)
    for part in (cfg.model, cfg.model.backbone):
        part.init_cfg = None
    for table, target in (
        (SHALLOW, cfg.model.backbone),
        (SMALL, cfg.model.backbone),
        (FEW, cfg.model),
    ):
        for part, changes in table.items():
            if re.search(part, name):
                target.update(changes)
    if 'rpn' in cfg.model.test_cfg:
        cfg.model.test_cfg.rpn.max_per_img = PROPOSALS
    init_default_scope(cfg.default_scope)
    return cfg


class Images:
    """Images of noise."""

    def __init__(self, package):
        self.package = package

    def __getitem__(self, index):
        if self.package == 'mmdet':
            from mmdet.structures import DetDataSample as DataSample
        else:
            from mmseg.structures import SegDataSample as DataSample
        size = dict.fromkeys(
            ('ori_shape', 'img_shape', 'pad_shape', 'batch_input_shape'), (SIZE, SIZE)
        )
        sample = DataSample(
            metainfo=dict(
                img_id=index, img_path=f'{index}.jpg', scale_factor=(1.0, 1.0), **size
            )
        )
        generator = torch.Generator().manual_seed(index)
        return dict(
            inputs=torch.randint(
                256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator
            ),
            data_samples=sample,
        )


def filled(module):
    """The module with other weights than its own, seeded: some of its own are whatever
    was in memory.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
            if name.endswith('weight') and parameter.ndim == 1:
                parameter.add_(1)
    module.eval()  # a Swin's returns nothing
    return module


def outputs(backbone, x):
    with torch.no_grad():
        return tree_flatten(backbone(x))[0]


def calibrated(model, package, folder):
    """Calibrates on two images and returns them."""
    images = CalibrationSet(Images(package), [0, 1], ['0.jpg', '1.jpg'], False)
    calibrate_model(
        model, images, 0, logging.getLogger('mmptq.tests'), folder / 'progress.pth'
    )
    assert is_calibrated(model)
    return list(images.batches())


class FloatProducts(TorchDispatchMode):
    """Notes the products that are computed outside of quantized operations, and the
    operations that run.
    """

    def __init__(self):
        super().__init__()
        self.running, self.ran, self.found = 0, set(), []

    @contextmanager
    def watching(self, module):
        def enter(op, _):
            self.running += 1
            self.ran.add(op)

        def leave(*_):
            self.running -= 1

        ops = operations(module).values()
        handles = [
            handle
            for op in ops
            for handle in (
                op.register_forward_pre_hook(enter),
                op.register_forward_hook(leave),
            )
        ]
        with self:
            yield
        for handle in handles:
            handle.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.running and re.search(
            r'^(add|b|baddb)?mm\b|^(add)?mv\b|^linear\b|convolution|dot', func.__name__
        ):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def quantized_whole(module, x):
    """Whether all its operations run on an input, and no other product."""
    watch = FloatProducts()
    with watch.watching(module):
        outputs(module, x)
    assert watch.found == []
    return watch.ran == set(operations(module).values())


def unaccounted(module, skipped):
    """Layers that are neither quantized nor listed."""
    listed = tuple(f'{name}.' for name in skipped)
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(
            layer, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention
        )
        and not isinstance(layer, QuantOp)
        and name not in skipped
        and not name.startswith(listed)
    ]


@pytest.mark.parametrize('name', DETECTORS + SEGMENTORS)
def test_backbone_of(name, tmp_path):
    cfg = config_of(name)
    started = time.process_time()
    plain = MODELS.build(cfg.model.backbone)
    build = time.process_time() - started
    wrapped = quantized_config(cfg, load_recipe('minmax_w4a4'), 'backbone').model
    started = time.process_time()
    again = MODELS.build(wrapped.backbone)
    assert time.process_time() - started < build + 2
    model = MODELS.build(wrapped)
    filled(plain), filled(model), again.eval()
    model.backbone.load_state_dict(plain.state_dict(), strict=True)
    assert quantization(model).skipped == {} and unaccounted(model.backbone, {}) == []

    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    expected = outputs(plain, x)
    for ours, theirs in zip(outputs(model.backbone, x), expected, strict=True):
        if 'Swin' in cfg.model.backbone.type:
            assert torch.equal(ours, theirs)
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()

    batches = calibrated(model, cfg.default_scope, tmp_path)
    result = outputs(model.backbone, x)
    assert not any(
        torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True)
    )
    assert quantized_whole(model.backbone, x)
    assert len(model.test_step(batches[0])) == 1

    file = io.BytesIO()
    torch.save(model.backbone.state_dict(), file)
    file.seek(0)
    load_checked(again, torch.load(file, weights_only=True), 'the file')
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(outputs(again, x), result, strict=True)
    )


@pytest.mark.parametrize('name', WHOLE)
def test_whole_model_of(name, tmp_path):
    cfg = config_of(name)
    model = filled(
        MODELS.build(quantized_config(cfg, load_recipe('minmax_w4a4'), 'model').model)
    )
    skipped = quantization(model).skipped
    assert unaccounted(model, skipped) == []
    reasons = [
        reason.sentence(type(model.get_submodule(name)).__name__)
        for name, reason in skipped.items()
    ]
    assert {reason: reasons.count(reason) for reason in reasons} == WHOLE[name]
    batches = calibrated(model, cfg.default_scope, tmp_path)
    assert len(model.test_step(batches[1])) == 1
