"""Kernels of the integer runtime for a GPU, in Triton: codes of a layer norm, a product
of codes, an attention between its layers.

Each is one pass over memory. Codes are uint8, sums int32. A product of activations
holds its integers in float16, which has those up to 2048, and sums them in float32
below 2^24, so that it is exact; AdaLog's table values, of 9 bits and any power of two,
in TF32, where each product is exact, and their sum in float32 is not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention import FARTHEST
from ..windows import APART

UNIFORM, ADALOG, DEMAX = range(3)
KEYS = 128
"""Keys of a piece of a long row: of 255 times 255, so many sums stay below 2^24."""

_HALVES = tl.constexpr(1.5 * 2**23)
_APART = tl.constexpr(APART)
_FARTHEST = tl.constexpr(FARTHEST)
_UNIFORM, _ADALOG, _DEMAX = (tl.constexpr(kind) for kind in (UNIFORM, ADALOG, DEMAX))


@triton.jit
def _round(x):
    """To the nearest integer, halves to the even one, below 2^22: a float32 has no
    fractions where this moves it.
    """
    return (x + _HALVES) - _HALVES


@triton.jit
def _codes(x, inverse, zero, most):
    """``clip(round(x / s) + z, 0, most)``; cut before it is rounded, since ``most`` and
    z are integers.
    """
    steps = tl.minimum(tl.maximum(x * inverse, -zero), most - zero)
    return (_round(steps) + zero).to(tl.uint8)


@triton.jit(do_not_specialize=['rows'])
def encode_normalized_kernel(
    x,
    weight,
    bias,
    factor,
    shift,
    out,
    rows,
    eps,
    inverse,
    zero,
    most,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes of the layer norm of so many rows (rows, CHANNELS), changed by a factor and
    a shift for each channel.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    known = channel < CHANNELS
    inside = (row < rows)[:, None] & known[None, :]
    place = row[:, None] * CHANNELS + channel[None, :]
    values = tl.load(x + place, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, 1)[:, None] / CHANNELS, 0.0)
    factors = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / CHANNELS + eps))
    normed = (
        centred * factors[:, None] * tl.load(weight + channel, known, 0.0)[None, :]
        + tl.load(bias + channel, known, 0.0)[None, :]
    )
    changed = (
        normed * tl.load(factor + channel, known, 0.0)[None, :]
        - tl.load(shift + channel, known, 0.0)[None, :]
    )
    tl.store(out + place, _codes(changed, inverse, zero, most), inside)


@triton.jit(do_not_specialize=['rows'])
def multiply_kernel(
    codes,
    weight,
    lacking,
    excess,
    gain,
    offset,
    factor,
    shift,
    residual,
    out,
    rows,
    inverse,
    zero,
    most,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ABOVE: tl.constexpr,
    EXCESS: tl.constexpr,
    GELU: tl.constexpr,
    ADD: tl.constexpr,
    STEPS: tl.constexpr,
    CHANGE: tl.constexpr,
):
    """Codes (rows, INPUTS) times a weight (OUTPUTS, INPUTS): a tile of ROWS and COLUMNS
    of the output, DEPTH inputs at a time.

    ``sums + lacking + excess * sum of the codes``, times ``gain``, and ``offset``;
    through GELU; changed by ``factor`` and ``shift``; as steps, added to ``residual``,
    or as it is. Codes are multiplied as ``code - ABOVE``, which is 0 or 128.
    """
    across = (
        OUTPUTS + COLUMNS - 1
    ) // COLUMNS  # those of the same rows follow each other, and find them in the cache
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    known, wanted = row < rows, column < OUTPUTS
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    total = tl.zeros(
        (ROWS, 16), tl.int32
    )  # of the codes, in each of the fewest columns that a product has
    for start in range(0, INPUTS, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        here, there = known[:, None], wanted[None, :]
        if (
            INPUTS % DEPTH
        ):  # beyond the last input the weight is zero, so that codes are nothing there
            here, there = (
                here & (inner < INPUTS)[None, :],
                there & (inner < INPUTS)[:, None],
            )
        left = tl.load(codes + row[:, None] * INPUTS + inner[None, :], here, 0)
        left = (left ^ ABOVE).to(
            tl.int8, bitcast=True
        )  # code - 128 where codes have 8 bits
        right = tl.load(weight + column[None, :] * INPUTS + inner[:, None], there, 0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        if EXCESS:
            total = tl.dot(
                left, tl.full((DEPTH, 16), 1, tl.int8), total, out_dtype=tl.int32
            )
    sums += tl.load(lacking + column, wanted, 0)[None, :]
    if EXCESS:
        beyond = (DEPTH - INPUTS % DEPTH) % DEPTH  # inputs that are none, -ABOVE each
        sums += (tl.max(total, 1) + ABOVE * beyond)[:, None] * tl.load(
            excess + column, wanted, 0
        )[None, :]
    values = (
        sums.to(tl.float32) * tl.load(gain + column, wanted, 0.0)[None, :]
        + tl.load(offset + column, wanted, 0.0)[None, :]
    )
    if GELU:
        values = 0.5 * values * (1.0 + tl.math.erf(values * 0.7071067811865476))
    if CHANGE:
        values = (
            values * tl.load(factor + column, wanted, 0.0)[None, :]
            - tl.load(shift + column, wanted, 0.0)[None, :]
        )
    place, inside = (
        row[:, None] * OUTPUTS + column[None, :],
        known[:, None] & wanted[None, :],
    )
    if STEPS:
        tl.store(out + place, _codes(values, inverse, zero, most), inside)
    elif ADD:
        tl.store(out + place, tl.load(residual + place, inside, 0.0) + values, inside)
    else:
        tl.store(out + place, values, inside)


@triton.jit
def _row(
    token,
    region,
    window,
    place,
    images,
    tokens,
    length,
    per_image,
    WINDOWS: tl.constexpr,
):
    """The rows of places in a window, for padding the one behind the last; whether
    there is a token; and their regions.
    """
    image = (window // per_image).to(tl.int64)
    known = place < length
    if WINDOWS:
        index = (window % per_image) * length + place
        found = tl.load(token + index, known, tokens)
        row = tl.where(found < tokens, image * tokens + found, images * tokens)
        return row, known & (found < tokens), tl.load(region + index, known, 0)
    return image * tokens + place, known, place


@triton.jit
def _integers(
    steps,
    row,
    part,
    head,
    heads,
    channel,
    place,
    length,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Queries (part 0), keys (1) or values (2) of rows, (rows, channels); zeros beyond
    both.
    """
    inside = (place < length)[:, None] & (channel < CHANNELS)[None, :]
    step = tl.load(
        steps
        + row[:, None] * (3 * HEADS * CHANNELS)
        + (part * HEADS + head) * CHANNELS
        + channel[None, :],
        inside,
        0,
    )
    zero, low, high = (
        tl.load(heads + (3 * part) * HEADS + head),
        tl.load(heads + (3 * part + 1) * HEADS + head),
        tl.load(heads + (3 * part + 2) * HEADS + head),
    )
    return tl.where(
        inside, tl.minimum(tl.maximum(step.to(tl.float32) - zero, low), high), 0.0
    ).to(TYPE)


