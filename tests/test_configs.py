"""Configs of ours: they say how they are used, and inherit the rest; the model zoo says
the same of them.
"""

import functools
import json
import os
import re
from pathlib import Path

import mmengine.config.utils
import pytest
from mmengine.config import Config
from mmengine.fileio import load

from mmptq.apis import load_recipe
from mmptq.backbones import support_table
from mmptq.engine.data import load_config
from mmptq.wrapping.configs import quantized_config

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ('demo', 'mmdet', 'mmseg', 'timm')
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
NAME = re.compile(
    r'(?P<model>[^_]+_[^_]+)_(?P<method>adalog|uqvit)-(?P<bits>w\da\d)(?P<whole>_scope-model)?'
)
READY = {path: match for path in FILES if (match := NAME.fullmatch(path.stem))}
COLLECTIONS = {'adalog': 'AdaLog', 'uqvit': 'UQ-ViT'}
VITDET = 'projects/ViTDet/configs/vitdet_mask-rcnn_vit-b-mae_lsj-100e.py'
MEASURED = {
    'coco/bbox_mAP': 'box AP',
    'coco/segm_mAP': 'mask AP',
    'mIoU': 'mIoU',
    'aAcc': 'aAcc',
}
METRIC = re.compile(f'({"|".join(MEASURED.values())}) (\\d+\\.\\d+)')


