"""The packed checkpoint on the bundled demo: from the tool to a file, from the file to
the same metrics.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmptq import QuantizationError
from mmptq.apis import load_packed, pack, quantize
from mmptq.checkpoints.packed import read_packed
from mmptq.checkpoints.reading import load_file
from mmptq.cli import main

from ..conftest import fast, image
from .conftest import FEW


@pytest.fixture(scope='module')
def packed(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp('packed') / 'demo.safetensors'
    assert (
        main(
            [
                'pack',
                str(quantized[0] / 'quantized.py'),
                str(quantized[0] / 'quantized.pth'),
                '--out',
                str(path),
            ]
        )
        == 0
    )
    return path


def test_the_users_config_packs_the_same_file_beside_the_checkpoint(
    task, quantized, packed, tmp_path, capsys
):
    checkpoint = tmp_path / 'quantized.pth'
    checkpoint.write_bytes((quantized[0] / 'quantized.pth').read_bytes())
    assert main(['pack', task.config, str(checkpoint)]) == 0
    assert 'quantized.safetensors, ' in capsys.readouterr().out
    path = tmp_path / 'quantized.safetensors'
    assert (
        path.read_bytes() == packed.read_bytes()
        and path.stat().st_size < checkpoint.stat().st_size / 2
    )
    about = {key: value for key, value in quantized[1].items() if key != 'quantized'}
    assert read_packed(path)['meta']['mmptq'] == about


def test_quantize_evaluates_it_with_its_own_recipe_and_scope(
    task, quantized, packed, tmp_path
):
    summary = quantize(
        task.config, str(packed), work_dir=str(tmp_path), cfg_options=FEW
    )
    assert (
        summary['quantized']['metrics'] == quantized[1]['quantized']['metrics']
        and summary['float'] == quantized[1]['float']
    )
    assert (
        summary['recipe'] == quantized[1]['recipe']
        and not (tmp_path / 'float').exists()
    )
    with pytest.raises(
        QuantizationError,
        match=r'demo\.safetensors was quantized with recipe minmax_w4a4',
    ):
        quantize(
            task.config,
            str(packed),
            'minmax_w8a8',
            work_dir=str(tmp_path),
            cfg_options=FEW,
        )


def test_stock_test_tool_takes_it_for_a_checkpoint(
    upernet, quantized, packed, task, tmp_path
):
    if task.package != upernet.package:
        pytest.skip('one of the two tools is enough')
    package = Path(__import__(task.package).__file__).parent
    tool = next(
        path
        for path in (
            package / '.mim' / 'tools' / 'test.py',
            package.parent / 'tools' / 'test.py',
        )
        if path.exists()
    )
    done = subprocess.run(
        [
            sys.executable,
            str(tool),
            str(quantized[0] / 'quantized.py'),
            str(packed),
            '--work-dir',
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / 'summary.json').read_text())['quantized'][
        'metrics'
    ]
    assert metrics[task.headline] == pytest.approx(
        quantized[1]['quantized']['metrics'][task.headline], abs=1e-3
    )


def test_it_is_loaded_by_the_apis_of_the_packages_where_nothing_imports_mmptq(
    task, quantized, packed
):
    """In a fresh process: the reader of the file is registered by the time that a model
    was built.
    """
    name = 'detector' if task.package == 'mmdet' else 'model'
    code = (
        f'from {task.package}.apis import init_{name}\na, b ='
        f' (init_{name}({str(quantized[0] / "quantized.py")!r}, path,'
        f" device='cpu').state_dict() for path in ({str(packed)!r},"
        f' {str(quantized[0] / "quantized.pth")!r}))\nassert a.keys() =='
        ' b.keys()\nassert all((a[key] - b[key]).norm() < 0.5 * b[key].norm() for key'
        " in a if key.endswith('.weight'))\nprint('weights are equal but for their"
        " rounding')"
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert 'are equal but' in done.stdout, done.stderr[-2000:]
    meta = load_file(quantized[0] / 'quantized.pth')['meta']['dataset_meta']
    assert list(load_packed(packed).dataset_meta['classes']) == list(meta['classes'])


@torch.no_grad()
def test_scope_model_with_neck_and_heads_by_the_tools_flag(task, tmp_path, monkeypatch):
    recipe = fast() if task.package == 'mmseg' else 'minmax_w4a4'
    summary = quantize(
        task.config,
        task.checkpoint,
        recipe,
        scope='model',
        work_dir=str(tmp_path),
        cfg_options=FEW,
        calib_images=1,
        float_eval=False,
        pack=True,
    )
    packed, checkpoint = (
        tmp_path / 'quantized.safetensors',
        load_file(tmp_path / 'quantized.pth'),
    )
    assert 'pack=True' not in (tmp_path / 'quantized.py').read_text()
    rows = [row for row in summary['layers'] if row['bits'] and 'weight' in row['bits']]
    heads = [row['name'] for row in rows if not row['name'].startswith('backbone.')]
    state = read_packed(packed)['state_dict']
    model = load_packed(packed)
    assert len(heads) > 5 and {
        f'{name}.weight_quantizer.scale' for name in heads
    } <= set(state)
    x = image(64, 96)
    features = model.extract_feat(x)
    model.load_state_dict(checkpoint['state_dict'])
    assert all(
        torch.equal(a, b) for a, b in zip(features, model.extract_feat(x), strict=True)
    )
    assert any(
        not torch.equal(
            state[f'{name}.weight'], checkpoint['state_dict'][f'{name}.weight']
        )
        for name in heads
    )
    again = quantize(
        task.config, str(packed), work_dir=str(tmp_path / 'again'), cfg_options=FEW
    )
    assert (
        again['scope'] == 'model'
        and again['quantized']['metrics'] == summary['quantized']['metrics']
    )


def test_packing_what_is_not_quantized_or_of_another_model_is_refused(
    upernet, quantized, task, tmp_path, capsys
):
    assert (
        main(
            [
                'pack',
                upernet.config,
                upernet.checkpoint,
                '--out',
                str(tmp_path / 'a.safetensors'),
            ]
        )
        == 2
    )
    assert 'is not quantized' in capsys.readouterr().err
    assert (
        main(
            [
                'pack',
                task.config,
                str(quantized[0] / 'quantized.pth'),
                '--out',
                str(tmp_path / 'a.pth'),
            ]
        )
        == 2
    )
    assert 'is a .safetensors file' in capsys.readouterr().err
    if task.package != upernet.package:
        with pytest.raises(
            QuantizationError, match=r'quantized\.pth is of another model'
        ):
            pack(
                upernet.config,
                str(quantized[0] / 'quantized.pth'),
                str(tmp_path / 'a.safetensors'),
            )
    assert not os.listdir(tmp_path)


def test_a_config_that_cannot_be_packed_is_refused_before_the_calibration(
    upernet, tmp_path
):
    cfg = Config.fromfile(upernet.config)
    cfg.model.decode_head.dropout_ratio = np.float32(0)
    with pytest.raises(
        QuantizationError, match=r'model\.decode_head\.dropout_ratio cannot be packed'
    ):
        quantize(
            cfg,
            upernet.checkpoint,
            'minmax_w4a4',
            work_dir=str(tmp_path),
            cfg_options=FEW,
            calib_images=1,
            pack=True,
        )
    assert not list(tmp_path.rglob('quantized.*'))
