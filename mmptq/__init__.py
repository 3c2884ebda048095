"""mmptq: post-training quantization of Swin and ViT backbones in OpenMMLab detectors
and segmentors.
"""

from .errors import QuantizationError
from .version import __version__

__all__ = ['QuantizationError', '__version__']
