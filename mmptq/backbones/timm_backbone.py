"""Transformers of timm as backbones of detectors and segmentors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from ..errors import QuantizationError
from ..registry import MODELS
from .spec import find_spec
from .timm_import import import_timm

ANY_SIZE: tuple[dict[str, bool], ...] = (
    dict(dynamic_img_size=True),
    dict(strict_img_size=False),
    {},
)
"""What makes a model take images of any size; the first that a family knows is used,
and BEiT knows none.
"""


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """A transformer of timm: feature maps of several strides (Swin), or of several
    depths and one stride (ViT).

    Images may be of any size: they are padded at the right and bottom to whole patches,
    position embeddings are interpolated. Only BEiT takes images of its ``img_size``
    alone.

    Args:
        model_name: One of ``timm.list_models()``.
        out_indices: The feature maps to return: after which blocks (ViT) or stages
            (Swin), from 0; negative ones count from the end. What comes after the last
            of them is dropped.
        pretrained: A local file with weights for the model, .safetensors or .pth, of
            which the final norm and the classifier are left out; by default the weights
            are random.
        options: Of the model, as ``timm.create_model`` takes them: ``img_size``,
            ``drop_path_rate``, ...

    Raises:
        QuantizationError: If timm is missing or does not fit the environment, the model
            is unknown or no transformer that mmptq knows, it has no such feature maps,
            or the file is missing, broken or of another model.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int],
        pretrained: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        model = create_model(model_name, options)
        find_spec(model)
        depth = len(model.feature_info)
        maps = (
            [index % depth for index in out_indices if index in range(-depth, depth)]
            if isinstance(out_indices, Sequence)
            else []
        )
        if not maps or len(set(maps)) < len(out_indices):
            raise QuantizationError(
                f'out_indices {out_indices}: {model_name} has feature maps 0 to'
                f' {depth - 1}; list some, each once'
            )
        if pretrained is not None:
            load_pretrained(model, pretrained)
        self.out_indices = model.prune_intermediate_layers(
            list(out_indices), prune_norm=True
        )
        self.model: Any = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps (batch, channels, height, width) of images (batch, 3, height,
        width), in the order of the layers.
        """
        patches = self.model.patch_embed
        if patches.strict_img_size and x.shape[-2:] != patches.img_size:
            height, width = patches.img_size
            raise QuantizationError(
                f'{type(self.model).__name__} takes images of {height}x{width} only,'
                f' not {x.shape[-2]}x{x.shape[-1]}: give the backbone another'
                ' img_size=(height, width), and resize or pad all images to that'
            )
        height, width = patches.patch_size
        x = F.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % height))
        return tuple(
            self.model.forward_intermediates(
                x, indices=self.out_indices, intermediates_only=True
            )
        )


def create_model(name: str, options: dict[str, Any]) -> Any:
    """A model of timm with random weights, without its classifier, for images of any
    size if it can be.

    Raises:
        QuantizationError: If timm is missing, does not fit the environment, or has no
            such model.
    """
    timm = import_timm()
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models())
        raise QuantizationError(
            f'timm {timm.__version__} has no model {name!r}; '
            + (
                f'the nearest are {", ".join(near)}'
                if near
                else 'see timm.list_models()'
            )
        )
    for known in ANY_SIZE:
        try:
            return timm.create_model(name, **{'num_classes': 0, **known, **options})
        except TypeError as error:
            if not any(
                f"'{option}'" in str(error) for option in known.keys() - options.keys()
            ):
                raise
    raise AssertionError('the last try has no option of ours')


def load_pretrained(model: Any, path: str | Path) -> None:
    """Loads weights of a local file but final norm and classifier; position embeddings
    and bias tables are resized as by timm.

    Raises:
        QuantizationError: If it is missing, needs code to be read, or is of another
            model.
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        raise QuantizationError(
            f'pretrained={path!r} is no file: give the path of one that you have'
            ' downloaded'
        )
    try:
        state = import_timm().models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # it raises many kinds for a broken file
        raise QuantizationError(
            f'{path} cannot be read safely as weights:'
            f' {str(error).strip() or type(error).__name__}'
        ) from None
    try:
        adapt = getattr(
            sys.modules[type(model).__module__], 'checkpoint_filter_fn', None
        )
        state = adapt(state, model) if adapt else state
    except Exception as error:  # it looks for the parts of its model
        raise QuantizationError(
            f'{path} is not of a {type(model).__name__} with these options: {error}'
        ) from None
    classifiers = model.pretrained_cfg.get('classifier') or ()
    unused = tuple(
        f'{name}.'
        for name in (
            'norm',
            'fc_norm',
            *((classifiers,) if isinstance(classifiers, str) else classifiers),
        )
    )
    wanted = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(unused)
    }
    given = {key: value for key, value in state.items() if not key.startswith(unused)}
    for what, keys in (
        ('lacks', wanted.keys() - given.keys()),
        ('has besides', given.keys() - wanted.keys()),
        (
            'has in another shape',
            {
                key
                for key in wanted.keys() & given.keys()
                if wanted[key].shape != given[key].shape
            },
        ),
    ):
        if keys:
            raise QuantizationError(
                f'{path} is not of a {type(model).__name__} with these options: it'
                f' {what} {", ".join(sorted(keys)[:5])}'
                + (f' and {len(keys) - 5} more' if len(keys) > 5 else '')
            )
    model.load_state_dict(given, strict=False)
    print_log(
        f'{path}: loaded without'
        f' {", ".join(sorted(state.keys() - given.keys())) or "exception"}',
        logger='current',
    )
