"""Backbones as ONNX files: ONNX Runtime computes what torch does, in integers where
docs/onnx.md says so; else no file.
"""

import builtins
import copy
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from onnx import TensorProto

from mmptq import QuantizationError
from mmptq.apis import export, load_recipe
from mmptq.backbones import find_spec
from mmptq.calibration import Call, calibrate
from mmptq.checkpoints.packed import write_packed
from mmptq.cli import main
from mmptq.export.onnx import build_graph, compare, export_onnx
from mmptq.quantizers import calibrated_parts
from mmptq.wrapping.configs import quantized_config

from ..conftest import FAST, SWIN, VIT, about, build_in, image, mixed, randomized

TIMM = dict(
    type='mmptq.TimmBackbone',
    model_name='vit_tiny_patch16_224',
    out_indices=(1,),
    embed_dim=16,
    depth=2,
    num_heads=2,
    img_size=32,
)
METHODS = {
    'adalog': FAST,
    'uqvit': dict(
        images=1, rows=64, alphas=[0.0], plain_alphas=[0.2], propagate_error=False
    ),
    'minmax': {},
}
CASES = {
    ('mmdet swin', 'minmax_w8a8'): (46, 58),
    ('mmdet swin', 'uqvit_w4a4'): (46, 58),
    ('mmdet swin', 'adalog_w3a3'): (46, 58),
    ('mmseg vit', 'adalog_w4a4'): (64, 48),
    ('mmseg vit', 'uqvit_w8a8'): (64, 48),
    ('timm vit', 'minmax_w6a6_symmetric'): (40, 64),
}
"""Backbone and recipe: height and width, not multiples of the patches of a Swin."""


def calibrated(family, name, change=lambda recipe: recipe):
    torch.manual_seed(0)
    scope, backbone = {
        'mmdet swin': ('mmdet', SWIN),
        'mmseg vit': ('mmseg', VIT),
        'timm vit': ('mmseg', TIMM),
    }[family]
    recipe = load_recipe(name)
    recipe['method'].update(METHODS[name.split('_')[0]])
    model = randomized(
        build_in(
            scope,
            dict(type='mmptq.QuantBackbone', backbone=backbone, recipe=change(recipe)),
        )
    )
    calibrate(
        model,
        find_spec(model).block_names(model),
        [Call((image(64, 64),))],
        model.quantization.recipe.build_method(),
    )
    return model


@pytest.fixture(scope='module', params=CASES, ids=' '.join)
def exported(request):
    """The backbone, its recipe, an image, its graph and the operations in it."""
    model, shape = calibrated(*request.param), CASES[request.param]
    x = image(*shape, seed=1)
    return model, request.param[1], x, *build_graph(model, x)


def producers(graph):
    """The node or constant that makes each value."""
    return {
        **{value.name: value for value in graph.initializer},
        **{name: node for node in graph.node for name in node.output},
    }


def test_every_step_and_the_whole_are_those_of_torch(exported):
    model, _, x, graph, calls = exported
    found = compare(graph, calls, model, x)
    assert found.step < 1e-5, found
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    with torch.no_grad():
        expected = model(x)
        in_float = calibrated_as_float(model)(x)
    maps = session.run(None, {'image': x.numpy()})
    distances = [
        np.linalg.norm(a - b.numpy()) / np.linalg.norm(b)
        for a, b in zip(maps, expected, strict=True)
    ]
    assert (
        max(distances) == pytest.approx(found.end_to_end, rel=1e-3)
        and max(distances) < 0.02
    )
    assert min(
        float((a - b).norm() / b.norm())
        for a, b in zip(in_float, expected, strict=True)
    ) > 10 * max(distances)


def calibrated_as_float(model):
    """A copy of the model without its quantizers' parameters."""
    model = copy.deepcopy(model)
    for part in calibrated_parts(model).values():
        part.clear()
    return model


