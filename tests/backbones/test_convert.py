"""QuantBackbone and QuantModel: uncalibrated they are the float model, and every layer
is accounted for.
"""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.apis import load_recipe
from mmptq.backbones import find_spec
from mmptq.backbones.convert import convert, convert_layers, layers_with_products
from mmptq.backbones.reasons import FloatReason
from mmptq.calibration import operations
from mmptq.layers import (
    GeluShift,
    QuantConv2d,
    QuantLinear,
    QuantMatMul,
    QuantOp,
    Rescale,
)

from ..conftest import (
    SWIN,
    VIT,
    build_in,
    image,
    quantizable,
    quantizers_of,
    randomized,
    recipe,
)

FRESH = """
import json, os, sys
import mmdet.models, mmseg.models
from mmengine.registry import MODELS, init_default_scope
for scope, cfg in json.loads(sys.argv[1]):
    child = os.fork()  # each build is the first that hears of mmptq
    if child == 0:
        assert not any(name.startswith('mmptq') for name in sys.modules)
        init_default_scope(scope)
        backbone = MODELS.build(cfg)
        assert type(backbone).__module__.startswith(scope + '.'), type(backbone)
        print(scope, type(backbone).__name__, len(backbone.quantization.skipped), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_config_needs_no_import():
    raw = load_recipe('adalog_w4a4')
    cases = [
        (scope, dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=raw))
        for scope, cfg in (('mmdet', SWIN), ('mmseg', SWIN), ('mmseg', VIT))
    ]
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', FRESH, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout.split('\n')[:-1] == [
        'mmdet SwinTransformer 0',
        'mmseg SwinTransformer 0',
        'mmseg VisionTransformer 0',
    ], run.stderr


def test_it_is_the_backbone_of_the_scope_itself(family, float_backbone, backbone):
    assert type(backbone) is type(float_backbone) and type(
        backbone
    ).__module__.startswith(family[0] + '.')
    assert (backbone.quantization.scope, backbone.quantization.recipe) == (
        'backbone',
        recipe(),
    )


@pytest.mark.parametrize('size', [(142, 190), (97, 131)])
def test_uncalibrated_it_is_the_float_backbone(family, float_backbone, backbone, size):
    backbone.load_state_dict(float_backbone.state_dict(), strict=True)
    x = image(*size, batch=2)
    with torch.no_grad():
        outputs, expected = backbone(x), float_backbone(x)
    assert len(outputs) == len(expected) == 2
    for ours, theirs in zip(outputs, expected, strict=True):
        if family[1]['type'] == 'SwinTransformer':
            assert torch.equal(ours, theirs)
        else:
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_float_checkpoints_load_strictly(float_backbone, backbone):
    state = float_backbone.state_dict()
    backbone.load_state_dict(
        {
            key: torch.full_like(value, 0.5) if value.is_floating_point() else value
            for key, value in state.items()
        }
    )
    assert all((parameter == 0.5).all() for parameter in backbone.parameters())
    assert sum(p.numel() for p in backbone.parameters()) == sum(
        p.numel() for p in float_backbone.parameters()
    )
    assert all(
        quantizer.params is None for quantizer in quantizers_of(backbone).values()
    )


def test_names_stay(family, float_backbone, backbone):
    names = [key.replace('in_proj_', 'in_proj.') for key in float_backbone.state_dict()]
    assert sorted(backbone.state_dict()) == sorted(names)


def unaccounted(module, report):
    """Layers that are neither quantized nor reported."""
    return [
        name
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        and not isinstance(layer, QuantOp)
        and name not in report.skipped
    ]


def test_every_layer_is_quantized(family, backbone):
    assert (
        unaccounted(backbone, backbone.quantization) == []
        and backbone.quantization.skipped == {}
    )
    ops = operations(backbone)
    blocks = 3
    merging = family[1]['type'] == 'SwinTransformer'
    kinds = {
        cls: sum(type(op) is cls for op in ops.values())
        for cls in (QuantConv2d, QuantLinear, QuantMatMul)
    }
    assert kinds == {
        QuantConv2d: 1,
        QuantLinear: 4 * blocks + merging,
        QuantMatMul: 2 * blocks,
    }
    products = {
        name.rpartition('.')[2]: tuple(op.sites.values())
        for name, op in ops.items()
        if op.kind == 'matmul'
    }
    assert products == {'qk': ('query', 'key'), 'pv': ('post_softmax', 'value')}
    assert {op.sites['input'] for op in ops.values() if op.kind == 'linear'} == {
        'post_norm',
        'post_attention',
        'post_gelu',
    }


def test_layers_after_a_norm_and_after_gelu_are_rescaled(family, backbone):
    found = {}
    for op in operations(backbone).values():
        if op.kind == 'linear':
            found.setdefault(op.sites['input'], set()).add(type(op.rescale))
    assert found == {
        'post_norm': {Rescale},
        'post_gelu': {GeluShift},
        'post_attention': {type(None)},
    }
    assert not [key for key in backbone.state_dict() if 'rescale' in key]


def subclass(base, **layers):
    """A backbone of one's own, with further layers."""

    class Mine(base):
        def __init__(self, **options):
            super().__init__(**options)
            for name, make in layers.items():
                self.add_module(name, make(self))

    return Mine(**{key: value for key, value in SWIN.items() if key != 'type'})


