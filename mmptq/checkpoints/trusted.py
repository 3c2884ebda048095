"""Which models a file may have built that comes without a config of the user's.

A config is a program: to build a model runs the classes that it names, with the
arguments that it gives. Some of these classes read files, fetch addresses or unpickle
teachers. So from a file only classes are built that are on a list, from plain arguments
that name no place, and no more of them than its weights can fill.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import mmengine.registry.registry as registries
import torch
from mmengine.registry import MODELS, TASK_UTILS, Registry
from torch.overrides import TorchFunctionMode

from ..backbones.timm_import import timm_is_installed
from ..errors import QuantizationError
from .reading import safe_loading

resource: ModuleType | None
try:
    import resource
except ModuleNotFoundError:  # not on Windows
    resource = None
if not Path(
    '/proc/self/status'
).exists():  # nor where it would be of no use, as on macOS
    resource = None


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYERS = _names("""
    BN BN1d BN2d SyncBN MMSyncBN LN LN2d GN IN IN2d Conv Conv1d Conv2d ConvModule ConvWS ConvAWS
    DCN DCNv2 Linear Deconv deconv conv nearest bilinear pixel_shuffle carafe InterpConv ReLU
    ReLU6 LeakyReLU PReLU ELU GELU SiLU Swish QuickGELU HSwish HSigmoid Sigmoid Tanh Clamp Clip
    zero reflect replicate nms soft_nms RoIAlign RoIPool SinePositionalEncoding
    LearnedPositionalEncoding
""")
"""Layers and operations, those of mmcv and mmengine, for all packages."""

MMDET = _names("""
    SwinTransformer ViT MaskRCNN CascadeRCNN FasterRCNN RetinaNet ATSS FCOS GFL PAA VFNet RPN
    SingleStageDetector TwoStageDetector HybridTaskCascade QueryInst SparseRCNN DETR
    ConditionalDETR DABDETR DeformableDETR DINO DDQDETR MaskFormer Mask2Former PanopticFPN
    PointRend MaskScoringRCNN DetDataPreprocessor BatchFixedSizePad BatchResize
    BatchSyncRandomResize FPN PAFPN BFP HRFPN NASFPN ChannelMapper SimpleFPN DyHead RPNHead
    RetinaHead RetinaSepBNHead ATSSHead FCOSHead GFLHead PAAHead VFNetHead AnchorHead
    AnchorFreeHead StandardRoIHead CascadeRoIHead DynamicRoIHead HybridTaskCascadeRoIHead
    PointRendRoIHead MaskScoringRoIHead SparseRoIHead SingleRoIExtractor GenericRoIExtractor
    BBoxHead ConvFCBBoxHead Shared2FCBBoxHead Shared4Conv1FCBBoxHead DoubleConvFCBBoxHead
    FCNMaskHead HTCMaskHead FusedSemanticHead MaskIoUHead CoarseMaskHead MaskPointHead DIIHead
    DynamicMaskHead DynamicConv EmbeddingRPNHead DETRHead ConditionalDETRHead DABDETRHead
    DeformableDETRHead DINOHead DDQDETRHead MaskFormerHead Mask2FormerHead MaskFormerFusionHead
    PanopticFPNHead HeuristicFusionHead PixelDecoder TransformerEncoderPixelDecoder
    MSDeformAttnPixelDecoder CrossEntropyLoss FocalLoss L1Loss SmoothL1Loss BalancedL1Loss
    MSELoss IoULoss GIoULoss DIoULoss CIoULoss EIoULoss BoundedIoULoss DiceLoss QualityFocalLoss
    DistributionFocalLoss VarifocalLoss GaussianFocalLoss GHMC GHMR SeesawLoss AnchorGenerator
    SSDAnchorGenerator LegacyAnchorGenerator MlvlPointGenerator DeltaXYWHBBoxCoder
    LegacyDeltaXYWHBBoxCoder TBLRBBoxCoder DistancePointBBoxCoder PseudoBBoxCoder MaxIoUAssigner
    ATSSAssigner HungarianAssigner TaskAlignedAssigner DynamicSoftLabelAssigner PointAssigner
    BboxOverlaps2D RandomSampler PseudoSampler MaskPseudoSampler OHEMSampler CombinedSampler
    InstanceBalancedPosSampler IoUBalancedNegSampler ScoreHLRSampler BBoxL1Cost
    ClassificationCost CrossEntropyLossCost DiceCost FocalLossCost BinaryFocalLossCost IoUCost