def test_weights_are_stored_as_integers_of_their_width(exported):
    model, recipe, _, graph, calls = exported
    kind = (
        TensorProto.INT8
        if any(bits in recipe for bits in ('w8a8', 'w6a6'))
        else TensorProto.INT4
    )
    weights = [
        value
        for value in graph.graph.initializer
        if '/weight_' in value.name and value.dims and 'scale' not in value.name
    ]
    assert {value.data_type for value in weights} == {kind}
    layers = {
        call.name for call in calls if 'weight' in model.get_submodule(call.name).roles
    }
    assert {value.name.split('/')[0] for value in weights} == layers
    floats = [
        value
        for value in graph.graph.initializer
        if value.data_type == TensorProto.FLOAT and len(value.dims) > 1
    ]
    assert not {tuple(value.dims) for value in floats} & {
        tuple(model.get_submodule(name).weight.shape) for name in layers
    }


@pytest.mark.parametrize(
    'family, name', [('mmdet swin', 'minmax_w4a4'), ('mmseg vit', 'adalog_w4a4')]
)
def test_recipes_by_layer(family, name):
    """Weights of 4 and 8 bits, a convolution and a product in float, and each step is
    that of torch.
    """
    model, x = (
        calibrated(family, name, mixed),
        (image(46, 58, seed=1) if 'swin' in family else image(64, 48, seed=1)),
    )
    graph, calls = build_graph(model, x)
    assert compare(graph, calls, model, x).step < 1e-5
    weights = [
        value
        for value in graph.graph.initializer
        if '/weight_' in value.name and value.dims and 'scale' not in value.name
    ]
    kinds = {value.name.split('/')[0]: value.data_type for value in weights}
    assert 'patch_embed.projection' not in kinds
    for layer, kind in kinds.items():
        assert kind == (
            TensorProto.INT8
            if model.get_submodule(layer).quantizer('weight').bits == 8
            else TensorProto.INT4
        ), layer
    assert set(kinds.values()) == {TensorProto.INT8, TensorProto.INT4}


def test_products_are_of_integers_where_all_is_uniform(exported):
    _, recipe, _, graph, calls = exported
    made = producers(graph.graph)

    def is_integer(name):
        node = made.get(name)
        while node is not None and getattr(node, 'op_type', '') in ('Transpose', 'Mul'):
            node = made.get(node.input[0])
        return getattr(node, 'op_type', '') == 'DequantizeLinear'

    products = [
        node
        for node in graph.graph.node
        if node.op_type in ('MatMul', 'Gemm', 'Conv', 'Einsum', 'ConvTranspose')
    ]
    integers = [node for node in graph.graph.node if node.op_type == 'MatMulInteger']
    in_float = [
        node.name for node in products if not all(map(is_integer, node.input[:2]))
    ]
    tables = [
        node
        for node in graph.graph.node
        if node.op_type == 'Gather' and '/table_' in node.input[0]
    ]
    assert len(products) + len(integers) == len(calls)
    if 'adalog' in recipe:
        assert len(in_float) == len(tables) > 0 and all(
            'layers.1/' in name or 'pv/' in name for name in in_float
        )
    else:
        assert not in_float and not tables and len(integers) * 2 < len(calls)


def test_another_graph_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    model = calibrated('timm vit', 'minmax_w6a6')
    path = tmp_path / 'a.onnx'
    path.write_bytes(b'before')

    def altered(*args):
        graph, calls = build_graph(*args)
        scale = next(
            value
            for value in graph.graph.initializer
            if 'qkv/' in value.name and 'weight_scale' in value.name
        )
        scale.raw_data = (
            np.frombuffer(scale.raw_data, np.float32) * np.float32(1.002)
        ).tobytes()
        return graph, calls

    monkeypatch.setattr('mmptq.export.onnx.build_graph', altered)
    with pytest.raises(
        QuantizationError,
        match=(
            r'a\.onnx was not written: at 32x32 model\.blocks\.0\.attn\.qkv by ONNX'
            r' Runtime differs'
        ),
    ):
        export_onnx(model, path, (32, 32))
    assert path.read_bytes() == b'before' and [
        file.name for file in tmp_path.iterdir()
    ] == ['a.onnx']


def test_any_height_and_width(tmp_path):
    model = calibrated('mmseg vit', 'uqvit_w8a8')
    first, second = export_onnx(model, tmp_path / 'a.onnx', (64, 48), dynamic=True)
    assert max(first.step, second.step) < 1e-5
    x = image(96, 80)
    found = onnxruntime.InferenceSession(tmp_path / 'a.onnx').run(
        None, {'image': x.numpy()}
    )
    with torch.no_grad():
        for a, b in zip(found, model(x), strict=True):
            assert np.linalg.norm(a - b.numpy()) < 0.02 * np.linalg.norm(b)


