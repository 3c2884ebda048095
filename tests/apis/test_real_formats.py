"""COCO with 80 categories and ADE20K with 150 classes, in their own layouts and through
the stock configs of their data sets.
"""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmptq.apis import quantize
from mmptq.checkpoints.reading import load_file
from mmptq.engine.data import build_calibration_set, calibration_dataset

from ..datasets import ADE_LABELS, COCO_LABELS, EMPTY, write_ade20k, write_coco
from .conftest import ROOT, stock_tool
from .test_quantize import stock_test


class Model:
    """The demo's, with all classes of a real set, of which it finds those that it was
    trained for; on that set, at another scale.

    Args:
        name: Of the demo's model.
        data: The stock config of the data set.
        root: The data set.
        scale: Of its images.
        classifiers: The layers with an output for each class of the model, and the new
            places of these outputs.
    """

    def __init__(self, folder, package, name, data, root, scale, classifiers):
        self.package, self.root = package, root
        self.config, self.checkpoint = folder / f'{data}.py', folder / 'float.pth'
        self.config.write_text(f"_base_ = '{package}::_base_/datasets/{data}.py'\n")
        stock = Config.fromfile(self.config)
        cfg = Config.fromfile(ROOT / 'configs' / 'demo' / f'{name}.py')
        cfg.merge_from_dict(
            {
                key: {'_delete_': True, **value}
                for key, value in stock.items()
                if key.endswith(('dataloader', 'evaluator'))
            }
        )
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.update(num_workers=0, persistent_workers=False)
            loader.dataset.data_root = str(root)
            next(
                step for step in loader.dataset.pipeline if 'Resize' in step.type
            ).scale = scale
        if package == 'mmdet':
            cfg.test_evaluator.update(
                ann_file=str(root / 'annotations' / 'instances_val2017.json'),
                classwise=True,
            )
            cfg.model.roi_head.bbox_head.num_classes = (
                cfg.model.roi_head.mask_head.num_classes
            ) = 80
        else:
            cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = (
                150
            )
        cfg.dump(self.config)
        state = load_file(str(ROOT / 'demo' / f'{name}.pth'))['state_dict']
        for layer, (outputs, places) in classifiers.items():
            weight, bias = state[f'{layer}.weight'], state[f'{layer}.bias']
            state[f'{layer}.weight'] = weight.new_zeros(
                outputs, *weight.shape[1:]
            ).index_copy(0, torch.tensor(places), weight)
            state[f'{layer}.bias'] = bias.new_full((outputs,), -50.0).index_copy(
                0, torch.tensor(places), bias
            )
        torch.save(dict(meta={}, state_dict=state), self.checkpoint)

    def calibration_set(self, images=32, **changes):
        init_default_scope(self.package)
        cfg = Config.fromfile(self.config)
        evaluated = DATASETS.build(cfg.test_dataloader.dataset)
        return build_calibration_set(
            {**calibration_dataset(cfg), **changes}, images, 0, evaluated, False
        )


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    return Model(
        folder,
        'mmdet',
        'mask-rcnn_swin-demo',
        'coco_instance',
        write_coco(folder / 'coco'),
        (190, 150),
        {'roi_head.bbox_head.fc_cls': (81, (*COCO_LABELS, 80))},
    )


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ade20k')
    return Model(
        folder,
        'mmseg',
        'upernet_swin-demo',
        'ade20k',
        write_ade20k(folder / 'ade'),
        (400, 150),
        {
            'decode_head.conv_seg': (150, ADE_LABELS),
            'auxiliary_head.conv_seg': (150, ADE_LABELS),
        },
    )


def without_nan(metrics):
    return {
        name: None if math.isnan(value) else float(value)
        for name, value in metrics.items()
    }