def converted(backbone):
    return convert(backbone, find_spec(backbone), recipe())


class Low(nn.Linear):
    pass


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
        self.offset = nn.Conv2d(3, 18, 3)


def test_layers_that_stay_float_are_listed_with_a_reason(monkeypatch):
    from mmdet.models import SwinTransformer

    backbone = subclass(
        SwinTransformer,
        extra=lambda _: nn.Linear(4, 4),
        deep=lambda _: nn.Sequential(nn.Conv2d(3, 3, 1)),
        line=lambda _: nn.Conv1d(3, 3, 1),
        other=lambda _: nn.MultiheadAttention(8, 2),
        kernel=lambda _: Deformable(),
        table=lambda _: nn.Embedding(4, 4),
    )
    backbone.stages[0].blocks[0].attn.w_msa.proj = Low(8, 8)
    report = converted(backbone)
    assert set(report.skipped) == {
        'extra',
        'deep.0',
        'line',
        'other',
        'kernel',
        'kernel.offset',
        'stages.0.blocks.0.attn.w_msa.proj',
    }
    assert report.skipped['extra'] is FloatReason.NO_SITE
    assert (
        report.skipped['stages.0.blocks.0.attn.w_msa.proj']
        is FloatReason.NO_QUANTIZED_FORM
    )
    assert unaccounted(backbone, report) == [
        'other.out_proj'
    ]  # inside of an attention that is listed
    assert (
        type(backbone.extra) is nn.Linear
        and type(backbone.stages[0].blocks[0].attn.w_msa.proj) is Low
    )


def test_a_layer_under_two_names_is_accounted_for_under_both():
    shared = nn.Linear(4, 4)
    module = nn.ModuleDict({'first': shared, 'second': nn.Sequential(shared)})
    skipped = convert_layers(
        module, dict.fromkeys(layers_with_products(module), 'linear'), recipe()
    )
    assert isinstance(module['first'], QuantLinear)
    assert module['second'][0] is module['first'] or 'second.0' in skipped


def test_attentions_are_needed(float_backbone):
    spec = dataclasses.replace(find_spec(float_backbone), attentions=('nowhere.*',))
    with pytest.raises(
        QuantizationError,
        match=rf'{type(float_backbone).__name__} has no attention named like nowhere\.',
    ):
        convert(float_backbone, spec, recipe())


def test_it_is_converted_once(backbone):
    with pytest.raises(QuantizationError, match='already has an attribute'):
        converted(backbone)


def test_training_state_and_frozen_parameters_are_kept():
    backbone = quantizable('mmdet', {**SWIN, 'frozen_stages': 1})
    backbone.train()
    frozen = {
        name
        for name, parameter in backbone.named_parameters()
        if not parameter.requires_grad
    }
    plain = build_in('mmdet', {**SWIN, 'frozen_stages': 1})
    plain.train()
    assert (
        frozen
        == {
            name
            for name, parameter in plain.named_parameters()
            if not parameter.requires_grad
        }
        != set()
    )
    assert [m.training for m in backbone.modules() if isinstance(m, nn.LayerNorm)] == [
        m.training for m in plain.modules() if isinstance(m, nn.LayerNorm)
    ]


