"""Slide inference, memory and wrappers around a model."""
import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.calibration import Block, Call
from mmptq.engine import memory
from mmptq.engine.calibration import backbone_calls, check_memory, inner_model, quantization


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
    held = torch.ones(64 * memory.MIB // 4)
    assert peak.mib() >= before + 50 and held.sum() > 0
