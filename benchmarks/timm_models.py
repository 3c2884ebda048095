"""timm, as mmptq finds it."""
from mmptq.backbones.timm_import import FOLDER, import_timm

__all__ = ['FOLDER', 'import_timm']