def test_a_float_layer_converts_in_the_state_it_is_in(float_backbone):
    float_backbone.train()
    float_backbone.patch_embed.eval()
    converted(float_backbone)
    ops = operations(float_backbone)
    assert [
        name for name, op in ops.items() if not op.training and op.kind != 'matmul'
    ] == ['patch_embed.projection']


@pytest.mark.parametrize(
    ('cfg', 'raw', 'message'),
    [
        (
            dict(type='ResNet', depth=18, base_channels=2),
            load_recipe('adalog_w4a4'),
            'ResNet is not known',
        ),
        (SWIN, {}, 'a recipe has the keys'),
    ],
)
def test_what_cannot_be_quantized_is_refused(cfg, raw, message):
    with pytest.raises(QuantizationError, match=message):
        build_in('mmdet', dict(type='mmptq.QuantBackbone', backbone=cfg, recipe=raw))


# Whole models.


def segmentor(auxiliary=True):
    head = dict(
        type='FCNHead',
        in_channels=16,
        in_index=1,
        channels=4,
        num_convs=1,
        num_classes=3,
        norm_cfg=dict(type='BN'),
    )
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=SWIN,
        decode_head=head,
        auxiliary_head={**head, 'in_channels': 8, 'in_index': 0} if auxiliary else None,
        test_cfg=dict(mode='whole'),
        train_cfg=dict(),
    )


def test_whole_models():
    torch.manual_seed(0)
    plain = randomized(build_in('mmseg', segmentor()))
    model = build_in(
        'mmseg',
        dict(
            type='mmptq.QuantModel',
            model=segmentor(),
            recipe=load_recipe('adalog_w4a4'),
        ),
    ).eval()
    assert type(model) is type(plain) and model.quantization.scope == 'model'
    model.load_state_dict(plain.state_dict(), strict=True)
    assert unaccounted(model, model.quantization) == []
    assert all(
        name.startswith('auxiliary_head.') for name in model.quantization.skipped
    )
    sites = {
        name: op.sites['input']
        for name, op in operations(model).items()
        if name.startswith('decode_head.')
    }
    assert set(sites.values()) == {'conv'} and 'decode_head.conv_seg' in sites
    assert (
        operations(model)['backbone.stages.0.blocks.0.attn.w_msa.qkv'].sites['input']
        == 'post_norm'
    )
    x = image(50, 70)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_whole_models_need_a_backbone():
    cfg = dict(type='FCNHead', in_channels=4, channels=4, num_classes=2)
    with pytest.raises(QuantizationError, match='FCNHead has no backbone'):
        build_in(
            'mmseg',
            dict(type='mmptq.QuantModel', model=cfg, recipe=load_recipe('adalog_w4a4')),
        )


def test_layers_that_are_to_stay_float():
    names = ['decode_head.conv_seg', 'backbone.stages.1.blocks.0.attn.w_msa.proj']
    cfg = dict(
        type='mmptq.QuantModel', model=segmentor(), recipe=load_recipe('adalog_w4a4')
    )
    model = build_in('mmseg', dict(cfg, idle=names))
    assert [type(model.get_submodule(name)) for name in names] == [nn.Conv2d, nn.Linear]
    assert all(model.quantization.skipped[name] is FloatReason.IDLE for name in names)
    assert unaccounted(model, model.quantization) == []
    assert set(operations(build_in('mmseg', cfg))) - set(operations(model)) == set(
        names
    )
    for name in (
        'decode_head.conv',
        'decode_head',
        'backbone.stages.0.blocks.0.attn.w_msa.qk',
    ):
        with pytest.raises(
            QuantizationError,
            match=rf'^{name} is to stay float, but'.replace('.', r'\.'),
        ):
            build_in('mmseg', dict(cfg, idle=[name]))
