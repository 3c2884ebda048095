"""The bundled demo, cut to a few images, quantized once a task."""

import json
import os
import subprocess
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


def stock_tool(package, config, checkpoint, work_dir, *args):
    """Runs the test tool of mmdet or mmseg in a process of its own; returns its metrics
    and what it wrote to the terminal.
    """
    folder = Path(__import__(package).__file__).parent
    tool = next(
        path
        for path in (
            folder / '.mim' / 'tools' / 'test.py',
            folder.parent / 'tools' / 'test.py',
        )
        if path.exists()
    )
    done = subprocess.run(
        [
            sys.executable,
            str(tool),
            str(config),
            str(checkpoint),
            '--work-dir',
            str(work_dir),
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads(next(Path(work_dir).glob('2*/2*.json')).read_text())
    return {
        name: value for name, value in log.items() if name not in ('data_time', 'time')
    }, done.stdout + done.stderr


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
def mask_rcnn(demo_data):
    return Task('mask-rcnn_swin-demo')


@pytest.fixture(scope='session')
def quantized(task, tmp_path_factory):
    """Its work_dir after quantization to W4A4 with float and quantized evaluation, and
    what quantize returned.
    """
    from mmptq.apis import quantize

    work_dir = tmp_path_factory.mktemp(task.package)
    summary = quantize(
        task.config,
        task.checkpoint,
        'minmax_w4a4',
        work_dir=str(work_dir),
        cfg_options=FEW,
        calib_images=3,
    )
    return work_dir, summary