# The command.


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The config of a small segmentor, and its packed checkpoint."""
    folder = tmp_path_factory.mktemp('export')
    recipe = load_recipe('minmax_w4a4')
    model = dict(
        type='EncoderDecoder',
        backbone=dict(VIT, type='mmseg.VisionTransformer'),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
        decode_head=dict(
            type='FCNHead',
            in_channels=16,
            channels=8,
            in_index=1,
            num_convs=1,
            num_classes=3,
        ),
    )
    cfg = Config(dict(model=model, default_scope='mmseg'))
    cfg.dump(folder / 'config.py')
    built = randomized(
        build_in('mmseg', quantized_config(cfg, recipe, 'backbone').model)
    )
    backbone = built.backbone
    said = about(recipe)
    torch.save({'state_dict': built.state_dict()}, folder / 'float.pth')
    torch.save(
        {'state_dict': built.state_dict(), 'meta': {'mmptq': said}},
        folder / 'uncalibrated.pth',
    )
    calibrate(
        backbone,
        find_spec(backbone).block_names(backbone),
        [Call((image(64, 64),))],
        backbone.quantization.recipe.build_method(),
    )
    torch.save(
        {'state_dict': built.state_dict(), 'meta': {'mmptq': said}},
        folder / 'quantized.pth',
    )
    write_packed(built, cfg, said, {}, folder / 'quantized.safetensors')
    return folder


def arguments(files, checkpoint, out):
    return [
        'export',
        str(files / 'config.py'),
        str(files / checkpoint),
        '--out',
        str(out),
        '--shape',
        '48',
        '32',
    ]


def test_the_command_takes_both_kinds_of_checkpoints(files, tmp_path, capsys):
    for checkpoint in ('quantized.pth', 'quantized.safetensors'):
        assert (
            main(arguments(files, checkpoint, tmp_path / f'{checkpoint}.onnx')) == 0
        ), capsys.readouterr().err
        assert 'ONNX Runtime differs from torch by' in capsys.readouterr().out
    first, second = (
        onnx.load(tmp_path / f'{checkpoint}.onnx')
        for checkpoint in ('quantized.pth', 'quantized.safetensors')
    )
    onnx.checker.check_model(first, full_check=True)
    sessions = [
        onnxruntime.InferenceSession(model.SerializeToString())
        for model in (first, second)
    ]
    maps = [session.run(None, {'image': image(48, 32).numpy()}) for session in sessions]
    assert all(
        np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
        for a, b in zip(*maps, strict=True)
    )
    assert [value.name for value in first.graph.output] == ['map_0', 'map_1'] and str(
        files
    ) not in str(first)
    assert 'site-packages' not in str(first)


@pytest.mark.parametrize(
    ('checkpoint', 'out', 'message'),
    [
        ('float.pth', 'a.onnx', 'float.pth is not quantized'),
        (
            'uncalibrated.pth',
            'a.onnx',
            'uncalibrated.pth says that it was quantized, but has no parameters',
        ),
        ('missing.pth', 'a.onnx', 'missing.pth does not exist'),
        ('quantized.pth', 'a.pt', 'a.pt: name a file that ends with .onnx'),
        ('quantized.pth', 'folder/a.onnx', 'folder does not exist'),
    ],
)
def test_bad_input_is_refused(files, tmp_path, capsys, checkpoint, out, message):
    assert main(arguments(files, checkpoint, tmp_path / out)) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_onnx_the_command_says_how_to_install_it(files, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith('mmptq.export')]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split('.')[0] == 'onnx':
            raise ModuleNotFoundError("No module named 'onnx'", name='onnx')
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    with pytest.raises(
        QuantizationError, match=r'onnx is not installed.*pip install mmptq\[onnx\]'
    ):
        export(
            str(files / 'config.py'),
            str(files / 'quantized.pth'),
            str(tmp_path / 'a.onnx'),
            (48, 32),
        )