@pytest.fixture(scope='module', autouse=True)
def surroundings(tmp_path_factory):
    """A checkout of mmdetection, with what it takes to load ViTDet's config; indices of
    model zoos are read once.
    """
    vitdet = tmp_path_factory.mktemp('mmdetection') / VITDET
    vitdet.parent.mkdir(parents=True)
    vitdet.write_text(
        "model = dict(type='MaskRCNN', backbone=dict(type='ViT'))\ncustom_hooks ="
        " [dict(type='Fp16CompresssionHook')]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMDET', str(vitdet.parents[3]))
        patch.setattr(mmengine.config.utils, 'load', functools.cache(load))
        yield


def names(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda path: path.stem)


def without_scopes(tree):
    """A config without the scopes that mmengine notes where a base is of another
    package.
    """
    if isinstance(tree, dict):
        return {
            key: without_scopes(value)
            for key, value in tree.items()
            if key != '_scope_'
        }
    return (
        [without_scopes(value) for value in tree]
        if isinstance(tree, list | tuple)
        else tree
    )


def docstring(path):
    return path.read_text().split('"""')[1]


def float_config(path):
    """The config that a ready one quantizes."""
    base = (
        re.search(r"_base_ = '(.*)'", path.read_text())
        .group(1)
        .replace('{{$MMDET:MMDET}}', os.environ['MMDET'])
    )
    if '::' in base:
        return load_config(base)
    base = path.parent / base
    return float_config(base) if base in READY else Config.fromfile(base)


def zoo(root=ROOT):
    """Collections and models of the model index."""
    files = [load(root / file) for file in load(root / 'model-index.yml')['Import']]
    return [entry for file in files for entry in file['Collections']], [
        entry for file in files for entry in file['Models']
    ]


def metrics(model):
    return {
        name: value
        for result in model.get('Results', ())
        for name, value in result['Metrics'].items()
    }


@names(FILES)
def test_it_says_how_it_is_run(path):
    assert f' configs/{path.parent.name}/{path.name} ' in docstring(path)


@names(READY)
def test_a_ready_config_is_the_float_one_wrapped_in_the_recipe_that_its_name_says(path):
    assert len(path.read_text().splitlines()) <= 12
    cfg, plain = Config.fromfile(path), float_config(path)
    recipe = f'{READY[path]["method"]}_{READY[path]["bits"]}'
    assert load_recipe(recipe)['name'] == recipe
    scope = 'model' if READY[path]['whole'] else 'backbone'
    assert cfg.pop('custom_hooks') == [
        (
            dict(type='mmptq.PTQHook', images=16)
            if path.parent.name == 'demo'
            else dict(type='mmptq.PTQHook')
        )
    ]
    assert cfg.model.pop('pretrained', None) is None
    plain.pop('custom_hooks', None)
    assert without_scopes(cfg.to_dict()) == without_scopes(
        quantized_config(plain, recipe, scope).to_dict()
    )


@pytest.mark.parametrize('model', zoo()[1], ids=lambda model: model['Name'])
def test_the_zoo_and_the_config_say_the_same(model):
    path = ROOT / model['Config']
    parts, text, found = READY[path], docstring(path), metrics(model)
    assert model['Name'].startswith(path.stem)
    assert model['In Collection'] == COLLECTIONS[parts['method']]
    assert model['Metadata']['Bits'] == parts['bits'].upper()
    assert model['Metadata']['Scope'] == ('model' if parts['whole'] else 'backbone')

    said = {
        f'{name} ({kind.lower()})': float(value)
        for kind, numbers in re.findall(r'(Published|Measured): ([^(;\n]+)', text)
        for name, value in METRIC.findall(numbers)
    }
    assert said == found and len(METRIC.findall(text)) == len(said)
    kinds = {re.search(r'\((published|measured)\)$', name).group(1) for name in found}
    assert ('none published' in text, 'Not measured' in text) == (
        'published' not in kinds,
        'measured' not in kinds,
    )
    assert (
        'Measured by' in model['Metadata'],
        'Published with' in model['Metadata'],
    ) == ('measured' in kinds, 'published' in kinds)


@pytest.mark.parametrize(
    'model',
    [model for model in zoo()[1] if metrics(model)],
    ids=lambda model: model['Name'],
)
def test_where_numbers_of_the_zoo_are_from(model):
    if 'Measured by' in model['Metadata']:
        result = json.loads((ROOT / model['Metadata']['Measured by']).read_text())
        parts = READY[ROOT / model['Config']]
        assert (
            result['about']['config'] == f'{parts["model"]}.py'
            and result['about']['calibration']['images'] == 16
        )
        row = next(
            row
            for row in result['rows']
            if row['recipe'] == f'{parts["method"]}_{parts["bits"]}'
        )
        assert metrics(model) == {
            f'{MEASURED[name]} (measured)': round(value, 3)
            for name, value in row.items()
            if name in MEASURED
        }
    else:
        assert model['Metadata']['Scope'] == 'model', (
            'no paper quantized a backbone alone'
        )


def test_the_zoo_lists_every_ready_config_once():
    collections, models = zoo()
    assert sorted(ROOT / model['Config'] for model in models) == sorted(READY)
    assert len({model['Name'] for model in models}) == len(models)
    assert [collection['Name'] for collection in collections] == list(
        COLLECTIONS.values()
    )
    assert all((ROOT / collection['README']).is_file() for collection in collections)


def test_the_package_has_the_zoo():
    mim = ROOT / 'mmptq' / '.mim'
    assert zoo(mim) == zoo()
    assert all((mim / model['Config']).is_file() for model in zoo()[1])


@pytest.mark.parametrize(
    ('size', 'depths', 'heads', 'channels'),
    [
        ('t', [2, 2, 6, 2], [3, 6, 12, 24], 96),
        ('s', [2, 2, 18, 2], [3, 6, 12, 24], 96),
        ('b', [2, 2, 18, 2], [4, 8, 16, 32], 128),
    ],
)
def test_cascades_are_those_that_the_authors_of_swin_trained(
    size, depths, heads, channels
):
    model = Config.fromfile(
        ROOT / 'configs' / 'mmdet' / f'cascade-mask-rcnn_swin-{size}.py'
    ).model
    backbone = model.backbone
    assert (
        backbone.embed_dims,
        backbone.depths,
        backbone.num_heads,
        backbone.window_size,
    ) == (channels, depths, heads, 7)
    assert model.neck.in_channels == [channels * 2**level for level in range(4)]
    assert [head.bbox_coder.target_stds for head in model.roi_head.bbox_head] == [
        [0.1, 0.1, 0.2, 0.2],
        [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067],
    ]
    for head in model.roi_head.bbox_head:
        assert (head.type, head.norm_cfg.type, head.loss_bbox.type) == (
            'Shared4Conv1FCBBoxHead',
            'SyncBN',
            'GIoULoss',
        )
        assert head.reg_decoded_bbox and not head.reg_class_agnostic


def test_the_readme_has_the_table_of_known_backbones():
    assert support_table() in (ROOT / 'README.md').read_text()