@pytest.fixture(autouse=True)
def one_thread():
    """As in the stock tool's process: sums of several threads round otherwise, and a
    code may go to the other side.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quantized(model, folder, **options):
    """Quantizes a model and evaluates it before and after, by us and by the stock test
    tool; returns the summary, having compared them.
    """
    ours, stock = (
        folder / f'{name}{".pkl" if model.package == "mmdet" else ""}'
        for name in ('ours', 'stock')
    )
    summary = quantize(
        str(model.config),
        str(model.checkpoint),
        'minmax_w4a4',
        work_dir=str(folder),
        out=str(ours),
        **options,
    )
    assert summary == json.loads(
        (folder / 'summary.json').read_text(), parse_constant=pytest.fail
    )
    metrics, _ = stock_tool(
        model.package, model.config, model.checkpoint, folder / 'float by stock'
    )
    assert without_nan(metrics) == summary['float']['metrics']
    metrics, output = stock_tool(
        model.package,
        folder / 'quantized.py',
        folder / 'quantized.pth',
        folder / 'again',
        '--out',
        stock,
    )
    assert 'no calibration' in output
    assert (
        without_nan(metrics)
        == summary['quantized']['metrics']
        != summary['float']['metrics']
    )
    assert summary['scope'] == 'backbone' and summary['bits'] == dict(
        weight=4, activation=4, softmax=4
    )
    return summary, ours, stock


def test_coco_by_our_tool_and_by_the_stock_one(coco, tmp_path):
    summary, *predictions = quantized(coco, tmp_path)
    metrics = summary['float']['metrics']
    sizes = ('', '_50', '_75', '_s', '_m', '_l')
    assert {name for name in metrics if 'mAP' in name} == {
        f'coco/{kind}_mAP{size}' for kind in ('bbox', 'segm') for size in sizes
    }
    found = {
        name
        for name, value in metrics.items()
        if name.endswith('_precision') and value is not None
    }
    assert found == {
        f'coco/{name}_precision' for name in ('person', 'cup', 'toothbrush')
    }
    assert sum(name.endswith('_precision') for name in metrics) == 80
    assert metrics['coco/bbox_mAP'] > 0.5 and metrics['coco/segm_mAP'] > 0.5
    calibration = summary['calibration']
    assert (
        calibration['dataset'] == 'CocoDataset'
        and calibration['split'] == 'train'
        and calibration['leak'] is False
    )
    assert (
        calibration['images'] == 6
    )  # of 7; one is without objects, which the stock config leaves out
    ours, stock = (pickle.loads(path.read_bytes()) for path in predictions)
    assert len(ours) == len(stock) == 6
    for a, b in zip(ours, stock, strict=True):
        a, b = a['pred_instances'], b['pred_instances']
        assert a['masks'] == b['masks'] and all(
            torch.equal(a[name], b[name]) for name in ('bboxes', 'scores', 'labels')
        )


def test_ade20k_by_our_tool_and_by_the_stock_one(ade20k, tmp_path):
    summary, *predictions = quantized(ade20k, tmp_path)
    metrics = summary['quantized']['metrics']
    assert set(metrics) == {'aAcc', 'mIoU', 'mAcc'} and metrics['mIoU'] > 40
    calibration = summary['calibration']
    assert (
        calibration['dataset'] == 'ADE20KDataset'
        and calibration['split'] == 'train'
        and calibration['leak'] is False
    )
    assert calibration['images'] == 6
    files = [sorted(folder.glob('*.png')) for folder in predictions]
    assert len(files[0]) == 5
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    shown = np.concatenate(
        [np.array(Image.open(path)).ravel() for path in files[0]]
    )  # classes count from 1, as in the annotations
    labels = np.concatenate(
        [
            np.array(
                Image.open(ade20k.root / 'annotations' / 'validation' / path.name)
            ).ravel()
            for path in files[0]
        ]
    )
    shown, labels = shown[labels > 0], labels[labels > 0]
    united = {
        label: ((shown == label) | (labels == label)).sum() for label in range(1, 151)
    }
    ious = [
        ((shown == label) & (labels == label)).sum() / united[label]
        for label in united
        if united[label]
    ]
    assert metrics['mIoU'] == pytest.approx(100 * np.mean(ious), abs=0.006)
    assert metrics['aAcc'] == pytest.approx(100 * (shown == labels).mean(), abs=0.006)


def test_ade20k_in_slides(ade20k, tmp_path):
    """Windows, for calibration and evaluation; equal to the stock Runner, and not to
    whole images.
    """
    slides = {
        'model.test_cfg': dict(mode='slide', crop_size=(112, 112), stride=(80, 80))
    }
    few = {'test_dataloader.dataset.indices': 2}
    work_dir = tmp_path / 'ours'
    summary = quantize(
        str(ade20k.config),
        str(ade20k.checkpoint),
        'minmax_w4a4',
        work_dir=str(work_dir),
        calib_images=2,
        cfg_options={**slides, **few},
    )
    cfg = Config.fromfile(ade20k.config)
    cfg.merge_from_dict(few)
    _, whole = stock_test(cfg.copy(), ade20k.checkpoint, tmp_path / 'whole')
    cfg.merge_from_dict(slides)
    _, metrics = stock_test(cfg, ade20k.checkpoint, tmp_path / 'float')
    assert summary['float']['metrics'] == without_nan(metrics) != without_nan(whole)
    runner, metrics = stock_test(
        Config.fromfile(work_dir / 'quantized.py'),
        work_dir / 'quantized.pth',
        tmp_path / 'again',
    )
    assert (
        summary['quantized']['metrics'] == without_nan(metrics)
        and runner.model.test_cfg.mode == 'slide'
    )
    assert metrics['mIoU'] > 30


def test_images_of_coco_without_objects_are_calibrated_on_where_the_config_keeps_them(
    coco, tmp_path
):
    kept = coco.calibration_set()
    assert len(kept.paths) == 6 and not kept.leak
    assert all(path.startswith(str(coco.root / 'train2017')) for path in kept.paths)
    every = coco.calibration_set(filter_cfg=None)
    assert set(every.paths) - set(kept.paths) == {
        str(coco.root / 'train2017' / f'{139 + 146 * EMPTY:012}.jpg')
    }
    assert len(list(every.batches())) == 7
    summary = quantize(
        str(coco.config),
        str(coco.checkpoint),
        'minmax_w4a4',
        work_dir=str(tmp_path),
        evaluate=False,
        cfg_options={'train_dataloader.dataset.filter_cfg': None},
    )
    assert summary['calibration']['images'] == 7


def test_calibration_images_of_ade20k_are_of_the_training_part(ade20k):
    found = ade20k.calibration_set(images=4)
    assert len(found.paths) == 4 and not found.leak
    assert all(
        path.startswith(str(ade20k.root / 'images' / 'training'))
        for path in found.paths
    )
