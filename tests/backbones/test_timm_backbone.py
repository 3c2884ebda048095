"""Transformers of timm as backbones, on tiny ones with random weights; timm's own
feature extraction is the oracle.
"""

import pickle
import sys
from importlib import import_module

import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn

from mmptq import QuantizationError
from mmptq.backbones import find_spec, timm_backbone, timm_import
from mmptq.backbones.timm_backbone import TimmBackbone
from mmptq.backbones.timm_import import import_timm
from mmptq.calibration import Call, calibrate, operations
from mmptq.checkpoints.reading import is_calibrated
from mmptq.layers import QuantOp

from ..conftest import build_in, fast, image, randomized

try:
    timm = import_timm()
except QuantizationError as error:
    pytest.skip(str(error), allow_module_level=True)

DEEP = dict(embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, out_indices=(0, 1))
STAGES = dict(
    img_size=64,
    embed_dim=8,
    depths=(2, 1, 1),
    num_heads=(1, 2, 4),
    window_size=4,
    mlp_ratio=2,
)
MODELS = {
    'vit': dict(
        DEEP, model_name='vit_tiny_patch16_224', img_size=(48, 32), out_indices=(0, -1)
    ),
    'distilled': dict(DEEP, model_name='deit_tiny_distilled_patch16_224', img_size=48),
    'registers': dict(DEEP, model_name='vit_small_patch14_reg4_dinov2', img_size=42),
    'beit': dict(DEEP, model_name='beit_base_patch16_224', img_size=(48, 64)),
    'eva': dict(DEEP, model_name='eva_giant_patch14_224', img_size=56),
    'eva02': dict(DEEP, model_name='eva02_tiny_patch14_224', img_size=56),
    'dinov3': dict(DEEP, model_name='vit_small_patch16_dinov3', img_size=64),
    'swin': dict(
        STAGES, model_name='swin_tiny_patch4_window7_224', out_indices=(0, 1, 2)
    ),
    'swin_v2': dict(STAGES, model_name='swinv2_tiny_window8_256', out_indices=(0, 1)),
}
families = pytest.mark.parametrize('family', MODELS)


def config(family, **options):
    return dict(type='mmptq.TimmBackbone', **{**MODELS[family], **options})


def built(family, **options):
    torch.manual_seed(0)
    return randomized(build_in('mmseg', config(family, **options)))


def quantizable(family, recipe='adalog_w4a4'):
    return randomized(
        build_in(
            'mmseg',
            dict(
                type='mmptq.QuantBackbone', backbone=config(family), recipe=fast(recipe)
            ),
        )
    )


def images(family):
    """Two of other sizes, where that is possible, that are whole numbers of neither
    patches nor windows.
    """
    sizes = [(48, 64)] * 2 if family == 'beit' else [(49, 70), (40, 33)]
    return [image(*size, seed=seed) for seed, size in enumerate(sizes)]


def whole_model(family, **options):
    """timm's classifier, random weights."""
    torch.manual_seed(0)
    options = {
        **{
            key: value
            for key, value in MODELS[family].items()
            if key not in ('model_name', 'out_indices')
        },
        **options,
    }
    return randomized(
        timm.create_model(MODELS[family]['model_name'], num_classes=5, **options)
    )


def calibrated(backbone, inputs):
    names = find_spec(backbone).block_names(backbone)
    calibrate(
        backbone,
        names,
        [Call((x,)) for x in inputs],
        backbone.quantization.recipe.build_method(),
        seed=0,
    )
    return backbone


def maps(backbone, x):
    with torch.no_grad():
        return backbone(x)


def close(ours, theirs, tolerance=1e-6):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm()


@families
def test_maps_are_those_of_timm(family, tmp_path):
    """Biases folded, layers dropped, weights from a file; at the size that the model is
    made for.
    """
    reference = whole_model(family)
    torch.save(reference.state_dict(), tmp_path / 'weights.pth')
    backbone = build_in(
        'mmdet', config(family, pretrained=str(tmp_path / 'weights.pth'))
    )
    backbone.eval()
    x = image(*backbone.model.patch_embed.img_size, batch=2)
    with torch.no_grad():
        _, expected = reference.forward_intermediates(
            x, indices=list(MODELS[family]['out_indices'])
        )
    outputs = maps(backbone, x)
    close(outputs, expected)
    assert [tuple(y.shape[1:]) for y in outputs] == [
        (
            info['num_chs'],
            x.shape[2] // info['reduction'],
            x.shape[3] // info['reduction'],
        )
        for info in (
            reference.feature_info[index] for index in MODELS[family]['out_indices']
        )
    ]


