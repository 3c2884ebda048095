"""How the products and layers inside any attention module are reached, without a copy
of its forward.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import QuantizationError
from ..quantizers.base import is_traced
from .ops import QuantMatMul

# operator.matmul is what a strict torch.export sees of `a @ b`.
PRODUCTS = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, operator.matmul}
)


class RouteProducts(TorchFunctionMode):
    """While active, sends the first product to ``qk``, the second to ``pv``, and
    unfolds fused attention into both.

    A mode sees the calls of its own thread only, and is not active inside quantized
    operations themselves.
    """

    def __init__(self, name: str, attention: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.attention = attention
        self.products: list[Any] = [attention.qk, attention.pv]
        self.count = 0

    def route(self, input: Tensor, other: Tensor) -> Tensor:
        """The next of the two products; the arguments are called as those of
        torch.matmul.

        Heads that are folded into the batch, (batch * heads, rows, columns), are told
        apart by the attention's ``num_heads``.
        """
        heads = getattr(self.attention, 'num_heads', None)
        if input.ndim == 3 and isinstance(heads, int) and len(input) % heads == 0:
            return self.route(
                input.unflatten(0, (-1, heads)), other.unflatten(0, (-1, heads))
            ).flatten(0, 1)
        self.count += 1
        if input.ndim < 4:
            raise QuantizationError(
                f'{self.name} multiplies tensors of shape {tuple(input.shape)};'
                ' quantized attention expects (batch, heads, rows, columns), or (batch'
                ' * heads, rows, columns) and an attribute num_heads'
            )
        if self.count > 2:
            raise QuantizationError(
                f'{self.name} multiplies more than two pairs of tensors; quantized'
                ' attention expects exactly two: queries with keys, then probabilities'
                ' with values'
            )
        return self.products[self.count - 1](input, other)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in PRODUCTS:
            return self.route(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return self.fused(*args, **(kwargs or {}))
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """``F.linear``, by the quantized layer whose weight it is: an attention may
        read that without a call of its layer.
        """
        layer: Any = next(
            (
                child
                for child in self.attention.modules()
                if getattr(child, 'answers_for_weight', False)
                and child.weight is weight
            ),
            None,
        )
        if layer is None:
            return F.linear(input, weight, bias)
        if bias is layer.bias:
            return layer(input)
        if layer.bias is not None:
            raise QuantizationError(
                f'{self.name} uses the weight of a layer, but not its bias; quantized'
                ' attention expects both'
            )
        return layer(input) + bias

    def fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``F.scaled_dot_product_attention`` as its definition: two products and a
        softmax.
        """
        if is_causal or enable_gqa:
            raise QuantizationError(
                f'{self.name} uses causal or grouped-query attention, which no vision'
                ' backbone has'
            )
        query = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = self.route(query, key.transpose(-2, -1))
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, -math.inf)
                if attn_mask.dtype == torch.bool
                else scores + attn_mask
            )
        probabilities = scores.softmax(-1)
        if attn_mask is not None:  # a row that is masked entirely attends to nothing
            probabilities = probabilities.masked_fill(
                (scores == -math.inf).all(-1, keepdim=True), 0
            )
        return self.route(F.dropout(probabilities, dropout_p), value)


