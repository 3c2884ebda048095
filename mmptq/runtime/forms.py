"""Which modules of a model have a fused form, and this (:mod:`mmptq.backbones.fused`
says where their parts are).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..backbones.fused import BLOCKS, MAPPED, MERGINGS, NORMS, BlockParts, full_name
from .backend import Backend
from .base import has_hooks
from .blocks import IntegerBlock
from .errors import NoIntegerForm
from .linear import IntegerLinear
from .merging import MapNorm


def fused_forms(model: nn.Module, backend: Backend) -> dict[nn.Module, nn.Module]:
    """What a backend has for the blocks and layer norms of a model whose operations are
    converted.
    """
    forms: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        name = full_name(type(module))
        if name in MAPPED and backend.fuses_maps:
            norms = (
                norm for norm in module.children() if isinstance(norm, nn.LayerNorm)
            )
            forms |= {
                norm: MapNorm(norm)
                for norm in norms
                if full_name(type(norm)) in NORMS and not has_hooks(norm)
            }
        if name in BLOCKS and backend.block is not None:
            try:
                forms[module] = block_form(module, BLOCKS[name], backend.block)
            except (
                NoIntegerForm
            ):  # some of its operations stay simulated, or it computes more
                continue
    return forms


def block_form(
    block: nn.Module, parts: BlockParts, kind: type[IntegerBlock]
) -> IntegerBlock:
    """The fused form of a block.

    Raises:
        NoIntegerForm: If it computes anything else than this.
    """

    def part(name: str) -> Any:
        return _part(block, name)

    if has_hooks(block):
        raise NoIntegerForm('it has forward hooks')
    attention, proj, fc2 = part(parts.attention), part(parts.proj), part(parts.fc2)
    others = [part(name) for name in parts.identities]
    scales = [part(name) for name in parts.scales]
    gammas = [getattr(module, 'gamma', None) for module in scales]
    others += [
        module for module, gamma in zip(scales, gammas, strict=True) if gamma is None
    ]
    if any(module is not None and type(module) is not nn.Identity for module in others):
        raise NoIntegerForm('it computes more than a plain block')
    if any(full_name(type(part(name))) != kind for name, kind in parts.containers):
        raise NoIntegerForm('its parts are called in another way')
    if parts.attention_class not in map(full_name, type(attention).__bases__):
        raise NoIntegerForm(f'its attention is {full_name(type(attention))}')
    if any(
        full_name(type(part(name))) not in NORMS for name in (parts.norm1, parts.norm2)
    ):
        raise NoIntegerForm('its norms are no plain layer norms')
    width = proj.in_features // attention.num_heads
    windows = None if parts.windows is None else part(parts.windows)
    proj, fc2 = (
        (
            layer
            if gamma is None or type(layer) is not IntegerLinear
            else layer.scaled(gamma.detach())
        )
        for layer, gamma in zip((proj, fc2), gammas or (None, None), strict=True)
    )
    return kind(
        part(parts.norm1),
        part(parts.qkv),
        attention.qk,
        attention.pv,
        proj,
        part(parts.norm2),
        part(parts.fc1),
        part(parts.act),
        fc2,
        attention.num_heads,
        getattr(attention, 'scale', width**-0.5),
        None if windows is None else relative_position_bias(attention),
        None if windows is None else (windows.window_size, windows.shift_size),
    )


def relative_position_bias(attention: Any) -> Tensor:
    """Swin's, (heads, length, length)."""
    index: Tensor = attention.relative_position_index
    bias: Tensor = attention.relative_position_bias_table[index.view(-1)].view(
        *index.shape, -1
    )
    return bias.permute(2, 0, 1).contiguous().detach()


def is_merging(module: Any) -> bool:
    """Whether a module is a patch merging with a fused form."""
    if full_name(type(module)) not in MERGINGS or has_hooks(module):
        return False
    sampler = module.sampler
    return (
        all(value in (2, (2, 2)) for value in (sampler.kernel_size, sampler.stride))
        and sampler.dilation in (1, (1, 1))
        and sampler.padding in (0, (0, 0))
        and getattr(module.adap_padding, 'padding', None) == 'corner'
        and type(module.norm) is nn.LayerNorm
        and module.norm.weight is not None
        and module.norm.bias is not None
    )


def _part(block: nn.Module, name: str) -> Any:
    """A part of a block by its path, None if there is none."""
    try:
        return attrgetter(name)(block)
    except AttributeError:
        return None