@families
def test_uncalibrated_it_is_the_float_backbone(family):
    backbone, reference = quantizable(family), built(family)
    backbone.load_state_dict(reference.state_dict(), strict=True)
    for x in images(family):
        close(maps(backbone, x), maps(reference, x))


@families
def test_blocks_run_in_order_and_hold_every_layer(family):
    backbone = built(family)
    names = find_spec(backbone).block_names(backbone)
    ran = []
    for name in names:
        backbone.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: ran.append(name)
        )
    maps(backbone, images(family)[0])
    assert ran == names
    assert [
        name
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and not name.startswith(tuple(f'{block}.' for block in names))
    ] == []


@families
def test_every_layer_is_quantized_or_said_not_to_be_and_the_result_loads(family):
    backbone, inputs = quantizable(family), images(family)
    reference = built(family)
    backbone.load_state_dict(reference.state_dict())
    calibrated(backbone, inputs)
    ops = operations(backbone)
    assert is_calibrated(backbone)
    left = {
        name
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, QuantOp)
    }
    assert left == set(backbone.quantization.skipped)
    assert all('.cpb_mlp.' in name for name in left) and bool(left) == (
        family == 'swin_v2'
    )
    attentions = [
        name.removesuffix('.proj') for name in ops if name.endswith('.attn.proj')
    ]
    assert attentions and all(
        {f'{name}.qk', f'{name}.pv'} <= ops.keys() for name in attentions
    )
    outputs = maps(backbone, inputs[0])
    errors = [
        float((a - b).norm() / b.norm())
        for a, b in zip(outputs, maps(reference, inputs[0]), strict=True)
    ]
    assert all(0.01 < error < 0.3 for error in errors)
    again = quantizable(family)
    again.load_state_dict(backbone.state_dict(), strict=True)
    for ours, theirs in zip(maps(again, inputs[0]), outputs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('family', ['vit', 'registers', 'swin', 'swin_v2', 'eva02'])
def test_images_are_padded_to_whole_patches(family):
    backbone, (x, _) = built(family), images(family)
    patch = backbone.model.patch_embed.patch_size[0]
    height, width = (-(-size // patch) * patch for size in x.shape[-2:])
    padded = torch.zeros(1, 3, height, width)
    padded[..., : x.shape[-2], : x.shape[-1]] = x
    close(maps(backbone, x), maps(backbone, padded), 0)
    assert maps(backbone, x)[0].shape[-2:] == (height // patch, width // patch)


@pytest.mark.parametrize('family', ['vit', 'distilled', 'registers', 'eva'])
def test_position_embeddings_are_interpolated_as_by_timm(family):
    """At another size it is the model that timm makes for that size of the same
    weights.
    """
    backbone = built(family)
    size = tuple(3 * patch for patch in backbone.model.patch_embed.patch_size)
    size = (size[0], 2 * size[1])
    other = built(family, img_size=size)
    state, embeddings = backbone.state_dict(), backbone.state_dict()['model.pos_embed']
    prefix = embeddings.shape[1] - backbone.model.patch_embed.num_patches
    resized = timm.layers.resample_abs_pos_embed(
        embeddings,
        (3, 6),
        backbone.model.patch_embed.grid_size,
        num_prefix_tokens=prefix,
    )
    assert resized.shape != embeddings.shape
    other.load_state_dict({**state, 'model.pos_embed': resized}, strict=True)
    close(maps(backbone, image(*size)), maps(other, image(*size)))


def saved(model, path):
    if path.suffix == '.safetensors':
        import_module('safetensors.torch').save_file(model.state_dict(), path)
    else:
        torch.save({'model': model.state_dict()}, path)
    return str(path)


@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
@pytest.mark.parametrize(
    ('family', 'options'),
    [
        ('vit', dict(img_size=(64, 48))),
        ('distilled', dict(img_size=80)),
        ('beit', dict(img_size=(80, 48))),
        ('swin', dict(window_size=5)),
        ('swin_v2', dict(window_size=8)),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_weights_of_a_local_file_are_fitted_as_by_timm(
    family, options, name, tmp_path, monkeypatch
):
    """Made for another size: timm's own loading, which is given the file, is the
    oracle.
    """
    path = saved(whole_model(family, img_size=64), tmp_path / name)
    said = []
    monkeypatch.setattr(
        timm_backbone, 'print_log', lambda message, logger: said.append(message)
    )
    backbone = build_in('mmseg', config(family, **{**options, 'pretrained': path}))
    backbone.eval()
    fields = {
        key: value
        for key, value in {**MODELS[family], **options}.items()
        if key not in ('model_name', 'out_indices')
    }
    theirs = timm.create_model(
        MODELS[family]['model_name'],
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay=dict(file=path, num_classes=5),
        **fields,
    )
    theirs.eval()
    x = image(*theirs.patch_embed.img_size)
    with torch.no_grad():
        _, expected = theirs.forward_intermediates(
            x, indices=list(MODELS[family]['out_indices'])
        )
    close(maps(backbone, x), expected)
    classifier = 'head.fc' if family in ('swin', 'swin_v2') else 'head'
    assert len(said) == 1 and said[0].startswith(f'{path}: loaded without ')
    assert {f'{classifier}.weight', f'{classifier}.bias'} <= set(
        said[0].split('without ')[1].split(', ')
    )


class Code:
    def __reduce__(self):
        return print, ('unsafe',)


def test_files_that_are_not_weights_of_the_model(tmp_path, capsys):
    unsafe, broken, swin, deeper, thinner = (
        tmp_path / f'{name}.pth'
        for name in ('unsafe', 'broken', 'swin', 'deeper', 'thinner')
    )
    unsafe.write_bytes(pickle.dumps({'model': Code()}))
    broken.write_bytes(b'nothing')
    saved(whole_model('swin'), swin)
    saved(whole_model('vit', depth=4), deeper)
    saved(whole_model('vit', embed_dim=8), thinner)
    for given, message in [
        (str(tmp_path / 'absent.pth'), r'absent\.pth.* is no file: give the path'),
        (True, r'pretrained=True is no file'),
        (str(tmp_path), 'is no file'),
        (str(unsafe), r'unsafe\.pth cannot be read safely'),
        (str(broken), r'broken\.pth cannot be read safely'),
        (
            str(swin),
            (
                r'swin\.pth is not of a VisionTransformer with these options: it lacks'
                r' blocks\.0\.attn\.proj\.bias, .* more'
            ),
        ),
        (
            str(deeper),
            (
                r'deeper\.pth is not of a VisionTransformer .*: it has besides'
                r' blocks\.3\.attn\.proj\.bias'
            ),
        ),
        (
            str(thinner),
            (
                r'thinner\.pth is not of a VisionTransformer .* it has in another shape'
                r' blocks\.0\.attn\.proj\.bias'
            ),
        ),
    ]:
        with pytest.raises(QuantizationError, match=f'(?s){message}'):
            build_in('mmseg', config('vit', pretrained=given))
    assert 'unsafe\n' not in capsys.readouterr().out


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(model_name='vit_tiny_patch16_225'),
            (
                r"has no model 'vit_tiny_patch16_225'; the nearest are"
                r' .*vit_tiny_patch16_224'
            ),
        ),
        (dict(model_name='hf-hub:timm/vit'), "has no model 'hf-hub:timm/vit'"),
        (
            dict(out_indices=(0, 3)),
            r'out_indices \(0, 3\): vit_tiny_patch16_224 has feature maps 0 to 2',
        ),
        (dict(out_indices=()), r'out_indices \(\)'),
        (dict(out_indices=2), 'out_indices 2: .* 0 to 2; list some'),
        (dict(out_indices=(2, -1)), r'out_indices \(2, -1\): .* each once'),
    ],
)
def test_models_and_maps_that_are_not_there(changes, message):
    with pytest.raises(QuantizationError, match=message):
        build_in('mmseg', config('vit', **changes))


def test_an_option_that_the_model_does_not_have_is_named():
    with pytest.raises(TypeError, match="'window_size'"):
        build_in('mmseg', config('vit', window_size=4))


def test_a_backbone_that_is_no_transformer():
    with pytest.raises(
        QuantizationError,
        match=(
            r'timm\.models\.resnet\.ResNet is not known\. Known are:'
            r' .*timm\.SwinTransformer'
        ),
    ):
        TimmBackbone('resnet10t', (0,))


def test_beit_takes_one_size_only():
    with pytest.raises(
        QuantizationError,
        match=(
            r'Beit takes images of 48x64 only, not 49x70: give the backbone another'
            r' img_size'
        ),
    ):
        maps(built('beit'), image(49, 70))


def test_without_timm(monkeypatch, tmp_path):
    monkeypatch.setattr(timm_import, 'find_spec', lambda name: None)
    monkeypatch.setattr(timm_import, 'FOLDER', tmp_path / 'absent')
    with pytest.raises(
        QuantizationError, match='timm is not installed: pip install timm'
    ):
        built('vit')


@pytest.mark.parametrize(
    ('package', 'message'),
    [
        (
            'torchvision',
            (
                r'timm needs torchvision, and torchvision [\d.+a-z]+ cannot be imported'
                r' beside torch .*pip install --no-deps'
            ),
        ),
        (
            'timm',
            (
                r'timm [\d.]+ cannot be imported beside torch .*pip install --no-deps'
                r' --upgrade timm'
            ),
        ),
    ],
)
def test_timm_beside_what_does_not_fit(package, message, monkeypatch):
    def refuse(name):
        if name == package:
            raise RuntimeError('undefined symbol')
        return import_module(name)

    monkeypatch.setattr(timm_import, 'import_module', refuse)
    with pytest.raises(QuantizationError, match=f'(?s){message}'):
        built('vit')


@pytest.fixture
def stock(monkeypatch):
    """mmsegmentation's own wrapper, which looks for timm when it is imported."""
    build_in('mmseg', dict(type='mmptq.TimmBackbone', **MODELS['vit']))
    monkeypatch.setattr(
        sys.modules['mmseg.models.backbones.timm_backbone'], 'timm', timm
    )

    def stock(family):
        return dict(type='TIMMBackbone', pretrained=False, **MODELS[family])

    return stock


def test_mmseg_wrapper_is_quantized_where_it_keeps_the_model_whole(stock):
    torch.manual_seed(0)
    reference = randomized(build_in('mmseg', stock('vit')))
    backbone = randomized(
        build_in(
            'mmseg',
            dict(type='mmptq.QuantBackbone', backbone=stock('vit'), recipe=fast()),
        )
    )
    assert type(backbone).__module__.startswith('mmseg.')
    backbone.load_state_dict(reference.state_dict(), strict=True)
    inputs = [image(48, 32, seed) for seed in range(2)]
    close(maps(backbone, inputs[0]), maps(reference, inputs[0]))
    calibrated(backbone, inputs)
    assert backbone.quantization.skipped == {}
    errors = [
        float((a - b).norm() / b.norm())
        for a, b in zip(
            maps(backbone, inputs[0]), maps(reference, inputs[0]), strict=True
        )
    ]
    assert all(0.01 < error < 0.3 for error in errors)


def test_mmseg_wrapper_of_a_swin_is_refused(stock):
    with pytest.raises(
        QuantizationError,
        match=(
            r'mmseg\.TIMMBackbone has no module timm_model\.model'
            r' here.*mmptq\.TimmBackbone'
        ),
    ):
        build_in(
            'mmseg',
            dict(type='mmptq.QuantBackbone', backbone=stock('swin'), recipe=fast()),
        )


def upernet(backbone):
    head = dict(
        type='UPerHead',
        in_channels=[8, 16, 32],
        in_index=[0, 1, 2],
        pool_scales=(1, 2),
        channels=8,
        num_classes=3,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss'),
    )
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=backbone,
        decode_head=head,
        test_cfg=dict(mode='whole'),
    )


def mask_rcnn(backbone):
    """With the pyramid that mmsegmentation makes of a plain map."""
    neck = dict(
        type='mmseg.Feature2Pyramid',
        embed_dim=16,
        rescales=[4, 2, 1, 0.5],
        norm_cfg=dict(type='BN'),
    )
    anchors = dict(
        type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]
    )
    rpn = dict(
        type='RPNHead',
        in_channels=16,
        feat_channels=16,
        anchor_generator=anchors,
        loss_bbox=dict(type='L1Loss'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
    )
    extractor = dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=7),
        out_channels=16,
        featmap_strides=[4, 8, 16, 32],
    )
    boxes = dict(
        type='Shared2FCBBoxHead',
        in_channels=16,
        fc_out_channels=16,
        roi_feat_size=7,
        num_classes=2,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss'),
        loss_bbox=dict(type='L1Loss'),
    )
    masks = dict(
        type='FCNMaskHead',
        num_convs=1,
        in_channels=16,
        conv_out_channels=16,
        num_classes=2,
        loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
    )
    test = dict(
        rpn=dict(
            nms_pre=20,
            max_per_img=5,
            nms=dict(type='nms', iou_threshold=0.7),
            min_bbox_size=0,
        ),
        rcnn=dict(
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=5,
            mask_thr_binary=0.5,
        ),
    )
    return dict(
        type='MaskRCNN',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=backbone,
        neck=neck,
        rpn_head=rpn,
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=extractor,
            bbox_head=boxes,
            mask_roi_extractor=extractor,
            mask_head=masks,
        ),
        train_cfg=None,
        test_cfg=ConfigDict(test),
    )


