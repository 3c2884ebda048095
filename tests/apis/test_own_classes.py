"""Quantizers and methods of a user's own, which their config imports, in recipes of
files: each command in a process of its own, as a user runs it.
"""

import subprocess
import sys

import pytest

from .conftest import ROOT

OWN = """
from mmptq.methods import MinMax
from mmptq.quantizers import UniformQuantizer
from mmptq.registry import METHODS, QUANTIZERS


@QUANTIZERS.register_module()
class MyQuantizer(UniformQuantizer):
    pass


@METHODS.register_module()
class MyMethod(MinMax):
    pass
"""
RECIPE = """
_base_ = '{base}'
recipe = dict(name='mine', bits=dict(weight=4, activation=4), method=dict(type='MyMethod'), quantizers=dict(query=dict(type='MyQuantizer')))
"""
CONFIG = """
_base_ = '{base}'
custom_imports = dict(imports=['my_own', 'mmseg.models', 'mmseg.datasets', 'mmseg.evaluation', 'mmseg.engine', 'mmseg.visualization'])
"""


@pytest.fixture(scope='module')
def folder(upernet, tmp_path_factory):
    folder = tmp_path_factory.mktemp('own')
    base = ROOT / 'configs' / '_base_' / 'recipes' / 'minmax.py'
    (folder / 'my_own.py').write_text(OWN)
    (folder / 'mine.py').write_text(RECIPE.format(base=base))
    (folder / 'config.py').write_text(CONFIG.format(base=upernet.config))
    return folder


def command(folder, *words):
    done = subprocess.run(
        [sys.executable, '-m', 'mmptq', *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**__import__('os').environ, 'PYTHONPATH': f'{folder}:{ROOT}'},
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout + done.stderr


def test_a_config_imports_them_for_every_command(folder, upernet):
    quantize = ('quantize', 'config.py', upernet.checkpoint, '--recipe', 'mine.py')
    command(folder, *quantize, '--no-eval', '--calib-images', 1, '--work-dir', 'out')
    command(folder, 'pack', 'config.py', 'out/quantized.pth')
    for name in ('quantized.pth', 'quantized.safetensors'):
        again = command(
            folder,
            'quantize',
            'config.py',
            f'out/{name}',
            '--no-eval',
            '--work-dir',
            'again',
        )
        assert 'no calibration' in again


def test_without_the_import_they_are_unknown(folder, upernet):
    with pytest.raises(AssertionError, match=r"unknown type 'My"):
        command(
            folder,
            'pack',
            upernet.config,
            'out/quantized.pth',
            '--out',
            'x.safetensors',
        )