""")


MMSEG = _names("""
    SwinTransformer VisionTransformer BEiT MAE EncoderDecoder CascadeEncoderDecoder
    SegDataPreProcessor BatchFixedSizePad FPN MultiLevelNeck Feature2Pyramid MLANeck JPU ICNeck
    UPerHead FCNHead PSPHead ASPPHead DepthwiseSeparableASPPHead DepthwiseSeparableFCNHead
    FPNHead SETRUPHead SETRMLAHead SegmenterMaskTransformerHead DPTHead SegformerHead
    MaskFormerHead Mask2FormerHead OCRHead LightHamHead ISAHead DAHead DNLHead NLHead GCHead
    EncHead CCHead ANNHead CrossEntropyLoss DiceLoss FocalLoss LovaszLoss TverskyLoss
    BoundaryLoss OhemCrossEntropy HuasdorffDisstanceLoss SiLogLoss SilogLoss OHEMPixelSampler
""")


CLASSES = {
    'mmcv': LAYERS,
    'mmengine': LAYERS,
    'mmdet': LAYERS | MMDET,
    'mmseg': LAYERS | MMSEG,
    'mmpretrain': (
        LAYERS | {'VisionTransformer', 'SwinTransformer', 'ClsDataPreprocessor'}
    ),
    'mmptq': {'TimmBackbone'},
}
"""By scope: the classes that are built from a file. Losses read files that a text
names, and several layers look up what a text names; texts are on a list, too.
"""

WORDS = _names("""
    add all_levels area avg BASIC bicubic bilinear BOTTLENECK caffe ciou cls_token concat
    cond_elewise corner diou featmap giou ignore iou linear map mean multiple_select nearest none
    normal on_input on_lateral on_output project pytorch raw resize_concat slide sum token whole
    xywh xyxy
