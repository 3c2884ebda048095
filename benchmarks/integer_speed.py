"""Integer execution against float32 and other INT8 runtimes: seconds of a forward pass,
all sides in turn in every round.

Each side passes twice, and the second pass counts: so none pays for memory that the one
before it gave back.

    python benchmarks/integer_speed.py [--rounds 7] [--size 800 1216] [--recipes uqvit_w4a4_fast ...] [--json FILE]

The backbone of a stock Mask R-CNN Swin-T, batch 1; the whole detector, in integers its
backbone (scope `backbone`) or all of it (`model`); a whole UperNet DeiT-T of 512x512,
scope `model`. Weights and images are random, so that only time and memory are measured;
the random detector finds nothing, and its mask head does not run. ONNX Runtime (static
INT8, Q/DQ, per channel) and OpenVINO (NNCF, model_type TRANSFORMER, its default
precision of what is not INT8, and then float32 for that) quantize the same backbone on
the same image; each is left out where it is not installed (pip install openvino nncf).
As theirs, the weights of W8A8 are symmetric. torch's sides run with its own switch for
huge pages, THP_MEM_ALLOC_ENABLE=1. Memory is what a process needs more for a model and
its forward pass than before it had either; its allocator gives freed memory back at
once (MALLOC_MMAP_THRESHOLD_), so that tensors are counted and not what calibration left
behind.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # read at torch's first allocation

import torch
from common import parser, report
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from mmptq.apis import load_recipe
from mmptq.engine.calibration import calibrate_model
from mmptq.engine.data import CalibrationSet, load_config
from mmptq.engine.memory import Peak
from mmptq.runtime import to_integer
from mmptq.wrapping.configs import quantized_config

DETECTOR = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
SEGMENTOR = 'mmseg::vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py'
DEIT_TINY = dict(embed_dims=192, num_heads=3)
W8A8, W4A4 = 'minmax_w8a8_symmetric', 'minmax_w4a4'
RECIPES = W8A8, 'minmax_w8a8', W4A4


class Noise:
    """A data set of one image, as ``model.test_step`` takes it."""

    def __init__(self, package: str, size: tuple[int, int]) -> None:
        if package == 'mmdet':
            from mmdet.structures import DetDataSample as Sample
        else:
            from mmseg.structures import SegDataSample as Sample
        meta = dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            scale_factor=(1.0, 1.0),
            img_id=0,
        )
        image = torch.randint(
            0, 256, (3, *size), generator=torch.Generator().manual_seed(0)
        ).to(torch.uint8)
        self.item = dict(inputs=image, data_samples=Sample(metainfo=meta))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item


def config(package: str) -> Config:
    """That of the detector or segmentor, with random weights."""
    cfg = load_config(DETECTOR if package == 'mmdet' else SEGMENTOR)
    cfg.model.backbone.init_cfg = None
    if package == 'mmseg':
        cfg.model.update(pretrained=None)
        cfg.model.backbone.update(DEIT_TINY)
        width = DEIT_TINY['embed_dims']
        for part in ('neck', 'decode_head', 'auxiliary_head'):
            channels = cfg.model[part].in_channels
            cfg.model[part].in_channels = (
                [width] * len(channels) if isinstance(channels, list) else width
            )
        cfg.model.neck.out_channels = width
    return cfg


def built(
    package: str, size: tuple[int, int], recipe: str | None, scope: str = 'backbone'
) -> Any:
    """The model, float or quantized and calibrated on the image."""
    cfg = config(package)
    init_default_scope(package)
    torch.manual_seed(0)
    if recipe:
        cfg = quantized_config(cfg, load_recipe(recipe), scope)
    model = MODELS.build(cfg.model)
    model.eval()
    if recipe:
        images = CalibrationSet(Noise(package, size), [0], ['noise'], False)
        with tempfile.TemporaryDirectory() as folder:
            calibrate_model(
                model,
                images,
                0,
                logging.getLogger('mmptq.benchmarks'),
                Path(folder) / 'progress.pth',
            )
    return model


def image(size: tuple[int, int]) -> Tensor:
    """The backbone's input."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def onnxruntime_int8(x: Tensor, folder: Path) -> Callable[[], Any]:
    """ONNX Runtime's own INT8."""
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = [{'x': x.numpy()}]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    quant_pre_process(
        folder / 'float.onnx', folder / 'prepared.onnx', skip_symbolic_shape=True
    )
    quantize_static(
        folder / 'prepared.onnx',
        folder / 'int8.onnx',
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(
        'session.intra_op.allow_spinning', '0'
    )  # it would disturb the side that comes next
    session = onnxruntime.InferenceSession(
        folder / 'int8.onnx', options, providers=['CPUExecutionProvider']
    )
    return lambda: session.run(None, {'x': x.numpy()})


@functools.cache
def nncf_int8(x: Tensor, folder: Path) -> Any:
    """The backbone quantized by NNCF."""
    import nncf
    import openvino

    return nncf.quantize(
        openvino.convert_model(folder / 'float.onnx'),
        nncf.Dataset([x.numpy()]),
        subset_size=1,
        model_type=nncf.ModelType.TRANSFORMER,
    )


def openvino_int8(x: Tensor, folder: Path, **options: str) -> Callable[[], Any]:
    """OpenVINO's INT8."""
    import openvino

    compiled = openvino.Core().compile_model(
        nncf_int8(x, folder),
        'CPU',
        {
            'INFERENCE_NUM_THREADS': torch.get_num_threads(),
            'PERFORMANCE_HINT': 'LATENCY',
            **options,
        },
    )
    request = compiled.create_infer_request()
    return lambda: request.infer({0: x.numpy()})


def versions(*names: str) -> dict[str, str]:
    """Of packages, where they are installed."""
    return {name: metadata.version(name) for name in names if find_spec(name)}


def memory(side: str, size: tuple[int, int]) -> None:
    """Prints what a model and its forward pass need, MiB: for a process of its own."""
    torch.compile(torch.neg)(torch.ones(2))
    built('mmdet', (64, 64), None)  # imports
    gc.collect()
    x = image(size)
    before = Peak(torch.device('cpu')).mib()
    backbone = built('mmdet', size, None if side == 'float32' else side).backbone
    if side != 'float32':
        to_integer(backbone)
    with torch.no_grad():
        backbone(x)
        gc.collect()
        peak = Peak(torch.device('cpu'))
        backbone(x)
    print(json.dumps(peak.mib() - before))


def peak_memory(side: str, size: tuple[int, int]) -> float:
    """MiB, measured in a process of its own."""
    command = [
        sys.executable,
        '-W',
        'ignore',
        __file__,
        '--memory',
        side,
        '--size',
        *map(str, size),
    ]
    env = os.environ | {
        'MALLOC_MMAP_THRESHOLD_': str(2**16),
        'THP_MEM_ALLOC_ENABLE': '0',
    }
    return float(
        subprocess.run(
            command, check=True, capture_output=True, text=True, env=env
        ).stdout.split()[-1]
    )


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__)
    args.add_argument('--rounds', type=int, default=7)
    args.add_argument('--size', type=int, nargs=2, default=[800, 1216])
    args.add_argument(
        '--recipes', nargs='*', default=[], help='more recipes for the backbone'
    )
    args.add_argument(
        '--memory', help='print the peak memory of a side, and nothing else'
    )
    options = args.parse_args()
    size, small = (options.size[0], options.size[1]), (512, 512)
    if options.memory:
        memory(options.memory, size)
        return
    logging.getLogger('nncf').setLevel(logging.ERROR)
    x = image(size)
    detectors = {
        'float32': built('mmdet', size, None),
        **{name: built('mmdet', size, name) for name in (*RECIPES, *options.recipes)},
    }
    segmentors = {
        'float32': built('mmseg', small, None),
        W8A8: built('mmseg', small, W8A8, 'model'),
    }
    float_backbone = copy.deepcopy(detectors['float32'].backbone)
    paths = {
        name: to_integer(model.backbone)
        for name, model in detectors.items()
        if name != 'float32'
    }
    paths['segmentor'] = to_integer(segmentors[W8A8])
    sides: dict[str, Callable[[], Any]] = {
        f'backbone {name}': functools.partial(model.backbone, x)
        for name, model in detectors.items()
    }
    wholes = {
        'float32': detectors['float32'],
        f'{W8A8}, backbone': detectors[W8A8],
        W8A8: built('mmdet', size, W8A8, 'model'),
    }
    paths['detector'] = to_integer(wholes[W8A8])
    missing = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(
            float_backbone,
            (x,),
            f'{folder}/float.onnx',
            dynamo=False,
            opset_version=17,
            input_names=['x'],
        )
        for name, make in (
            ('onnxruntime int8', onnxruntime_int8),
            ('openvino int8', openvino_int8),
            (
                'openvino int8, else float32',
                functools.partial(openvino_int8, INFERENCE_PRECISION_HINT='f32'),
            ),
        ):
            try:
                sides[f'backbone {name}'] = make(x, Path(folder))
            except ImportError as error:
                missing[name] = str(error)
    for package, models, shape in (
        ('mmdet', wholes, size),
        ('mmseg', segmentors, small),
    ):
        batch = dict(
            inputs=[Noise(package, shape).item['inputs']],
            data_samples=[Noise(package, shape).item['data_samples']],
        )
        title = 'detector' if package == 'mmdet' else 'segmentor'
        for name, model in models.items():
            sides[f'{title} {name}'] = functools.partial(model.test_step, batch)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, run in sides.items():
            run()
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)

    def speedup(side: str, base: str) -> float | None:
        """The median over the rounds of how many times as fast a side is."""
        return (
            statistics.median(
                b / a for a, b in zip(seconds[side], seconds[base], strict=True)
            )
            if base in seconds
            else None
        )

    rows = [
        {
            'side': name,
            'seconds': statistics.median(values),
            'times as fast as float32': speedup(name, f'{name.split()[0]} float32'),
        }
        for name, values in seconds.items()
    ]
    mib = {name: peak_memory(name, size) for name in ('float32', W4A4)}
    about = dict(
        scope='backbone; detector, segmentor: model where not said',
        size=size,
        batch=1,
        calibration='the image itself, of random noise',
        rounds=options.rounds,
        versions=versions('onnxruntime', 'openvino', 'nncf'),
        bits={
            name: load_recipe(name)['bits'] for name in detectors if name != 'float32'
        },
        missing=missing,
        paths={
            name: {path: list(found.values()).count(path) for path in found.values()}
            for name, found in paths.items()
        },
        speedup_w8a8_vs_float32=speedup(f'backbone {W8A8}', 'backbone float32'),
        speedup_w4a4_vs_float32=speedup(f'backbone {W4A4}', 'backbone float32'),
        speedup_w8a8_vs_onnxruntime=speedup(
            f'backbone {W8A8}', 'backbone onnxruntime int8'
        ),
        speedup_w8a8_vs_openvino=speedup(f'backbone {W8A8}', 'backbone openvino int8'),
        speedup_w8a8_vs_openvino_float32=speedup(
            f'backbone {W8A8}', 'backbone openvino int8, else float32'
        ),
        speedup_detector_w8a8_vs_float32=speedup(
            f'detector {W8A8}', 'detector float32'
        ),
        speedup_segmentor_w8a8_vs_float32=speedup(
            f'segmentor {W8A8}', 'segmentor float32'
        ),
        peak_memory_mib=mib,
        peak_memory_w4a4_of_float32=mib[W4A4] / mib['float32'],
    )
    report(f'integer execution, {size[0]}x{size[1]}', rows, about, options.json)
    print(
        json.dumps(
            {
                key: value
                for key, value in about.items()
                if key.startswith(('speedup', 'peak', 'missing', 'paths'))
            },
            indent=2,
        )
    )


if __name__ == '__main__':
    main()
