"""The bundled demo, cut to a few images, quantized once a task."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / 'shared'
FEW = {'test_dataloader.dataset.indices': 6}


class Task:
    """A bundled model and how its test is cut short."""

    def __init__(self, name):
        self.config = str(ROOT / 'configs' / 'demo' / f'{name}.py')
        self.checkpoint = str(ROOT / 'demo' / f'{name}.pth')
        self.headline = 'mIoU' if 'upernet' in name else 'coco/bbox_mAP'
        self.package = 'mmseg' if 'upernet' in name else 'mmdet'


@pytest.fixture(scope='session')
def demo_data():
    sys.path.insert(0, str(ROOT / 'demo'))
    from generate_data import generate
    generate(ROOT / 'demo' / 'data')


@pytest.fixture(scope='session', params=['mask-rcnn_swin-demo', 'upernet_swin-demo'])
def task(request, demo_data):
    return Task(request.param)


@pytest.fixture(scope='session')
def upernet(demo_data):
    return Task('upernet_swin-demo')


@pytest.fixture(scope='session')
def quantized(task, tmp_path_factory):
    """Its work_dir after quantization to W4A4 with float and quantized evaluation, and what quantize returned."""
    from mmptq.apis import quantize
    work_dir = tmp_path_factory.mktemp(task.package)
    summary = quantize(task.config, task.checkpoint, 'minmax_w4a4', work_dir=str(work_dir), cfg_options=FEW, calib_images=3)
    return work_dir, summary
