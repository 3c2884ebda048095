"""Brute-force reference of AdaLog's layer search: every candidate is scored on all
tokens by computing the layer's output.

Written from the equations alone (methods, sections 'Uniform' and 'AdaLog (ECCV 2024)')
and independent of the package, to check it against. Tensors are float32, errors are
summed in float64. The only liberty is that candidates are scored in chunks, to bound
the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = 37  # r: the base of the logarithm is 2^(q/r)
BASES = range(10, 138)  # the 128 values of q
SHIFT = 0.16997124254703522  # c: minus the minimum of GELU
FLOOR = 1e-10  # least scale: a constant row has a percentile range of zero
CHUNK = 1 << 22  # elements of an operand or output computed at once


@dataclass
class Setting:
    """Sizes of the search: steps, survivors of a step, candidates of a step, and rounds
    over the two operands.
    """

    steps: int = 6
    width: int = 16
    candidates: int = 128
    rounds: int = 3


@dataclass
class UniformParams:
    """Scale and integer zero point, shaped to broadcast: () per tensor, (out, 1) per
    output channel, (heads, 1, 1) per head.
    """

    scale: Tensor
    zero_point: Tensor


@dataclass
class LogParams:
    """Scale and base 2^(q/37) of the logarithmic quantizer."""

    scale: float
    q: int


Score = Callable[
    [Tensor, Tensor], Tensor
]  # scales, zero points (candidates, groups) -> float64 errors (candidates, groups)


# ---------------------------------------------------------------- quantizers


def uniform(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | float, bits: int
) -> Tensor:
    """'Uniform': s (clip(round(x/s) + z, 0, N-1) - z)."""
    return scale * (
        (torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1) - zero_point
    )


def adalog(x: Tensor, scale: Tensor | float, q: int, bits: int) -> Tensor:
    """'Quantizer', not strict: k = round(-log2(clip(x/s, 1e-15, 1)) r/q), value s
    2^(-T1[k]) T2[k], and 0 for k >= N.
    """
    count = 2**bits
    grid = 2 * count - 2
    t1 = [k * q // ROOT for k in range(count)]
    t2 = [round(grid * 2.0 ** (-(k * q % ROOT) / ROOT)) / grid for k in range(count)]
    table = torch.tensor(
        [2.0**-a * b for a, b in zip(t1, t2, strict=True)] + [0.0],
        dtype=x.dtype,
        device=x.device,
    )
    k = torch.round(-torch.log2((x / scale).clamp(1e-15, 1)) * ROOT / q)
    return scale * table[k.clamp(max=count).long()]


# ---------------------------------------------------------------- errors


def linear_error(
    x: Tensor, weight: Tensor, x_quantized: Tensor, w_quantized: Tensor
) -> float:
    """'Objective': squared error of a linear layer's output against the float output,
    over all tokens and channels.
    """
    return float((x_quantized @ w_quantized.T - x @ weight.T).double().square().sum())


def matmul_error(
    a: Tensor, b: Tensor, a_quantized: Tensor, b_quantized: Tensor
) -> float:
    """'Objective': squared error of the product a b against the float product, over all
    windows, heads and entries.
    """
    return float((a_quantized @ b_quantized - a @ b).double().square().sum())


def in_chunks(score: Score, largest: int) -> Score:
    """The same score, a few candidates at a time; `largest` is the number of elements
    that one candidate needs.
    """
    size = max(1, CHUNK // largest)
    return lambda scale, zero: torch.cat(
        [score(s, z) for s, z in zip(scale.split(size), zero.split(size), strict=True)]
    )


# ---------------------------------------------------------------- candidates


def percentile(values: Tensor, fraction: float) -> Tensor:
    """Percentile along the last axis, linear between the order statistics
    (torch.quantile without its limit on the size).
    """
    ordered = values.sort(dim=-1).values
    position = fraction * (values.shape[-1] - 1)
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[..., low] + (position - low) * (
        ordered[..., high] - ordered[..., low]
    )


def zero_points(bits: int, activation: bool) -> list[int]:
    """'FPCS': integers around N/2, min(16, N) of them for activations, min(16, N/2) for
    weights and matmul operands.
    """
    half = 2**bits // 2
    number = min(16, 2**bits if activation else half)
    return [half - number // 2 + i for i in range(number)]


def fpcs(
    values: Tensor, bits: int, activation: bool, score: Score, setting: Setting
) -> tuple[Tensor, Tensor]:
    """'FPCS' for each row of `values` (groups, n): the best scales and zero points,
    each (groups,).
    """
    zeros = zero_points(bits, activation)
    number = max(1, setting.candidates // len(zeros))
    narrow = percentile(values, 0.9) - percentile(values, 0.1)
    wide = percentile(values, 1.0) - percentile(values, 0.0)
    small, large = narrow / (2**bits - 1), wide / (2**bits - 1)
    spacing = (large - small) / max(1, number - 1)
    # the grid: every scale with every zero point
    scale = torch.stack(
        [small + i * spacing for i in range(number) for _ in zeros]
    ).clamp(min=FLOOR)
    zero = torch.tensor([float(z) for _ in range(number) for z in zeros])[
        :, None
    ].expand_as(scale)
    around = setting.candidates // setting.width
    for step in range(setting.steps):
        last = step == setting.steps - 1
        order = (
            score(scale, zero)
            .sort(dim=0, stable=True)
            .indices[: 1 if last else setting.width]
        )
        scale, zero = scale.gather(0, order), zero.gather(0, order)
        if not last:
            offsets = torch.linspace(-0.5, 0.5, around)
            scale = torch.cat([s + offsets[:, None] * spacing for s in scale]).clamp(
                min=FLOOR
            )
            zero = zero.repeat_interleave(around, dim=0)
            spacing = spacing / (around - 0.5)
    return scale[0], zero[0]


def own_error(values: Tensor, bits: int) -> Score:
    """Squared error of the quantized rows themselves."""

    def score(scale: Tensor, zero: Tensor) -> Tensor:
        return (
            (uniform(values, scale[..., None], zero[..., None], bits) - values)
            .double()
            .square()
            .sum(dim=-1)
        )

    return in_chunks(score, values.numel())


# ---------------------------------------------------------------- linear layers


def search_weight(
    weight: Tensor, bits: int, score: Score, setting: Setting
) -> UniformParams:
    """FPCS of a weight, per output channel."""
    scale, zero = fpcs(weight, bits, False, score, setting)
    return UniformParams(scale[:, None], zero[:, None])


def search_weight_given(
    x: Tensor, x_quantized: Tensor, weight: Tensor, bits: int, setting: Setting
) -> UniformParams:
    """'Objective', weights: output error of each output channel, independently, at the
    present X.
    """
    target = x @ weight.T

    def score(scale: Tensor, zero: Tensor) -> Tensor:
        quantized = uniform(weight, scale[..., None], zero[..., None], bits)
        return (
            (x_quantized @ quantized.transpose(1, 2) - target)
            .double()
            .square()
            .sum(dim=1)
        )

    return search_weight(
        weight, bits, in_chunks(score, max(target.numel(), weight.numel())), setting
    )


def search_activation(
    x: Tensor, bits: int, score: Score, setting: Setting
) -> UniformParams:
    """FPCS of an activation, per tensor."""
    scale, zero = fpcs(x.reshape(1, -1), bits, True, score, setting)
    return UniformParams(scale[0], zero[0])


def search_activation_given(
    x: Tensor, weight: Tensor, w_quantized: Tensor, bits: int, setting: Setting
) -> UniformParams:
    """'Objective', activations: output error over tokens and channels, at the present
    W.
    """
    target = x @ weight.T

    def score(scale: Tensor, zero: Tensor) -> Tensor:
        quantized = uniform(x, scale[..., None], zero[..., None], bits)
        return (
            (quantized @ w_quantized.T - target)
            .double()
            .square()
            .sum(dim=(1, 2))[:, None]
        )

    return search_activation(
        x, bits, in_chunks(score, max(target.numel(), x.numel())), setting
    )


def search_linear(
    x: Tensor,
    weight: Tensor,
    weight_bits: int,
    activation_bits: int,
    setting: Setting | None = None,
) -> tuple[UniformParams, UniformParams, float]:
    """'Order', linear: W and X on their own error once, then rounds of (W given X, X
    given W).

    x (tokens, in), weight (out, in). Returns the parameters of x, those of the weight,
    and the output error.
    """
    setting = setting or Setting()
    x, weight = x.detach().float(), weight.detach().float()
    w_params = search_weight(
        weight, weight_bits, own_error(weight, weight_bits), setting
    )
    x_params = search_activation(
        x, activation_bits, own_error(x.reshape(1, -1), activation_bits), setting
    )
    w_quantized = uniform(weight, w_params.scale, w_params.zero_point, weight_bits)
    x_quantized = uniform(x, x_params.scale, x_params.zero_point, activation_bits)
    for _ in range(setting.rounds):
        w_params = search_weight_given(x, x_quantized, weight, weight_bits, setting)
        w_quantized = uniform(weight, w_params.scale, w_params.zero_point, weight_bits)
        x_params = search_activation_given(
            x, weight, w_quantized, activation_bits, setting
        )
        x_quantized = uniform(x, x_params.scale, x_params.zero_point, activation_bits)
    return x_params, w_params, linear_error(x, weight, x_quantized, w_quantized)


def gelu_quantized(x: Tensor, params: LogParams, bits: int) -> Tensor:
    """'Post-GELU': x + c is quantized, and the bias reparameterisation takes c W_q 1
    off the output: what W_q sees is decode - c.
    """
    return adalog(x + SHIFT, params.scale, params.q, bits) - SHIFT


def search_log(
    x: Tensor,
    weight: Tensor,
    w_quantized: Tensor,
    bits: int,
    present: float,
    setting: Setting,
    refinements: int,
) -> LogParams:
    """'FPCS', post-GELU: all q at the present s, keep 8; times 16 scales, keep 32; then
    4 scales around each.
    """
    target = x @ weight.T
    keep_bases, keep_pairs = setting.candidates // setting.width, 2 * setting.width
    around = setting.candidates // keep_pairs

    def best(candidates: list[LogParams], keep: int) -> list[LogParams]:
        errors = [
            float(
                (gelu_quantized(x, p, bits) @ w_quantized.T - target)
                .double()
                .square()
                .sum()
            )
            for p in candidates
        ]
        return [
            candidates[i]
            for i in sorted(range(len(candidates)), key=errors.__getitem__)[:keep]
        ]

    bases = best([LogParams(present, q) for q in BASES], keep_bases)
    low, high = scale_range(x)
    spacing = (high - low) / max(1, setting.width - 1)
    pairs = [
        LogParams(low + i * spacing, p.q) for p in bases for i in range(setting.width)
    ]
    for _ in range(refinements):
        survivors = best(pairs, keep_pairs)
        offsets = [(i / (around - 1) - 0.5) * spacing for i in range(around)]
        pairs = [
            LogParams(max(p.scale + offset, FLOOR), p.q)
            for p in survivors
            for offset in offsets
        ]
        spacing = spacing / (around - 0.5)
    return best(pairs, 1)[0]


def scale_range(x: Tensor) -> tuple[float, float]:
    """'FPCS', post-GELU: the 0.9 and the 1.0 percentile of the positive part, plus c."""
    positive = x[x > 0]
    if positive.numel() == 0:
        return SHIFT, SHIFT
    return (
        float(percentile(positive, 0.9)) + SHIFT,
        float(percentile(positive, 1.0)) + SHIFT,
    )


def search_gelu_linear(
    x: Tensor,
    weight: Tensor,
    weight_bits: int,
    activation_bits: int,
    setting: Setting | None = None,
    refinements: int | None = None,
) -> tuple[LogParams, UniformParams, float]:
    """'Order', fc2: W on its own error, s the largest value plus c, then rounds of
    (base + scale, W).

    x (tokens, in) is post-GELU, weight (out, in). `refinements`: how many times scales
    are put around survivors, steps - 1 unless given. Returns the parameters of x + c,
    those of the weight, and the output error.
    """
    setting = setting or Setting()
    if setting.rounds < 1:
        raise ValueError(
            'the base is first searched in round 1: rounds must be at least 1'
        )
    refinements = setting.steps - 1 if refinements is None else refinements
    x, weight = x.detach().float(), weight.detach().float()
    w_params = search_weight(
        weight, weight_bits, own_error(weight, weight_bits), setting
    )
    w_quantized = uniform(weight, w_params.scale, w_params.zero_point, weight_bits)
    x_params = LogParams(scale_range(x)[1], ROOT)
    for _ in range(setting.rounds):
        x_params = search_log(
            x,
            weight,
            w_quantized,
            activation_bits,
            x_params.scale,
            setting,
            refinements,
        )
        x_quantized = gelu_quantized(x, x_params, activation_bits)
        w_params = search_weight_given(x, x_quantized, weight, weight_bits, setting)
        w_quantized = uniform(weight, w_params.scale, w_params.zero_point, weight_bits)
    return x_params, w_params, linear_error(x, weight, x_quantized, w_quantized)


def search_reparam(
    x: Tensor, bits: int, setting: Setting | None = None
) -> tuple[Tensor, Tensor]:
    """'Post-LayerNorm': per-channel (s_j, z_j) on the activation's own error, r = s/S
    and b = lo/r - LO, each (channels,).

    A channel that is always zero gets the mean scale and the rounded mean zero point of
    the others: r = 1, b = 0.
    """
    setting = setting or Setting()
    columns = x.detach().float().reshape(-1, x.shape[-1]).T.contiguous()
    scale, zero = fpcs(columns, bits, True, own_error(columns, bits), setting)
    alive = (columns != 0).any(dim=1)
    if not alive.any():
        return torch.ones_like(scale), torch.zeros_like(scale)
    mean_scale = scale[alive].mean()
    mean_zero = torch.round(zero[alive].mean())
    scale = torch.where(alive, scale, mean_scale)
    zero = torch.where(alive, zero, mean_zero)
    r = scale / mean_scale
    low, mean_low = -zero * scale, -mean_zero * mean_scale
    return r, low / r - mean_low


# ---------------------------------------------------------------- attention


def search_operand(
    a: Tensor,
    b: Tensor,
    bits: int,
    other: Tensor,
    left: bool,
    setting: Setting,
    own: bool = False,
) -> tuple[UniformParams, Tensor]:
    """FPCS per head of one operand of a b (windows, heads, ., .) with the other as it
    is at present; also the operand quantized.

    `own`: on the operand's own error instead of the product's.
    """
    operand = a if left else b
    rows = operand.transpose(0, 1).reshape(operand.shape[1], -1)
    target = a @ b

    def score(scale: Tensor, zero: Tensor) -> Tensor:
        quantized = uniform(
            operand, scale[:, None, :, None, None], zero[:, None, :, None, None], bits
        )
        product = quantized @ other if left else other @ quantized
        return (product - target).double().square().sum(dim=(1, 3, 4))

    by_output = in_chunks(score, max(target.numel(), operand.numel()))
    scale, zero = fpcs(
        rows, bits, False, own_error(rows, bits) if own else by_output, setting
    )
    params = UniformParams(scale[:, None, None], zero[:, None, None])
    return params, uniform(operand, params.scale, params.zero_point, bits)


def search_qk(
    q: Tensor,
    k: Tensor,
    bits: int,
    setting: Setting | None = None,
    own_start: bool = False,
) -> tuple[UniformParams, UniformParams, float]:
    """'Order', qk: rounds of (q, k), per head, on the error of q k^T.

    q (windows, heads, n, d), k (windows, heads, m, d). In round 1 q meets the float k,
    or with `own_start` k quantized on its own error. Returns the parameters of q, those
    of k, and the output error.
    """
    setting = setting or Setting()
    if setting.rounds < 1:
        raise ValueError(
            'both operands are first searched in round 1: rounds must be at least 1'
        )
    q, kt = q.detach().float(), k.detach().float().transpose(-2, -1)
    kt_quantized = (
        search_operand(q, kt, bits, q, False, setting, own=True)[1] if own_start else kt
    )
    for _ in range(setting.rounds):
        q_params, q_quantized = search_operand(q, kt, bits, kt_quantized, True, setting)
        k_params, kt_quantized = search_operand(
            q, kt, bits, q_quantized, False, setting
        )
    return q_params, k_params, matmul_error(q, kt, q_quantized, kt_quantized)


def search_pv(
    p: Tensor,
    v: Tensor,
    bits: int,
    setting: Setting | None = None,
    own_start: bool = False,
) -> tuple[LogParams, UniformParams, float]:
    """'Order', pv: rounds of (base, V): one q for the layer with s = 1 on the error
    over all heads, V uniform per head.

    p (windows, heads, n, m), v (windows, heads, m, d). In round 1 p meets the float v,
    or with `own_start` v quantized on its own error. Returns the parameters of p, those
    of v, and the output error.
    """
    setting = setting or Setting()
    if setting.rounds < 1:
        raise ValueError(
            'the base is first searched in round 1: rounds must be at least 1'
        )
    p, v = p.detach().float(), v.detach().float()
    v_quantized = (
        search_operand(p, v, bits, p, False, setting, own=True)[1] if own_start else v
    )
    for _ in range(setting.rounds):
        base = min(
            BASES,
            key=lambda q: matmul_error(p, v, adalog(p, 1.0, q, bits), v_quantized),
        )
        p_quantized = adalog(p, 1.0, base, bits)
        v_params, v_quantized = search_operand(p, v, bits, p_quantized, False, setting)
    return LogParams(1.0, base), v_params, matmul_error(p, v, p_quantized, v_quantized)
