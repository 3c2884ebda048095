"""The configs of one model: there and back, and that what is given stays as it is."""

import pytest
from mmengine.config import Config

from mmptq import QuantizationError
from mmptq.wrapping.configs import (
    config_of_tests,
    float_config,
    float_model,
    portable_config,
    quantized_config,
)

MODEL = dict(type='A', backbone=dict(type='B', depth=2))
HOOK = dict(type='mmptq.PTQHook', images=2, resume=True, pack=True, backend='integer')


def config(**parts):
    return Config(
        dict(model=MODEL, custom_hooks=[], work_dir='out', load_from='a.pth', **parts)
    )


def unchanged(function, cfg, *args):
    before = cfg.to_dict()
    result = function(cfg, *args)
    assert cfg.to_dict() == before
    return result


@pytest.mark.parametrize('scope', ['backbone', 'model'])
def test_a_quantizable_config_has_the_float_model_in_it(scope):
    wrapped = unchanged(quantized_config, config(), dict(name='r'), scope)
    assert unchanged(float_model, wrapped) == MODEL == float_model(config())
    where = wrapped.model if scope == 'model' else wrapped.model.backbone
    assert where.type.startswith('mmptq.Quant') and where.recipe == dict(name='r')
    augmented = Config(dict(model=dict(type='TTA', module=wrapped.model)))
    assert float_model(augmented) == MODEL
    with pytest.raises(QuantizationError, match='quantized already'):
        quantized_config(wrapped, {}, scope)


@pytest.mark.parametrize('model', [None, 3, dict(type='A'), dict(type='A', backbone=3)])
def test_a_model_without_a_backbone_is_none(model):
    for function in (float_model, lambda cfg: quantized_config(cfg, {}, 'backbone')):
        with pytest.raises(QuantizationError, match='no model with a backbone'):
            function(Config(dict(model=model)))


def test_what_belongs_to_one_run_is_not_given_away():
    cfg = quantized_config(config(), {}, 'model')
    cfg.custom_hooks = [HOOK, dict(type='Other', resume=True)]
    left = dict(layers=[dict(pattern='neck.conv', float=True)])
    given = unchanged(portable_config, cfg, left)
    assert (
        given.model.recipe == left
        and 'work_dir' not in given
        and 'load_from' not in given
    )
    assert given.custom_hooks == [
        dict(type='mmptq.PTQHook', images=2),
        dict(type='Other', resume=True),
    ]
    assert portable_config(cfg, {}).model.recipe == {}
    of_old = cfg.copy()
    of_old.model.idle = ['neck.conv']
    assert 'idle' not in portable_config(of_old, left).model
    cfg.model = dict(type='TTA', module=cfg.model)
    assert portable_config(cfg, left).model.module.recipe == left
    cfg = quantized_config(config(), {}, 'backbone')
    assert portable_config(cfg, left).model.backbone.recipe == left


def test_a_test_has_the_checkpoints_weights_and_one_hook():
    validated = dict(
        val_dataloader=dict(dataset=dict(type='D')), val_evaluator=dict(type='E')
    )
    cfg = config(**validated)
    cfg.custom_hooks = [HOOK, dict(type='Other')]
    cfg.model.backbone.pretrained = 'b.pth'
    cfg = unchanged(config_of_tests, cfg)
    assert (
        cfg.test_dataloader == cfg.val_dataloader
        and cfg.test_evaluator == cfg.val_evaluator
    )
    assert cfg.test_cfg == dict(type='TestLoop') and cfg.custom_hooks == [
        dict(type='Other')
    ]
    assert cfg.model.backbone.pretrained is None
    averaged = config()
    averaged.custom_hooks = [dict(type='EMAHook')]
    with pytest.raises(QuantizationError, match='EMAHook'):
        config_of_tests(averaged)


def test_the_float_model_is_evaluated_in_a_folder_of_its_own_without_the_hook():
    cfg = config()
    cfg.custom_hooks = [HOOK, dict(type='Other')]
    found = unchanged(float_config, cfg)
    assert found.work_dir == 'out/float' and found.custom_hooks == [dict(type='Other')]
