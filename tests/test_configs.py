"""Configs of ours: they say how they are used, and inherit the rest."""
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from mmptq.backbones import support_table
from mmptq.engine.data import load_config

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ('mmdet', 'mmseg') for path in (ROOT / 'configs' / package).glob('*.py'))
READY = [path for path in FILES if path.stem.endswith('_adalog-w4a4')]


def names(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda path: path.stem)


def without_scopes(tree):
    """A config without the scopes that mmengine notes where a base is of another package."""
    if isinstance(tree, dict):
        return {key: without_scopes(value) for key, value in tree.items() if key != '_scope_'}
    return [without_scopes(value) for value in tree] if isinstance(tree, list | tuple) else tree


@names(FILES)
def test_it_says_how_it_is_run(path):
    docstring = path.read_text().split('"""')[1]
    assert f' configs/{path.parent.name}/{path.name} CHECKPOINT' in docstring


@names(READY)
def test_a_ready_config_is_that_of_its_base_with_the_backbone_wrapped(path):
    cfg = Config.fromfile(path)
    base = re.search(r"_base_ = '(.*)'", path.read_text()).group(1)
    plain = load_config(base) if '::' in base else Config.fromfile(path.parent / base)
    backbone = cfg.model.pop('backbone')
    assert backbone == dict(type='mmptq.QuantBackbone', recipe='adalog_w4a4', backbone=plain.model.pop('backbone'))
    assert cfg.pop('custom_hooks') == [dict(type='mmptq.PTQHook')]
    cfg.model.pop('pretrained', None), plain.model.pop('pretrained', None)
    assert without_scopes(cfg.to_dict()) == without_scopes(plain.to_dict())


@pytest.mark.parametrize(('size', 'depths', 'heads', 'channels'), [
    ('t', [2, 2, 6, 2], [3, 6, 12, 24], 96), ('s', [2, 2, 18, 2], [3, 6, 12, 24], 96), ('b', [2, 2, 18, 2], [4, 8, 16, 32], 128)])
def test_cascades_are_those_that_the_authors_of_swin_trained(size, depths, heads, channels):
    model = Config.fromfile(ROOT / 'configs' / 'mmdet' / f'cascade-mask-rcnn_swin-{size}.py').model
    backbone = model.backbone
    assert (backbone.embed_dims, backbone.depths, backbone.num_heads, backbone.window_size) == (channels, depths, heads, 7)
    assert model.neck.in_channels == [channels * 2**level for level in range(4)]
    assert [head.bbox_coder.target_stds for head in model.roi_head.bbox_head] == [
        [0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    for head in model.roi_head.bbox_head:
        assert (head.type, head.norm_cfg.type, head.loss_bbox.type) == ('Shared4Conv1FCBBoxHead', 'SyncBN', 'GIoULoss')
        assert head.reg_decoded_bbox and not head.reg_class_agnostic


def test_the_readme_has_the_table_of_known_backbones():
    assert support_table() in (ROOT / 'README.md').read_text()
