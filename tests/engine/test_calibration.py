"""Slide inference, memory and wrappers around a model."""

import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.calibration import Block, BlockResult, Call
from mmptq.checkpoints.progress import load_progress, save_progress
from mmptq.engine import memory
from mmptq.engine.calibration import (
    backbone_calls,
    check_memory,
    inner_model,
    quantization,
)


class Segmentor(nn.Module):
    """Calls its backbone on two windows of every batch, as slide inference does."""

    def __init__(self, mode):
        super().__init__()
        self.backbone = nn.Identity()
        self.test_cfg = dict(mode=mode)

    def test_step(self, batch):
        return [self.backbone(window) for window in batch.split(2)]


@pytest.mark.parametrize('mode, calls', [('whole', 3), ('slide', 6)])
def test_backbone_gets_every_window_of_slide_inference(mode, calls):
    batches = [torch.full((4,), float(number)) for number in range(3)]
    found = backbone_calls(Segmentor(mode), batches)
    assert len(found) == calls and torch.equal(found[-1].args[0], torch.full((2,), 2.0))


def test_wrappers_are_taken_off():
    model = Segmentor('whole')
    wrapper = nn.Module()
    wrapper.module = nn.Module()
    wrapper.module.module = model
    assert inner_model(wrapper) is model and inner_model(model) is model


def test_model_that_was_not_converted_is_refused():
    with pytest.raises(QuantizationError, match='QuantBackbone'):
        quantization(Segmentor('whole'))


def test_memory_is_measured_and_checked(monkeypatch):
    assert memory.available() is None or memory.available() > 2**20
    block = Block('stages.0', nn.Identity(), [Call((torch.zeros(1000),))], {})
    monkeypatch.setattr(memory, 'available', lambda: 3999)
    with pytest.raises(QuantizationError, match=r'stages\.0'):
        check_memory(block)
    monkeypatch.setattr(memory, 'available', lambda: 4000)
    check_memory(block)
    monkeypatch.setattr(memory, 'available', lambda: None)
    check_memory(block)


def test_peak_sees_what_was_taken_since():
    peak = memory.Peak(torch.device('cpu'))
    before = peak.mib()
    held = torch.ones(
        512 * memory.MIB // 4
    )  # more than what the kernel may take back of other pages meanwhile
    assert peak.mib() >= before + 300 and held[-1] > 0


# Progress on disk.


def results():
    weight = torch.arange(600.0).view(20, 30)
    return [
        BlockResult(
            'stages.0',
            {'fc.weight': weight, 'q.zero_point': torch.tensor(3)},
            {'fc': 20.5, 'qk': None},
        ),
        BlockResult('stages.1', {'fc.scale': torch.rand(5)}, {'fc': -1.25}),
    ]


def test_progress_is_what_was_saved(tmp_path):
    assert load_progress(tmp_path / 'a.pth', 'me') == {}
    save_progress(tmp_path / 'a.pth', 'me', results()[:1])
    found = load_progress(tmp_path / 'a.pth', 'me')['stages.0']
    expected = results()[0]
    assert (
        found.sqnr_db == expected.sqnr_db
        and found.params.keys() == expected.params.keys()
    )
    assert all(
        torch.equal(found.params[name], value)
        for name, value in expected.params.items()
    )
    with pytest.raises(QuantizationError, match='of a run with another checkpoint'):
        load_progress(tmp_path / 'a.pth', 'another')


def lost(content, key):
    del content[key]


DAMAGES = {
    **{
        f'no {key}': lambda content, key=key: lost(content, key)
        for key in ('identity', 'blocks', 'checksum')
    },
    'no params': lambda content: lost(content['blocks'][0], 'params'),
    'a surplus key': lambda content: content['blocks'][0].update(colour=1),
    'no list': lambda content: content.update(blocks=5),
    'no dict': lambda content: content.update(blocks=['stages.0']),
    'no tensor': (
        lambda content: content['blocks'][0]['params'].update({'fc.weight': [1.0]})
    ),
    'another value': (
        lambda content: content['blocks'][0]['params']['fc.weight'][3].add_(1)
    ),
    'another shape': (
        lambda content: content['blocks'][1]['params'].update(
            {'fc.scale': content['blocks'][1]['params']['fc.scale'][None]}
        )
    ),
    'another ratio': lambda content: content['blocks'][1]['sqnr_db'].update(fc=1.25),
    'another identity': lambda content: content.update(identity='yours'),
    'a block less': lambda content: content['blocks'].pop(),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_progress_is_refused(damage, tmp_path):
    save_progress(tmp_path / 'a.pth', 'me', results())
    content = torch.load(tmp_path / 'a.pth', weights_only=True)
    DAMAGES[damage](content)
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(QuantizationError, match=r'a\.pth is damaged; remove it'):
        load_progress(tmp_path / 'a.pth', 'me')


@pytest.mark.parametrize('content', [b'', b'nothing', None])
def test_progress_that_is_no_file_of_ours_is_refused(content, tmp_path):
    (
        torch.save([1], tmp_path / 'a.pth')
        if content is None
        else (tmp_path / 'a.pth').write_bytes(content)
    )
    with pytest.raises(QuantizationError, match=r'a\.pth is damaged; remove it'):
        load_progress(tmp_path / 'a.pth', 'me')


def test_flipped_bytes_never_pass_unseen(tmp_path):
    """They are refused, or it was padding or metadata of the archive."""
    path, (first, _) = tmp_path / 'a.pth', results()
    save_progress(path, 'me', [first])
    whole = path.read_bytes()
    for place in range(0, len(whole), 23):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        )
        try:
            found = load_progress(path, 'me')
        except QuantizationError:
            continue
        assert found['stages.0'].sqnr_db == first.sqnr_db
        assert all(
            torch.equal(found['stages.0'].params[name], value)
            for name, value in first.params.items()
        )
