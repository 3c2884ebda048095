"""Registries of mmptq. Importing this file is all that ``type='mmptq.X'`` needs in a config, with no custom_imports."""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

from . import methods, quantizers

# Who builds a quantized model may load a packed checkpoint next: its reader is registered by then.
MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmptq',
                  locations=['mmptq.backbones.build', 'mmptq.backbones.timm_backbone', 'mmptq.engine.packed'])
"""``QuantBackbone``, ``QuantModel`` and ``TimmBackbone``."""

HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmptq', locations=['mmptq.engine.hook'])
"""``PTQHook``."""

QUANTIZERS = Registry('quantizer', scope='mmptq')
"""What a recipe may name for a site."""

METHODS = Registry('method', scope='mmptq')
"""What a recipe may name as its method."""

for _module in (quantizers.UniformQuantizer, quantizers.AdaLogQuantizer, quantizers.DeMaxQuantizer, quantizers.Float):
    QUANTIZERS.register_module(module=_module)
for _method in (methods.MinMax, methods.AdaLog, methods.AdaLogBRECQ, methods.UQViT):
    METHODS.register_module(module=_method)