@triton.jit
def _scores(
    query,
    key,
    scale,
    bias,
    head,
    place,
    other,
    region,
    beside,
    length,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores of queries and keys; of keys beyond the last one minus infinity."""
    scores = tl.dot(query, tl.trans(key)) * scale
    inside = (other < length)[None, :]
    if BIAS:
        scores += tl.load(
            bias + (head * length + place[:, None]) * length + other[None, :],
            (place < length)[:, None] & inside,
            0.0,
        )
    if MASK:
        scores += tl.where(region[:, None] == beside[None, :], 0.0, _APART)
    return tl.where(inside, scores, float('-inf'))


@triton.jit(do_not_specialize=['images', 'tokens', 'length', 'per_image'])
def attend_kernel(
    steps,
    heads,
    bias,
    token,
    region,
    table,
    factor,
    shift,
    out,
    images,
    tokens,
    length,
    per_image,
    inverse,
    zero,
    most,
    last,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWS: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """An attention of one head, window and piece of queries: from steps of queries,
    keys and values to codes of its output.

    Two passes over pieces of keys: the first for what a softmax and DeMax need of a
    whole row, the second for the product.

    Args:
        steps: (images tokens + 1, 3 HEADS CHANNELS), uint8; the last row is that of
            padding.
        heads: For each head the zero, the lowest and the highest integer of queries,
            keys and values, what a score and what a sum is worth, and two numbers of
            the probabilities' coder, (13, HEADS).
        bias: Added to the scores, (HEADS, length, length).
        token: The token at each place of each window, (per_image, length).
        region: Its region.
        table: AdaLog's values.
        factor: Of the output's change, (HEADS CHANNELS,).
        shift: The same.
        out: (images tokens, HEADS CHANNELS), uint8.
        images: Their number.
        tokens: Of an image.
        length: Of a window.
        per_image: Windows.
        inverse: Of the output's coder 1 / s.
        zero: Its z.
        most: Its largest code.
        last: The largest code of the probabilities.
        HEADS: Their number.
        CHANNELS: Of a head.
        WIDTH: The power of two that they fit into.
        QUERIES: Of a piece.
        KEYS: Of a piece.
        WINDOWS: Whether there are windows; else each image is one.
        BIAS: Whether there is one.
        MASK: Whether regions do not see each other.
        KIND: Of the probabilities' coder.
        HALF: Whether DeMax's side data are float16.
        LENGTH: That of a window if it is compiled for, which leaves no loops; else 0.
    """
    if LENGTH:
        length = LENGTH
    window, head = tl.program_id(0), tl.program_id(1)
    place = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, WIDTH)
    row, real, region_of_query = _row(
        token, region, window, place, images, tokens, length, per_image, WINDOWS
    )
    query = _integers(
        steps, row, 0, head, heads, channel, place, length, HEADS, CHANNELS, tl.float16
    )
    scale, gain = tl.load(heads + 9 * HEADS + head), tl.load(heads + 10 * HEADS + head)
    first, second = (
        tl.load(heads + 11 * HEADS + head),
        tl.load(heads + 12 * HEADS + head),
    )

    # Of each row the largest score, the place of the first one, the largest of the
    # others, and the sum of powers.
    largest = tl.full((QUERIES,), float('-inf'), tl.float32)
    next_largest = tl.full((QUERIES,), float('-inf'), tl.float32)
    position = tl.zeros((QUERIES,), tl.int32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, length, KEYS):
        other = start + tl.arange(0, KEYS)
        key_row, _, region_of_key = _row(
            token, region, window, other, images, tokens, length, per_image, WINDOWS
        )
        key = _integers(
            steps,
            key_row,
            1,
            head,
            heads,
            channel,
            other,
            length,
            HEADS,
            CHANNELS,
            tl.float16,
        )
        scores = _scores(
            query,
            key,
            scale,
            bias,
            head,
            place,
            other,
            region_of_query,
            region_of_key,
            length,
            BIAS,
            MASK,
        )
        here = tl.max(scores, 1)
        if KIND == _DEMAX:
            at = tl.min(tl.where(scores == here[:, None], other[None, :], length), 1)
            rest = tl.max(
                tl.where(other[None, :] == at[:, None], float('-inf'), scores), 1
            )
            next_largest = tl.where(
                here > largest,
                tl.maximum(largest, rest),
                tl.maximum(next_largest, here),
            )
            position = tl.where(here > largest, at, position)
        grown = tl.maximum(largest, here)
        powers = tl.where(
            other[None, :] < length,
            tl.exp(tl.maximum(scores - grown[:, None], _FARTHEST)),
            0.0,
        )
        total = total * tl.exp(largest - grown) + tl.sum(powers, 1)
        largest = grown
    share = tl.div_rn(1.0, total)
    if KIND == _DEMAX:
        maximum = share
        step = tl.div_rn(
            tl.exp(tl.maximum(next_largest - largest, _FARTHEST)) * share, last
        )
        step = tl.where(next_largest == float('-inf'), 0.0, step)
        if HALF:
            maximum, step = (
                maximum.to(tl.float16).to(tl.float32),
                step.to(tl.float16).to(tl.float32),
            )
        usable = step > 1.1754943508222875e-38
        unit = tl.div_rn(1.0, tl.where(usable, step, 1.0))
        step = tl.where(usable, step, 0.0)

    sums = tl.zeros((QUERIES, WIDTH), tl.float32 if KIND == _ADALOG else tl.int32)
    taken = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        other = start + tl.arange(0, KEYS)
        key_row, _, region_of_key = _row(
            token, region, window, other, images, tokens, length, per_image, WINDOWS
        )
        key = _integers(
            steps,
            key_row,
            1,
            head,
            heads,
            channel,
            other,
            length,
            HEADS,
            CHANNELS,
            tl.float16,
        )
        value = _integers(
            steps,
            key_row,
            2,
            head,
            heads,
            channel,
            other,
            length,
            HEADS,
            CHANNELS,
            tl.float16,
        )
        scores = _scores(
            query,
            key,
            scale,
            bias,
            head,
            place,
            other,
            region_of_query,
            region_of_key,
            length,
            BIAS,
            MASK,
        )
        inside = (other < length)[None, :]
        powers = tl.where(
            inside, tl.exp(tl.maximum(scores - largest[:, None], _FARTHEST)), 0.0
        )
        if KIND == _UNIFORM:  # first: the scale; second: most - z
            codes = _round(
                tl.minimum(powers * tl.div_rn(1.0, total * first)[:, None], second)
            )
            sums += tl.dot(codes.to(tl.float16), value).to(tl.int32)
        elif KIND == _ADALOG:  # first: 1 / s; second: -r / q
            code = tl.minimum(
                tl.log2(tl.minimum(powers * share[:, None] * first, 1.0)) * second, last
            )
            known = tl.load(table + _round(code).to(tl.int32))
            sums += tl.dot(
                tl.where(inside, known, 0.0),
                value.to(tl.float32),
                input_precision='tf32',
            )
        else:
            chosen = other[None, :] == position[:, None]
            probabilities = tl.where(chosen, 0.0, powers * share[:, None])
            codes = _round(tl.minimum(probabilities * unit[:, None], last))
            sums += tl.dot(codes.to(tl.float16), value).to(tl.int32)
            taken += tl.dot(chosen.to(tl.float16), value)
    product = sums.to(tl.float32)
    if KIND == _DEMAX:
        product = product * step[:, None] + maximum[:, None] * taken
    at = head * CHANNELS + channel
    known = channel < CHANNELS
    changed = (
        product * gain * tl.load(factor + at, known, 0.0)[None, :]
        - tl.load(shift + at, known, 0.0)[None, :]
    )
    tl.store(
        out + row[:, None] * (HEADS * CHANNELS) + at[None, :],
        _codes(changed, inverse, zero, most),
        real[:, None] & known[None, :],
    )
