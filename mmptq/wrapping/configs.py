"""From the config of a float model to that of a quantizable one and back; every
function gives a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ..errors import QuantizationError

HOOK = 'mmptq.PTQHook'
OF_ONE_RUN = ('resume', 'pack', 'backend')
"""Options of the hook that a config which is given away does not have."""


def config_of_tests(cfg: Config) -> Config:
    """A config for tests: one evaluation, no PTQHook of its own, no weights but those
    of the checkpoint.

    Raises:
        QuantizationError: If it averages weights in a hook.
    """
    cfg = deepcopy(cfg)
    if not cfg.get('test_dataloader'):
        for kind in ('dataloader', 'evaluator'):
            cfg[f'test_{kind}'] = deepcopy(cfg.get(f'val_{kind}'))
        cfg.test_cfg = dict(type='TestLoop') if cfg.test_dataloader else None

    hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook['type'] != HOOK]
    if any(str(hook['type']).endswith('EMAHook') for hook in hooks):
        raise QuantizationError(
            'the config has an EMAHook, which would exchange the weights after their'
            ' calibration; remove it from custom_hooks, and give a checkpoint whose'
            ' state_dict holds the averaged weights'
        )
    cfg.custom_hooks = hooks

    backbone = (cfg.get('model') or {}).get('backbone') or {}
    if isinstance(backbone, ConfigDict) and 'pretrained' in backbone:
        backbone['pretrained'] = None
    return cfg


def quantized_config(cfg: Config, recipe: Mapping[str, Any], scope: str) -> Config:
    """A config whose backbone, or whole model, is quantizable.

    Args:
        cfg: The config of the float model.
        recipe: The recipe.
        scope: ``backbone`` or ``model``.

    Raises:
        QuantizationError: If its model has no backbone, or is quantizable already.
    """
    cfg = deepcopy(cfg)
    model: Any = cfg.get('model')
    backbone = model.get('backbone') if isinstance(model, ConfigDict) else None
    if _is_quantizable(model) or _is_quantizable(backbone):
        raise QuantizationError(
            'the config is quantized already; give the original one, or use the test'
            ' tool of mmdet or mmsegmentation'
        )
    if not isinstance(backbone, ConfigDict):
        raise QuantizationError('the config defines no model with a backbone')

    # The checkpoint has all weights, and a wrapped backbone takes no such argument.
    model.pop('pretrained', None)
    if scope != 'model':
        model.backbone = ConfigDict(
            type='mmptq.QuantBackbone', backbone=backbone, recipe=recipe
        )
        return cfg
    if cfg.get('data_preprocessor'):  # a Runner would give it to QuantModel
        model.setdefault('data_preprocessor', cfg.pop('data_preprocessor'))
    cfg.model = ConfigDict(type='mmptq.QuantModel', model=model, recipe=recipe)
    return cfg


def _is_quantizable(part: Any) -> bool:
    return isinstance(part, ConfigDict) and str(part.get('type')).startswith(
        'mmptq.Quant'
    )


def float_model(cfg: Config) -> dict[str, Any]:
    """The float model of a config that is quantizable or not.

    Raises:
        QuantizationError: If there is none.
    """
    model: Any = without_augmentation(deepcopy(cfg.get('model')))
    if isinstance(model, ConfigDict) and model.get('type') == 'mmptq.QuantModel':
        model = model.model
    if not isinstance(model, ConfigDict) or not isinstance(
        model.get('backbone'), ConfigDict
    ):
        raise QuantizationError('the config defines no model with a backbone')

    if model.backbone.get('type') == 'mmptq.QuantBackbone':
        model.backbone = model.backbone.backbone
    if 'pretrained' in model.backbone:
        model.backbone.pretrained = None  # a quantized checkpoint has all weights
    if cfg.get('data_preprocessor'):
        model.setdefault(
            'data_preprocessor', deepcopy(cfg.data_preprocessor)
        )  # as a Runner does
    return model.to_dict()  # type: ignore[no-any-return]


def float_config(cfg: Config) -> Config:
    """The config of an evaluation of the float model: in a folder of its own, without
    PTQHook.
    """
    cfg = deepcopy(cfg)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook['type'] != HOOK]
    cfg.work_dir = str(Path(cfg.work_dir) / 'float')
    return cfg


def portable_config(cfg: Config, recipe: Mapping[str, Any]) -> Config:
    """A quantizable config to give away: without where one run wrote, what it loaded,
    how it evaluated.

    Args:
        cfg: The config of the run.
        recipe: The recipe that the model has in the end: calibration may have left
            layers float.
    """
    cfg = deepcopy(cfg)
    if 'layers' in recipe:
        model = without_augmentation(cfg.model)
        part = model if 'recipe' in model else model.backbone
        part.recipe = recipe
        part.pop('idle', None)
    for key in ('work_dir', 'load_from'):
        cfg.pop(key, None)
    for hook in cfg.custom_hooks:
        if hook['type'] == HOOK:
            for key in OF_ONE_RUN:
                hook.pop(key, None)
    return cfg


def without_augmentation(model: Any) -> Any:
    """The config of a model inside of that of its test-time augmentation, which has it
    as ``module``.
    """
    while isinstance(model, ConfigDict) and _wraps(model):
        model = model.module
    return model


def _wraps(model: ConfigDict) -> bool:
    return 'backbone' not in model and 'module' in model
