"""Integer execution on a GPU against bfloat16 with torch.compile, all sides in turn in
every round; layers against the GPU's limits.

    python benchmarks/integer_gpu.py [--batch 8] [--size 800 1216] [--rounds 9] [--device cuda] [--json FILE]

The backbone of a stock Mask R-CNN Swin-T with random weights, calibrated on one random
image; its linear layers alone, bfloat16 products of torch against integer ones from
codes to codes. Limits are measured in the same run: a product of int8 matrices of 8192
x 8192 by `torch._int_mm`, and a copy of 1 GiB. A layer's bound is the larger of its
operations and its bytes over these; `of the limit` is that over its time.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import parser, report
from integer_speed import W4A4, W8A8, built
from torch import Tensor

from mmptq.apis import load_recipe
from mmptq.runtime import to_integer
from mmptq.runtime.blocks import IntegerBlock
from mmptq.runtime.linear import IntegerLinear
from mmptq.runtime.products import Steps

REPEATS = 20
"""Calls of a layer that are timed as one."""


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Of a call, on the average of several."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def interleaved(
    sides: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    repeats: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            taken = seconds(run, device, repeats)
            if number:
                found[name].append(taken)
    return found


def ratio(found: dict[str, list[float]], side: str, base: str) -> float:
    """The median over the rounds of how many times as fast a side is."""
    return statistics.median(
        b / a for a, b in zip(found[side], found[base], strict=True)
    )


def limits(device: torch.device) -> tuple[float, float]:
    """int8 operations and bytes a second, measured."""
    size, count = (8192, 2**30) if device.type == 'cuda' else (1024, 2**26)
    a, b = (
        torch.randint(-128, 128, (size, size), device=device).to(torch.int8)
        for _ in range(2)
    )
    x, y = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    found = interleaved(
        {'product': lambda: torch._int_mm(a, b.t()), 'copy': lambda: y.copy_(x)},
        5,
        device,
        5,
    )
    return 2 * size**3 / statistics.median(
        found['product']
    ), 2 * count / statistics.median(found['copy'])


def layer_row(
    shape: tuple[int, int, int],
    layer: IntegerLinear,
    rounds: int,
    device: torch.device,
    limit: tuple[float, float],
) -> dict[str, Any]:
    """A layer from codes to codes, and in bfloat16."""
    rows, inputs, outputs = shape
    codes = torch.randint(0, layer.coder.most + 1, (rows, inputs), device=device).to(  # type: ignore[union-attr]
        torch.uint8
    )
    steps = Steps(0.05, 128, 255)
    x, weight, bias = (
        torch.randn(*size, device=device, dtype=torch.bfloat16)
        for size in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    found = interleaved(
        {
            'bfloat16': lambda: F.linear(x, weight, bias),
            'int8': lambda: layer.product(codes, layer.gain, layer.offset, steps),
        },
        rounds,
        device,
        REPEATS,
    )
    taken = {name: statistics.median(values) for name, values in found.items()}
    operations, moved = (
        2 * rows * inputs * outputs,
        rows * (inputs + outputs) + inputs * outputs,
    )
    bound = max(operations / limit[0], moved / limit[1])
    return {
        'rows x inputs x outputs': ' x '.join(map(str, shape)),
        'bfloat16, us': 1e6 * taken['bfloat16'],
        'int8, us': 1e6 * taken['int8'],
        'times as fast': ratio(found, 'int8', 'bfloat16'),
        'operations, G': operations / 1e9,
        'bytes, M': moved / 1e6,
        'bound by': (
            'operations' if operations / limit[0] > moved / limit[1] else 'bytes'
        ),
        'of the limit': bound / taken['int8'],
    }


def mask_in_dtype(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a window's attention, its mask in the type of its tokens."""
    mask = kwargs.get('mask')
    return args, kwargs if mask is None else {**kwargs, 'mask': mask.to(args[0].dtype)}


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('--batch', type=int, default=8)
    args.add_argument('--size', type=int, nargs=2, default=[800, 1216])
    args.add_argument('--rounds', type=int, default=9)
    args.add_argument('--device', default='cuda')
    options = args.parse_args()
    if min(options.batch, options.rounds) < 1:
        args.error('--batch and --rounds are to be at least 1')
    if options.device.startswith('cuda') and not torch.cuda.is_available():
        args.error('there is no GPU; --device cpu only tries the benchmark out')
    device, size = torch.device(options.device), (options.size[0], options.size[1])
    torch.backends.cudnn.allow_tf32 = False
    x = torch.randn(
        options.batch, 3, *size, generator=torch.Generator().manual_seed(0)
    ).to(device)
    single = built('mmdet', size, None).backbone.to(device)
    half = copy.deepcopy(single).bfloat16()
    for module in half.modules():
        if hasattr(
            module, 'relative_position_bias_table'
        ):  # Swin makes its mask in float32, and would go on in it
            module.register_forward_pre_hook(mask_in_dtype, with_kwargs=True)
    sides: dict[str, Callable[[], Any]] = {
        'float32': functools.partial(single, x),
        'bfloat16, torch.compile': functools.partial(
            torch.compile(half, dynamic=False), x.bfloat16()
        ),
    }
    sides['bfloat16, torch.compile']()
    models = {
        name: built('mmdet', size, name).backbone.to(device) for name in (W8A8, W4A4)
    }
    paths = {name: to_integer(model) for name, model in models.items()}
    sides |= {name: functools.partial(model, x) for name, model in models.items()}
    shapes: dict[tuple[int, int, int], IntegerLinear] = {}

    def note(block: Any, args: tuple[Tensor, ...]) -> None:
        for layer in (block.qkv, block.proj, block.fc1, block.fc2):
            shapes[args[0].shape[:2].numel(), layer.in_features, layer.out_features] = (
                layer
            )

    handles = [
        module.register_forward_pre_hook(note)
        for module in models[W8A8].modules()
        if isinstance(module, IntegerBlock)
    ]
    models[W8A8](x)
    for handle in handles:
        handle.remove()
    found = interleaved(sides, options.rounds, device)
    base = 'bfloat16, torch.compile'
    rows = [
        {
            'side': name,
            'ms': 1000 * statistics.median(values),
            'times as fast as bfloat16': ratio(found, name, base),
        }
        for name, values in found.items()
    ]
    limit = limits(device)
    layers = [
        layer_row(shape, layer, options.rounds, device, limit)
        for shape, layer in shapes.items()
    ]
    about = dict(
        scope='backbone',
        size=size,
        batch=options.batch,
        rounds=options.rounds,
        calibration='one image of random noise',
        bits={name: load_recipe(name)['bits'] for name in models},
        int8_operations_per_s=limit[0],
        bytes_per_s=limit[1],
        paths={
            name: {path: list(each.values()).count(path) for path in each.values()}
            for name, each in paths.items()
        },
        speedup_w8a8_vs_bfloat16=ratio(found, W8A8, base),
        speedup_linears_vs_bfloat16=sum(row['bfloat16, us'] for row in layers)
        / sum(row['int8, us'] for row in layers),
        layers=layers,
    )
    report(
        f'integers on {options.device}, {options.batch} x {size[0]} x {size[1]}',
        rows,
        about,
        options.json,
    )
    report('linear layers, each once', layers, about, None)
    print(
        json.dumps(
            {key: value for key, value in about.items() if key.startswith('speedup')},
            indent=2,
        )
    )


if __name__ == '__main__':
    main()
