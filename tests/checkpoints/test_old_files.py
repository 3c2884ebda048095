"""Files that version 0.1.0 wrote load as ever, through every door, and compute the
same.
"""

from pathlib import Path

import pytest
import torch

from mmptq.apis import load_packed
from mmptq.checkpoints.about import how_made
from mmptq.checkpoints.packed import read_checkpoint

FOLDER = Path(__file__).parent / 'version_0_1_0'
META = [dict(ori_shape=(64, 64), img_shape=(64, 64))]


def output(model):
    x = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64).sin()
    with torch.no_grad():
        return model.encode_decode(x, META)[..., ::4, ::4]


@pytest.fixture(params=['backbone', 'model'])
def folder(request):
    """The folder of a small segmentor: scope backbone with adalog_w4a4_fast, scope
    model with uqvit_w4a8_fast.
    """
    return FOLDER / request.param


def expected(folder):
    return torch.load(folder / 'output.pth', weights_only=True)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_what_they_say_is_read(folder, suffix):
    path = str(folder / f'quantized.{suffix}')
    made = how_made(read_checkpoint(path), path)
    assert (
        made.scope == folder.name
        and made.version == '0.1.0'
        and made.schema_number == 2
    )
    assert (
        made.bits.to_dict() == dict(weight=4, activation=4, softmax=4)
        or folder.name == 'model'
    )
    assert len(made.layers) > 10 and made.calibration.images == 2
    assert all(bool(layer.reason) == (layer.bits is None) for layer in made.layers)


@pytest.mark.parametrize('config', [None, 'quantized.py'])
def test_packed_files_load(folder, config):
    model = load_packed(
        folder / 'quantized.safetensors', config and str(folder / config)
    )
    torch.testing.assert_close(output(model), expected(folder), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_the_stock_api_loads_them(suffix):
    """Of scope backbone: mmseg's init_model cannot build what version 0.1.0 wrote for
    scope model.
    """
    from mmseg.apis import init_model

    folder = FOLDER / 'backbone'
    model = init_model(
        str(folder / 'quantized.py'), str(folder / f'quantized.{suffix}'), device='cpu'
    )
    torch.testing.assert_close(output(model), expected(folder), rtol=1e-3, atol=1e-3)
    assert model.dataset_meta['classes'][0] == 'striped_disc'