@cache
def _extended(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = RouteProducts(cls.__name__, self)
        with mode:
            output = cls.forward(self, *args, **kwargs)
        if mode.count != 2:
            raise QuantizationError(
                f'{cls.__name__} ran {mode.count} matrix products; quantized attention'
                ' expects exactly two. Remove it from the attentions of its'
                ' BackboneSpec, or give it an explicit form'
            )
        return output

    return type(
        f'Quant{cls.__name__}',
        (cls,),
        {'forward': forward, '__module__': cls.__module__},
    )


def extend_attention(attention: nn.Module) -> tuple[QuantMatMul, QuantMatMul]:
    """Gives an attention module the children ``qk`` and ``pv`` that compute its two
    products; quantizers to be set.

    Its class becomes a subclass of its own class, as in ``torch.nn.utils.parametrize``:
    isinstance, parameter names and the forward that runs stay those of the original.

    Raises:
        QuantizationError: If the module has a child or attribute of one of these names,
            and at its forward if not exactly two products ran.
    """
    taken = [name for name in ('qk', 'pv') if hasattr(attention, name)]
    if taken:
        raise QuantizationError(
            f'{type(attention).__name__} already has an attribute {taken[0]!r}: it'
            ' cannot be quantized'
        )
    qk, pv = QuantMatMul(), QuantMatMul()
    attention.qk, attention.pv = qk, pv
    attention.__class__ = _extended(type(attention))  # type: ignore[arg-type]
    return qk, pv


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` written out, for self-attention: torch hides its
    products and the packed projection.

    Reads the checkpoint keys of ``nn.MultiheadAttention`` (``in_proj_weight``,
    ``in_proj_bias``) as well as its own (``in_proj.weight``, ``in_proj.bias``). Shapes
    are ``(length, batch, channels)``, or batch first.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool,
        dropout: float,
        batch_first: bool,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = (
            embed_dim,
            num_heads,
            dropout,
            batch_first,
        )
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias)

    @classmethod
    def from_float(cls, attention: nn.MultiheadAttention) -> SelfAttention:
        """The same attention with the same (shared) parameters.

        Raises:
            QuantizationError: If it has separate key or value widths or extra key and
                value biases.
        """
        if (
            not attention._qkv_same_embed_dim
            or attention.bias_k is not None
            or attention.add_zero_attn
        ):
            raise QuantizationError(
                'nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn is'
                ' not supported'
            )
        assert attention.in_proj_weight is not None
        bias = attention.in_proj_bias is not None
        with torch.device('meta'):
            new = cls(
                attention.embed_dim,
                attention.num_heads,
                bias,
                attention.dropout,
                attention.batch_first,
            )
        new.in_proj.weight = attention.in_proj_weight
        new.out_proj.weight = attention.out_proj.weight
        if bias:
            new.in_proj.bias, new.out_proj.bias = (
                attention.in_proj_bias,
                attention.out_proj.bias,
            )
        new.train(attention.training)
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if (
            not (_same(query, key) and _same(query, value))
            or key_padding_mask is not None
            or is_causal
        ):
            raise QuantizationError(
                'only self-attention without key_padding_mask is supported in place of'
                ' nn.MultiheadAttention'
            )
        if not self.batch_first:
            query = query.transpose(0, 1)
        batch, length, _ = query.shape
        qkv = (
            self.in_proj(query)
            .view(batch, length, 3, self.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv.unbind(0)  # (batch, heads, length, channels / heads)
        scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
        if attn_mask is not None:
            attn_mask = (
                attn_mask.view(-1, self.num_heads, length, length)
                if attn_mask.dim() == 3
                else attn_mask
            )
            scores = (
                scores.masked_fill(attn_mask, -math.inf)
                if attn_mask.dtype == torch.bool
                else scores + attn_mask
            )
        probabilities = F.dropout(scores.softmax(-1), self.dropout, self.training)
        output = (
            (probabilities @ v).transpose(1, 2).reshape(batch, length, self.embed_dim)
        )
        output = self.out_proj(output)
        return (output if self.batch_first else output.transpose(0, 1)), None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for kind in ('weight', 'bias'):
            if f'{prefix}in_proj_{kind}' in state_dict:
                state_dict[f'{prefix}in_proj.{kind}'] = state_dict.pop(
                    f'{prefix}in_proj_{kind}'
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _same(a: Tensor, b: Tensor) -> bool:
    # What is traced has no memory to compare; it ran before, in calibration.
    return (
        a is b
        or is_traced()
        or (
            a.data_ptr() == b.data_ptr()
            and a.shape == b.shape
            and a.stride() == b.stride()
        )
    )