def predicted(scope, model, x):
    """Class scores of every pixel; or scores of classes, boxes and masks, of regions
    that do not depend on the weights.
    """
    with torch.no_grad():
        if scope == 'mmseg':
            return (model(x),)
        features = model.extract_feat(x)
        regions = torch.tensor([[0.0, 4, 4, 30, 40], [0, 10, 2, 50, 45]])
        boxes = model.roi_head._bbox_forward(features, regions)
        masks = model.roi_head._mask_forward(features, regions)
        return (
            *model.rpn_head(features)[0],
            boxes['cls_score'],
            boxes['bbox_pred'],
            masks['mask_preds'],
        )


@pytest.mark.parametrize(
    ('scope', 'whole', 'backbone'),
    [
        ('mmseg', upernet, config('swin')),
        ('mmdet', mask_rcnn, config('vit', depth=4, out_indices=(0, 1, 2, 3))),
    ],
    ids=['UperNet', 'Mask R-CNN'],
)
def test_in_a_whole_model(scope, whole, backbone):
    torch.manual_seed(0)
    reference = randomized(build_in(scope, whole(backbone)))
    model = randomized(
        build_in(
            scope,
            whole(dict(type='mmptq.QuantBackbone', backbone=backbone, recipe=fast())),
        )
    )
    model.load_state_dict(reference.state_dict(), strict=True)
    inputs = [image(50, 60, seed) for seed in range(2)]
    expected = predicted(scope, reference, inputs[0])
    close(predicted(scope, model, inputs[0]), expected, 1e-5)
    calibrated(model.backbone, inputs)
    for ours, theirs in zip(predicted(scope, model, inputs[0]), expected, strict=True):
        assert 0 < (ours - theirs).norm() < 0.5 * theirs.norm()


@pytest.mark.parametrize(
    'cfg',
    [
        dict(
            type='mmptq.QuantBackbone',
            backbone=dict(type='mmpretrain.SwinTransformer', arch='tiny'),
            recipe=fast(),
        ),
        dict(
            type='mmptq.QuantModel',
            model=upernet(dict(type='mmpretrain.SwinTransformer', arch='tiny')),
            recipe=fast(),
        ),
    ],
    ids=['backbone', 'model'],
)
def test_without_mmpretrain(cfg):
    try:
        import_module('mmpretrain')
    except ImportError:
        with pytest.raises(
            QuantizationError,
            match=(
                r"'mmpretrain\.SwinTransformer' needs mmpretrain, which is not"
                r' installed: pip install'
            ),
        ):
            build_in('mmseg', cfg)
    else:
        assert build_in('mmseg', cfg).quantization.scope in ('backbone', 'model')
