"""``--backend integer`` on the bundled demo: the same files, the same metrics but for
rounding, and which path each layer took.
"""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmptq import QuantizationError
from mmptq.apis import quantize
from mmptq.checkpoints.reading import load_file, safe_loading
from mmptq.cli import main
from mmptq.layers import QuantOp
from mmptq.runtime import kernels

from .conftest import FEW


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(kernels, 'has_compiler', lambda: False)


def close(metrics, expected):
    """On six images one box or a few pixels may move."""
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(
            value, abs=0.005 if '/' in name else 0.5
        ), name


@pytest.fixture(scope='module')
def integer(task, quantized, tmp_path_factory):
    """The work_dir of an evaluation of the ready checkpoint in integers, and its
    summary.
    """
    work_dir = tmp_path_factory.mktemp('integer')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, 'has_compiler', lambda: False)
        args = [
            task.config,
            str(quantized[0] / 'quantized.pth'),
            '--work-dir',
            str(work_dir),
            '--no-float-eval',
            '--backend',
            'integer',
        ]
        assert (
            main(
                [
                    'quantize',
                    *args,
                    '--cfg-options',
                    *(f'{key}={value}' for key, value in FEW.items()),
                ]
            )
            == 0
        )
    return work_dir, json.loads((work_dir / 'summary.json').read_text())


def test_metrics_are_those_of_the_simulation(quantized, integer):
    summary = integer[1]
    assert (
        summary['quantized']['backend'] == 'integer'
        and quantized[1]['quantized']['backend'] == 'simulated'
    )
    close(summary['quantized']['metrics'], quantized[1]['quantized']['metrics'])
    assert (
        summary['float'] == quantized[1]['float']
        and not (integer[0] / 'quantized.pth').exists()
    )


def test_every_row_says_its_path_and_one_line_of_the_log_counts_them(
    quantized, integer
):
    work_dir, summary = integer
    assert [
        {key: value for key, value in row.items() if key != 'path'}
        for row in summary['layers']
    ] == quantized[1]['layers']
    paths = {row['name']: row['path'] for row in summary['layers']}
    assert all(
        (path == 'float') == (row['bits'] is None)
        for path, row in zip(paths.values(), summary['layers'], strict=True)
    )
    taken = [path for path in paths.values() if path != 'float']
    lines = [
        line
        for path in work_dir.rglob('*.log')
        for line in path.read_text().splitlines()
        if 'evaluated in integers' in line
    ]
    assert len(lines) == 1 and f'of its {len(taken)} quantized operations' in lines[0]
    assert all(f'{taken.count(path)} as {path}' in lines[0] for path in taken)


def test_calibration_and_files_are_as_without_it(task, quantized, tmp_path):
    summary = quantize(
        task.config,
        task.checkpoint,
        'minmax_w4a4',
        work_dir=str(tmp_path),
        cfg_options=FEW,
        calib_images=3,
        float_eval=False,
        pack=True,
        backend='integer',
    )
    theirs, ours = (
        load_file(path / 'quantized.pth') for path in (quantized[0], tmp_path)
    )
    assert ours['state_dict'].keys() == theirs['state_dict'].keys()
    assert all(
        torch.equal(value, theirs['state_dict'][key])
        for key, value in ours['state_dict'].items()
    )
    assert ours['meta']['mmptq']['layers'] == theirs['meta']['mmptq']['layers']
    assert (tmp_path / 'quantized.py').read_text() == (
        quantized[0] / 'quantized.py'
    ).read_text()
    close(summary['quantized']['metrics'], quantized[1]['quantized']['metrics'])
    again = quantize(
        task.config,
        str(tmp_path / 'quantized.safetensors'),
        work_dir=str(tmp_path / 'again'),
        cfg_options=FEW,
    )
    assert again['quantized'] == dict(
        again['quantized'],
        metrics=quantized[1]['quantized']['metrics'],
        backend='simulated',
    )


class Wrapped(nn.Module):
    """A model as a launcher wraps it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def test_step(self, data):
        """As mmengine's distributed wrapper."""
        return self.module.test_step(data)


def test_the_hook_in_a_config_with_a_wrapped_model_and_two_tests(
    upernet, quantized, task, tmp_path
):
    if task.package != upernet.package:
        pytest.skip('one of the two models is enough')
    cfg = Config.fromfile(quantized[0] / 'quantized.py')
    cfg.work_dir, cfg.load_from = str(tmp_path), str(quantized[0] / 'quantized.pth')
    cfg.custom_hooks = [dict(type='mmptq.PTQHook', backend='integer')]
    with safe_loading():
        runner = Runner.from_cfg(cfg)
        runner.model = Wrapped(runner.model)
        metrics = runner.test()
        assert not any(isinstance(module, QuantOp) for module in runner.model.modules())
        assert runner.test() == metrics
    close(
        {name: float(value) for name, value in metrics.items()},
        quantized[1]['quantized']['metrics'],
    )
    assert (
        json.loads((tmp_path / 'summary.json').read_text())['quantized']['backend']
        == 'integer'
    )


def test_an_unknown_backend_and_one_without_an_evaluation_are_refused(
    upernet, tmp_path, capsys
):
    settings = dict(work_dir=str(tmp_path), cfg_options=FEW, calib_images=1)
    with pytest.raises(
        QuantizationError,
        match="unknown backend 'int8': it is one of simulated, integer",
    ):
        quantize(
            upernet.config,
            upernet.checkpoint,
            'minmax_w4a4',
            backend='int8',
            **settings,
        )
    assert (
        main(
            [
                'quantize',
                upernet.config,
                upernet.checkpoint,
                '--work-dir',
                str(tmp_path),
                '--no-eval',
                '--backend',
                'integer',
            ]
        )
        == 2
    )
    assert (
        'backend integer is how the model is evaluated, and it is not to be'
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(['quantize', upernet.config, upernet.checkpoint, '--backend', 'int8'])
    assert 'invalid choice' in capsys.readouterr().err and not list(
        tmp_path.rglob('quantized.pth')
    )
