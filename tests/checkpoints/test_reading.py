"""Checkpoints on disk: safe to read, whole or absent."""

import os

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmptq import QuantizationError
from mmptq.checkpoints.reading import (
    Unread,
    load_checked,
    load_file,
    safe_loading,
    without_prefix,
)
from mmptq.checkpoints.writing import save_atomically


class Code:
    def __reduce__(self):
        return os.getcwd, ()


def test_what_a_runner_saves_can_be_read(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    meta = {'scalar': np.float64(3)}
    torch.save(
        {
            'state_dict': {'w': torch.ones(2)},
            'message_hub': {'loss': history},
            'meta': meta,
        },
        tmp_path / 'a.pth',
    )
    checkpoint = load_file(tmp_path / 'a.pth')
    assert torch.equal(checkpoint['state_dict']['w'], torch.ones(2))
    assert isinstance(checkpoint['message_hub']['loss'], Unread)  # no one needs it


def test_mmengine_reads_no_code_within_safe_loading_and_the_environment_is_restored(
    tmp_path, monkeypatch
):
    torch.save({'state_dict': {}, 'meta': Code()}, tmp_path / 'code.pth')
    for before in (None, '0'):
        if before is not None:
            monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', before)
        with pytest.raises(Exception, match=r'[Ww]eights.only'), safe_loading():
            torch.load(tmp_path / 'code.pth', weights_only=False)  # as mmengine does
        assert os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD') == before


class Reach:
    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_the_way_to_histories_leads_nowhere_else(tmp_path):
    torch.save({'state_dict': {}, 'meta': Reach()}, tmp_path / 'reach.pth')
    assert isinstance(
        load_file(tmp_path / 'reach.pth')['meta'], Unread
    )  # and no method of anything


def test_plain_state_dict_is_a_checkpoint(tmp_path):
    torch.save({'w': torch.ones(2)}, tmp_path / 'plain.pth')
    assert set(load_file(tmp_path / 'plain.pth')['state_dict']) == {'w'}
    torch.save({'state_dict': {'w': 'text'}}, tmp_path / 'text.pth')
    with pytest.raises(QuantizationError, match=r'text\.pth'):
        load_file(tmp_path / 'text.pth')


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    save_atomically({'version': 1}, path)

    def full(data, target):
        with open(target, 'wb') as file:
            file.write(b'half')
        raise OSError('no space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError):
        save_atomically({'version': 2}, path)
    assert torch.load(path, weights_only=True) == {'version': 1} and os.listdir(
        tmp_path
    ) == ['a.pth']


def test_versions_of_modules_are_kept_without_the_prefix_of_a_distributed_model():
    """Heads of mmdet rename old weights by these; torch keeps them beside a state dict."""
    versions = []

    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *args):
            versions.append(metadata.get('version'))
            super()._load_from_state_dict(state, prefix, metadata, *args)

    model = Versioned(2, 2)
    state = model.state_dict()
    assert load_checked(model, state, 'a.pth') == []
    assert versions == [2] and without_prefix(state)._metadata is state._metadata
    assert list(without_prefix({'module.fc.module.weight': state['weight']})) == [
        'fc.module.weight'
    ]