""")
"""Texts that arguments may be."""

PATTERNS = {
    'arch': re.compile(r'[a-z]+(-[a-z]+)*'),
    'loss_name': re.compile(r'loss_\w+'),
    'model_name': re.compile(r'[a-z]\w*(\.\w+)?'),
}
"""Texts that single arguments may be beside: mmpretrain's sizes, names of losses,
models of timm.
"""

PLACES = re.compile(
    r'pretrained|check_?point|ckpt|file|url|uri|teacher|cache|load|_dir|config'
)
"""Names of arguments that say where something is to be read from."""

DOTTED = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)?')
MOST = 2**20
"""Whole numbers in a config are less: nothing in a model is so large."""


def trusted_model(model: dict[str, Any], default_scope: str) -> dict[str, Any]:
    """A copy of a model's config from a file, checked, without what initializes
    weights.

    Args:
        model: The config, plain data.
        default_scope: The package whose classes have no scope in their names.

    Raises:
        QuantizationError: If it names a class that is not on the list or not installed,
            or an argument of its is a place to read from, naming it.
    """
    if default_scope not in CLASSES:
        raise QuantizationError(
            f'the scope {default_scope!r} is none whose models are built from a file'
        )
    _import(default_scope)
    checked: dict[str, Any] = _checked(model, default_scope, 'model')
    return checked


def _checked(value: Any, scope: str, where: str) -> Any:
    if isinstance(value, dict):
        scope = value.get('_scope_', scope)
        return {
            key: _argument(key, item, scope, f'{where}.{key}')
            for key, item in value.items()
            if key != 'init_cfg'  # the file has all weights
        }
    if isinstance(value, list | tuple):
        return type(value)(_checked(item, scope, where) for item in value)
    if isinstance(value, str) and value not in WORDS:
        raise QuantizationError(
            f'{where}={value[:100]!r} is no text that a model from a file may have;'
            f' {OWN}'
        )
    if isinstance(value, int) and not abs(value) < MOST:
        raise QuantizationError(
            f'{where}={value} is larger than anything in a model; {OWN}'
        )
    return value


OWN = 'to build what you trust, give your own config'


def _argument(key: str, value: Any, scope: Any, where: str) -> Any:
    if not key.isidentifier():
        raise QuantizationError(f'{where} is no name of an argument; {OWN}')
    if key == '_scope_':
        if not isinstance(value, str) or value not in CLASSES:
            raise QuantizationError(f'{where}={value!r}: the scope is unknown; {OWN}')
        return value
    if key == 'type':
        _check_class(value, scope, where)
        return value
    if PLACES.search(key) and value not in (None, False):
        raise QuantizationError(f'{where} names a place to read from; {OWN}')
    if key in PATTERNS and isinstance(value, str) and PATTERNS[key].fullmatch(value):
        return value
    return _checked(value, scope, where)


def _check_class(name: Any, default_scope: Any, where: str) -> None:
    if not isinstance(name, str) or not DOTTED.fullmatch(name):
        raise QuantizationError(f'{where}={name!r} is no name of a class; {OWN}')
    scope, _, key = name.rpartition('.')
    scope = scope or default_scope
    if not isinstance(scope, str) or key not in CLASSES.get(scope, ()):
        raise QuantizationError(
            f'{where}={name!r}: the class is not on the list of those that are built'
            f' from a file; {OWN}'
        )
    _import(scope)
    found = any(key in registry.module_dict for registry in _registries(scope))
    if not found and (scope != default_scope or key not in LAYERS):
        raise QuantizationError(f'{where}={name!r}: the class is not installed')
    if key == 'TimmBackbone' and 'timm' not in sys.modules and not timm_is_installed():
        raise QuantizationError(f'{where}={name!r}: timm is not installed')


def _registries(scope: str) -> Iterator[Registry]:
    for root in (MODELS, TASK_UTILS):
        for registry in (root, *root.children.values()):
            if registry.scope == scope or registry is root:
                registry.import_from_location()
                yield registry


def _import(scope: str) -> None:
    """Imports a package on the list, whose classes are then in the registries.

    Only one that is installed: a folder of its name beside a file is not.
    """
    if scope not in sys.modules and not packages_distributions().get(scope):
        return
    for module in (f'{scope}.registry', f'{scope}.models'):
        try:
            import_module(module)
        except ImportError:
            continue


class Bounded(TorchFunctionMode):
    """Within it, no more tensors come into being than a number of values, and a number
    of calls, allow.
    """

    NEW = frozenset(
        getattr(torch, name)
        for name in [
            'empty',
            'zeros',
            'ones',
            'full',
            'rand',
            'randn',
            'randint',
            'arange',
            'linspace',
            'eye',
            'randperm',
        ]
    )

    def __init__(self, values: int, calls: int) -> None:
        super().__init__()
        self.values = values
        self.calls = calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.calls -= 1  # copies of layers make no new tensors, but calls
        if func in self.NEW:
            self.values -= _count(args) + _count(tuple((kwargs or {}).values()))
        if self.calls < 0 or self.values < 0:
            raise QuantizationError(
                'the model is much larger than the weights in the file'
            )
        return func(*args, **(kwargs or {}))


def _count(arguments: Any) -> int:
    """At least so many values as whole numbers among the arguments of a factory ask
    for.
    """
    product = 1
    for argument in arguments:
        if isinstance(argument, int) and not isinstance(argument, bool):
            product *= max(1, abs(argument))
        elif isinstance(argument, list | tuple):
            product *= _count(argument)
    return product


def _not_imported(name: str) -> None:
    """Stands for mmengine's last resort for a name that no registry has: to import it."""


@contextmanager
def _no_imports_by_name() -> Iterator[None]:
    before = registries.get_object_from_string
    registries.get_object_from_string = _not_imported
    try:
        yield
    finally:
        registries.get_object_from_string = before


@contextmanager
def _little_memory(size: int) -> Iterator[None]:
    """Within it the process gets so many bytes more and no others, where the system can
    see to that.
    """
    if resource is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = _data_bytes()
    limits = [
        used + size,
        *(limit for limit in before if limit != resource.RLIM_INFINITY),
    ]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """What the process has of memory that counts for RLIMIT_DATA."""
    fields = dict(
        line.split(':', 1)
        for line in Path('/proc/self/status').read_text().splitlines()
    )
    return int(fields['VmData'].split()[0]) * 1024


@contextmanager
def guarded(tensors: int, values: int) -> Iterator[None]:
    """Within it a model is built for so many tensors with so many values, and nothing
    is read or imported by name.
    """
    bounds = Bounded(4 * values + 2**24, 200 * tensors + 50_000)
    with (
        safe_loading(),
        _no_imports_by_name(),
        _little_memory(16 * values + 2**31),
        bounds,
    ):
        yield
