"""Registries of mmptq. Importing this file is all that ``type='mmptq.X'`` needs in a
config, with no custom_imports.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

from . import methods, quantizers

# Who builds a quantized model loads a checkpoint next: by then it is read by us,
# without running anything of it.
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmptq',
    locations=[
        'mmptq.backbones.build',
        'mmptq.backbones.timm_backbone',
        'mmptq.checkpoints.loaders',
    ],
)
"""``QuantBackbone``, ``QuantModel`` and ``TimmBackbone``."""

HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmptq', locations=['mmptq.engine.hook']
)
"""``PTQHook``."""

QUANTIZERS = Registry('quantizer', scope='mmptq')
"""What a recipe may name for a site."""

METHODS = Registry('method', scope='mmptq')
"""What a recipe may name as its method or as one of its stages."""


def registered(registry: Registry, name: str) -> Any:
    """What is registered as ``Name`` or ``scope.Name``, in a registry of ours or a
    child of it; None if nothing is.

    Names may come from a file. ``Registry.get`` would import a name that it does not
    know, and so run whatever it names.
    """
    scope, _, key = name.rpartition('.')
    if scope in ('', registry.scope):
        return registry.module_dict.get(key)
    child = registry.children.get(scope)
    return None if child is None else child.module_dict.get(key)


for _module in (
    quantizers.UniformQuantizer,
    quantizers.AdaLogQuantizer,
    quantizers.DeMaxQuantizer,
    quantizers.Float,
):
    QUANTIZERS.register_module(module=_module)
for _method in (
    methods.MinMax,
    methods.AdaLog,
    methods.AdaLogBRECQ,
    methods.UQViT,
    methods.BRECQ,
):
    METHODS.register_module(module=_method)
