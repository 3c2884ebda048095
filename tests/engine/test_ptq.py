"""The work on a model, without a Runner."""

import json
import logging

import pytest
import torch
from mmengine.config import Config

from mmptq import QuantizationError
from mmptq.checkpoints.reading import is_calibrated, load_file
from mmptq.engine.hook import PTQHook
from mmptq.engine.options import options_of_call
from mmptq.engine.ptq import PTQ, log_images, skipped_layers
from mmptq.layers import QuantOp

from ..conftest import build_in
from ..fuzz.harnesses import honest


@pytest.fixture
def work(tmp_path):
    """Makes the work on a fresh model, its calibrated checkpoint loaded."""

    def make(**options):
        cfg = honest().cfg.copy()
        cfg.custom_hooks = [dict(type='mmptq.PTQHook', images=2, resume=True)]
        logger = logging.getLogger('test')
        made = PTQ(options_of_call(options), cfg, tmp_path, logger, 'a.pth')
        model = build_in('mmseg', honest().cfg.model)
        meta = {'mmptq': honest().about, 'dataset_meta': honest().meta}
        made.load(model, {'state_dict': honest().state, 'meta': meta})
        return made, model

    return make


def on_disk(folder):
    return json.loads((folder / 'summary.json').read_text())


def test_a_calibrated_model_is_summed_up_and_nothing_is_drawn(work, tmp_path):
    made, model = work()
    (tmp_path / 'calibration_progress.pth').write_text('')
    made.run(model, pytest.fail)
    said = on_disk(tmp_path)
    assert (
        said == made.summary.to_dict()
        and said['schema'] == 2
        and said['quantized'] is None
    )
    assert said['calibration'] == honest().about['calibration']
    assert {row['name'] for row in said['layers'] if row['bits']} == {
        name for name, module in model.named_modules() if isinstance(module, QuantOp)
    }
    made.evaluated({'mIoU': torch.tensor(50.0), 'IoU.a': float('nan')}, 1.23456)
    assert on_disk(tmp_path) == {
        **said,
        'quantized': dict(
            metrics={'mIoU': 50.0, 'IoU.a': None}, seconds=1.235, backend='simulated'
        ),
    }
    assert [path.name for path in tmp_path.iterdir()] == ['summary.json']


def test_a_model_is_packed_and_converted_once_where_that_is_asked_for(
    work, tmp_path, monkeypatch
):
    converted = []

    def convert(model):
        converted.append(model)
        return {
            name: 'int8'
            for name, part in model.named_modules()
            if isinstance(part, QuantOp)
        }

    monkeypatch.setattr('mmptq.engine.ptq.to_integer', convert)
    made, model = work(pack=True, backend='integer')
    made.run(model, pytest.fail)
    assert (tmp_path / 'quantized.safetensors').exists()
    paths = {layer.name: layer.path for layer in made.summary.layers}
    assert (
        set(paths.values()) == {'int8', 'float'}
        and paths['decode_head.conv_seg'] == 'float'
    )
    made.run(model, pytest.fail)  # a second test of the same model
    assert converted == [model]


def test_files_of_a_model_are_those_of_its_summary(work, tmp_path):
    made, model = work()
    made.run(model, pytest.fail)
    made._write_model(model, made.summary)
    found = load_file(tmp_path / 'quantized.pth')
    assert found['meta'] == {
        'dataset_meta': honest().meta,
        'mmptq': made.summary.about(),
    }
    assert all(
        torch.equal(value, model.state_dict()[key])
        for key, value in found['state_dict'].items()
    )
    assert Config.fromfile(tmp_path / 'quantized.py').custom_hooks == [
        dict(type='mmptq.PTQHook', images=2)
    ]


def test_what_cannot_be_built_for_the_evaluation_is_said(work):
    made, model = work()

    def broken():
        raise KeyError('colour')

    with pytest.raises(QuantizationError, match=r'test data set or metric .* KeyError'):
        made.prepare(model, broken)


def test_layers_outside_of_the_backbone_are_outside_of_its_scope(work):
    _, model = work()
    left = skipped_layers(model, model.backbone.quantization)
    assert left['decode_head.conv_seg'] == 'outside_of_scope'
    assert not any(name.startswith('backbone.') for name in left) and is_calibrated(
        model
    )


class Images:
    dataset, paths, leak = range(5), ['a', 'b'], True


def test_too_few_images_and_a_leak_are_logged(caplog):
    logger = logging.getLogger('mmptq test of images')
    with caplog.at_level('INFO', logger.name):
        log_images(logger, Images(), 3)
    assert [record.levelname for record in caplog.records] == [
        'INFO',
        'WARNING',
        'WARNING',
    ]
    assert '2 of 5 images of range' in caplog.text and 'leak' in caplog.text


def test_a_hook_of_an_unknown_backend_or_option_is_refused():
    with pytest.raises(
        QuantizationError, match="unknown backend 'int8': it is one of simulated"
    ):
        PTQHook(backend='int8')
    with pytest.raises(QuantizationError, match='PTQHook has no option image'):
        PTQHook(image=3)
