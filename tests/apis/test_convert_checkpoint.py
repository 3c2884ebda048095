"""Checkpoints of other code bases: both layouts built in memory, loaded strictly,
outputs compared.
"""

import re
import runpy
import sys

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mmptq import QuantizationError
from mmptq.apis import convert_checkpoint
from mmptq.backbones.timm_import import import_timm
from mmptq.cli import main

from ..conftest import build_in, image, randomized
from .conftest import ROOT, SHARED

try:
    timm, why = import_timm(), ''
except ImportError as error:
    timm, why = None, str(error)
needs_timm = pytest.mark.skipif(timm is None, reason=why)

SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=(2, 1, 2),
    num_heads=(1, 2, 4),
    window_size=3,
    mlp_ratio=2,
    strides=(4, 2, 2),
    out_indices=(0, 1, 2),
)
VIT = dict(
    type='VisionTransformer',
    img_size=32,
    patch_size=8,
    embed_dims=16,
    num_layers=2,
    num_heads=2,
    mlp_ratio=2,
    out_indices=(0, 1),
)
AS_TIMM = dict(patch_bias=True, final_norm=True, norm_cfg=dict(type='LN', eps=1e-6))
"""What docs/checkpoints.md says a VisionTransformer needs to be timm's."""


class OriginalMerging(nn.Module):
    """The authors' patch merging: the four neighbours concatenated, the row changing
    fastest.
    """

    def __init__(self, dims):
        super().__init__()
        self.norm, self.reduction = (
            nn.LayerNorm(4 * dims),
            nn.Linear(4 * dims, 2 * dims, bias=False),
        )

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


def original_order(value):
    """A tensor of a merging in OpenMMLab's order, its last dimension in the authors'."""
    result, dims = torch.empty_like(value), value.shape[-1] // 4
    for channel in range(dims):
        for row in (0, 1):
            for column in (0, 1):
                result[..., (2 * column + row) * dims + channel] = value[
                    ..., 4 * channel + 2 * row + column
                ]
    return result


def original_name(key):
    """The authors' name of a weight of a SwinTransformer."""
    for new, old in (
        ('patch_embed.projection.', 'patch_embed.proj.'),
        ('.ffn.layers.0.0.', '.mlp.fc1.'),
        ('.ffn.layers.1.', '.mlp.fc2.'),
        ('.attn.w_msa.', '.attn.'),
    ):
        key = key.replace(new, old)
    return re.sub(r'\bstages\.(\d+)', r'layers.\1', key)


def original(state_dict, prefix=''):
    """A state dict with its Swin's weights as the authors have them."""
    result = type(state_dict)()
    result._metadata = state_dict._metadata
    for key, value in state_dict.items():
        mine = key.startswith(prefix)
        result[original_name(key) if mine else key] = (
            original_order(value) if mine and '.downsample.' in key else value
        )
    return result


def converted(weights, tmp_path, **options):
    """What the file holds that a file of these weights is converted to."""
    torch.save(weights, tmp_path / 'source.pth')
    convert_checkpoint(tmp_path / 'source.pth', tmp_path / 'target.pth', **options)
    return torch.load(tmp_path / 'target.pth', weights_only=True)


def without_prefix(checkpoint):
    assert all(key.startswith('backbone.') for key in checkpoint['state_dict'])
    return {
        key.removeprefix('backbone.'): value
        for key, value in checkpoint['state_dict'].items()
    }


def swin(scope='mmseg', seed=0, **options):
    return randomized(build_in(scope, {**SWIN, **options}), seed)


def vit(**options):
    return randomized(build_in('mmseg', {**VIT, **AS_TIMM, **options}))


def timm_vit(**options):
    torch.manual_seed(0)
    sizes = dict(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=5,
    )
    return randomized(timm.models.VisionTransformer(**{**sizes, **options}))


def outputs(model, x):
    with torch.no_grad():
        return list(model(x))


def assert_close(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert other.std() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Swin.


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('size', [(6, 4), (5, 3)], ids=['even', 'odd'])
def test_merging_computes_what_the_authors_does(scope, size, tmp_path):
    model, merging = swin(scope), randomized(OriginalMerging(8), seed=5)
    weights = original(model.state_dict())
    for key, value in merging.state_dict().items():
        weights[f'layers.0.downsample.{key}'] = value
    model.load_state_dict(without_prefix(converted(weights, tmp_path)), strict=True)
    x = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, _ = model.stages[0].downsample(x.flatten(1, 2), size)
        torch.testing.assert_close(
            found, merging(x).flatten(1, 2), rtol=1e-5, atol=1e-5
        )


def timm_swin():
    """A small Swin of timm with the norms that a backbone has after its stages; its
    weights in the authors' layout, those of the classifier too; its outputs for an
    image.
    """
    torch.manual_seed(0)
    model = randomized(
        timm.models.SwinTransformer(
            img_size=(96, 144),
            patch_size=4,
            embed_dim=8,
            depths=(2, 1, 2),
            num_heads=(1, 2, 4),
            window_size=3,
            mlp_ratio=2,
            num_classes=5,
        )
    )
    norms = [randomized(nn.LayerNorm(8 * 2**stage), stage) for stage in range(3)]
    weights = {}
    for key, value in {
        **model.state_dict(),
        **dict(model.named_buffers()),
    }.items():  # timm keeps no buffers in files
        stage = re.match(
            r'layers\.(\d)\.downsample', key
        )  # at the beginning of the next stage
        weights[
            (
                key.replace(stage[0], f'layers.{int(stage[1]) - 1}.downsample')
                if stage
                else key.replace('head.fc', 'head')
            )
        ] = value
    for stage, norm in enumerate(norms):
        weights.update(
            {f'norm{stage}.{key}': value for key, value in norm.state_dict().items()}
        )
    x, expected = (
        image(96, 144, batch=2),
        [],
    )  # whole windows in every stage: timm rolls before it pads, the authors after
    with torch.no_grad():
        features = model.patch_embed(x)
        for layer, norm in zip(model.layers, norms, strict=True):
            features = layer(features)
            expected.append(norm(features).permute(0, 3, 1, 2))
    return weights, x, expected


@needs_timm
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_swin_computes_what_timms_does(scope, tmp_path):
    weights, x, expected = timm_swin()
    model = swin(scope, seed=7)
    model.load_state_dict(
        without_prefix(converted({'model': weights}, tmp_path)), strict=True
    )
    assert_close(outputs(model, x), expected)


@needs_timm
def test_the_classifier_and_masks_are_dropped_and_listed(tmp_path, capsys):
    weights, _, _ = timm_swin()
    torch.save({'model': weights}, tmp_path / 'swin.pth')
    assert (
        main(
            [
                'convert-checkpoint',
                str(tmp_path / 'swin.pth'),
                str(tmp_path / 'new' / 'swin.pth'),
            ]
        )
        == 0
    )
    summary, *dropped = capsys.readouterr().out.splitlines()
    assert dropped == [
        'dropped: norm.weight',
        'dropped: norm.bias',
        'dropped: head.weight',
        'dropped: head.bias',
        'dropped: layers.0.blocks.1.attn_mask',
        'dropped: layers.2.blocks.1.attn_mask',
    ]
    assert all(
        part in summary
        for part in (
            str(tmp_path / 'new' / 'swin.pth'),
            '6 permuted',
            '6 dropped',
            '0 as they were',
            f'{len(weights) - 6} renamed',
        )
    )


@pytest.mark.parametrize(
    'options', [dict(out_indices=(2,)), dict(qkv_bias=False)], ids=str
)
def test_swin_with_fewer_norms_or_biases(options, tmp_path):
    model, other = swin(**options), swin(seed=7, **options)
    other.load_state_dict(
        without_prefix(converted(original(model.state_dict()), tmp_path)), strict=True
    )
    assert_close(outputs(other, image(48, 48)), outputs(model, image(48, 48)))


@pytest.mark.parametrize(
    'name, heads',
    [
        (
            'mask-rcnn_swin-demo',
            ('neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'),
        ),
        ('upernet_swin-demo', ('decode_head', 'auxiliary_head')),
    ],
)
@pytest.mark.parametrize('outer', ['', 'module.'], ids=['plain', 'parallel'])
def test_a_whole_model_of_the_old_packages(name, heads, outer, tmp_path):
    """Parts beside the backbone have the same names in mmdet 2 and 3, in mmsegmentation
    0.x and 1.
    """
    config = Config.fromfile(ROOT / 'configs' / 'demo' / f'{name}.py')
    build_in(config.default_scope, SWIN)
    model, other = (
        randomized(build_in(config.default_scope, config.model), seed)
        for seed in (0, 7)
    )
    weights = original(model.state_dict(), 'backbone.')
    versions = weights._metadata
    weights = type(weights)((outer + key, value) for key, value in weights.items())
    weights._metadata = {
        (outer + module).rstrip('.'): version for module, version in versions.items()
    }
    meta = dict(CLASSES=('a', 'b', 'c'), epoch=3, config='model = dict()')
    checkpoint = converted(
        {'state_dict': weights, 'meta': meta, 'optimizer': {'state': {}}}, tmp_path
    )
    assert set(checkpoint) == {'state_dict', 'meta'} and checkpoint['meta'] == meta
    assert list(checkpoint['state_dict']) == list(model.state_dict())
    assert all(
        checkpoint['state_dict']._metadata[head] == versions[head] for head in heads
    )

    load_checkpoint(
        other, str(tmp_path / 'target.pth'), map_location='cpu', strict=True
    )
    assert all(
        torch.equal(value, other.state_dict()[key])
        for key, value in model.state_dict().items()
    )
    assert_close(
        outputs(other.backbone, image(64, 64)), outputs(model.backbone, image(64, 64))
    )


# ViT.


def timm_features(model, x):
    """What each block makes of the patches, the last one's normed, as maps."""
    with torch.no_grad():
        maps = model.forward_intermediates(
            x, intermediates_only=True, output_fmt='NCHW'
        )
        last = model.forward_features(x)[:, 1:].transpose(1, 2)
    return [*maps[:-1], last.unflatten(2, maps[-1].shape[2:])]


def save_torch(weights, path):
    torch.save({'model': weights}, path.with_suffix('.pth'))
    return path.with_suffix('.pth')


def save_plain(weights, path):
    torch.save(weights, path.with_suffix('.bin'))
    return path.with_suffix('.bin')


def save_safetensors(weights, path):
    save_file(weights, path.with_suffix('.safetensors'))
    return path.with_suffix('.safetensors')


@needs_timm
@pytest.mark.parametrize('save', [save_torch, save_plain, save_safetensors])
def test_vit_computes_what_timms_does(save, tmp_path):
    reference, model, x = timm_vit(), vit(), image(32, 32, batch=2)
    done = convert_checkpoint(
        save(reference.state_dict(), tmp_path / 'vit'), tmp_path / 'target.pth'
    )
    assert set(done.dropped) == {'head.weight', 'head.bias'} and done.permuted == 0
    load_checkpoint(
        model, str(tmp_path / 'target.pth'), map_location='cpu', strict=True
    )
    assert_close(outputs(model, x), timm_features(reference, x))


@needs_timm
def test_vit_whose_classifier_has_the_last_norm(tmp_path):
    reference, model, x = (
        timm_vit(global_pool='avg'),
        vit(final_norm=False),
        image(32, 32),
    )
    checkpoint = converted(reference.state_dict(), tmp_path)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    assert_close(outputs(model, x), timm_features(reference, x))


@needs_timm
@pytest.mark.skipif(
    not (SHARED / 'data').exists(),
    reason='needs ../shared/data, which is no part of the project',
)
def test_a_real_deit(tmp_path):
    reference = timm.create_model('deit_tiny_patch16_224').eval()
    source = SHARED / 'data' / 'weights' / 'deit_tiny_patch16_224.safetensors'
    timm.models.load_checkpoint(reference, str(source))
    model = vit(
        img_size=224,
        patch_size=16,
        embed_dims=192,
        num_layers=12,
        num_heads=3,
        mlp_ratio=4,
        out_indices=tuple(range(12)),
    )
    convert_checkpoint(source, tmp_path / 'target.pth')
    load_checkpoint(
        model, str(tmp_path / 'target.pth'), map_location='cpu', strict=True
    )
    assert_close(
        outputs(model, image(224, 224)), timm_features(reference, image(224, 224))
    )


# Where the result is read.


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_init_cfg_finds_a_swin(scope, tmp_path):
    expected = swin(scope).state_dict()
    converted(original(expected), tmp_path)
    model = build_in(
        scope,
        ConfigDict(
            **SWIN,
            init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'target.pth')),
        ),
    )
    model.init_weights()
    assert all(
        torch.equal(value, expected[key]) for key, value in model.state_dict().items()
    )


@needs_timm
def test_init_cfg_finds_a_vit(tmp_path):
    expected = converted(timm_vit().state_dict(), tmp_path)['state_dict']
    model = build_in(
        'mmseg',
        dict(
            **VIT,
            **AS_TIMM,
            init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'target.pth')),
        ),
    )
    model.init_weights()
    assert set(model.state_dict()) == set(expected)
    assert all(
        torch.equal(value, expected[key]) for key, value in model.state_dict().items()
    )


# What is refused.


def vit_weights():
    """A ViT of one block in timm's layout, zeros."""
    shapes = {
        'cls_token': (1, 1, 4),
        'pos_embed': (1, 5, 4),
        'patch_embed.proj.weight': (4, 3, 2, 2),
        'patch_embed.proj.bias': (4,),
        'blocks.0.norm1.weight': (4,),
        'blocks.0.norm1.bias': (4,),
        'blocks.0.attn.qkv.weight': (12, 4),
        'blocks.0.attn.qkv.bias': (12,),
        'blocks.0.attn.proj.weight': (4, 4),
        'blocks.0.attn.proj.bias': (4,),
        'blocks.0.norm2.weight': (4,),
        'blocks.0.norm2.bias': (4,),
        'blocks.0.mlp.fc1.weight': (8, 4),
        'blocks.0.mlp.fc1.bias': (8,),
        'blocks.0.mlp.fc2.weight': (4, 8),
        'blocks.0.mlp.fc2.bias': (4,),
        'norm.weight': (4,),
        'norm.bias': (4,),
    }
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def swin_weights():
    return dict(original(swin().state_dict()))


def without(weights, *keys):
    return {key: value for key, value in weights.items() if key not in keys}


REFUSED = {
    'no backbone': (
        lambda: {'fc.weight': torch.zeros(2, 2)},
        ['no backbone', 'fc.weight'],
    ),
    'converted Swin': (
        lambda: dict(swin().state_dict()),
        ['converted already', 'stages.0.blocks.0'],
    ),
    'converted ViT': (
        lambda: dict(vit().state_dict()),
        ['converted already', 'layers.0.'],
    ),
    'half converted': (
        lambda: {**swin_weights(), **swin().state_dict()},
        ['several layouts', 'layers.0.blocks.0', 'stages.0.blocks.0'],
    ),
    'Swin and ViT': (
        lambda: {**swin_weights(), **vit_weights()},
        ['several layouts', 'layers.0.blocks.0', 'blocks.0.norm1'],
    ),
    'twice': (
        lambda: {
            **vit_weights(),
            **{f'backbone.{key}': value for key, value in vit_weights().items()},
        },
        ['several layouts', ' blocks.0', 'backbone.blocks.0'],
    ),
    'no norm': (
        lambda: without(swin_weights(), 'layers.1.downsample.norm.bias'),
        ['lacks layers.1.downsample.norm.bias'],
    ),
    'no block': (
        lambda: {
            key: value
            for key, value in swin_weights().items()
            if not key.startswith('layers.0.blocks.0.')
        },
        ['lacks layers.0.blocks.0.'],
    ),
    'no blocks': (
        lambda: {
            key: value
            for key, value in swin_weights().items()
            if not key.startswith('layers.1.blocks.')
        },
        ['lacks layers.1.blocks.0.'],
    ),
    'no table': (
        lambda: without(
            swin_weights(), 'layers.1.blocks.0.attn.relative_position_bias_table'
        ),
        ['lacks layers.1.blocks.0.attn.relative_position_bias_table'],
    ),
    'absolute positions': (
        lambda: {**swin_weights(), 'absolute_pos_embed': torch.zeros(1, 8, 4, 4)},
        ['SwinTransformer', 'no place', 'absolute_pos_embed'],
    ),
    'no embedding': (
        lambda: without(vit_weights(), 'patch_embed.proj.weight'),
        ['lacks patch_embed.proj.weight'],
    ),
    'no bias': (
        lambda: without(vit_weights(), 'blocks.0.attn.qkv.bias'),
        ['lacks blocks.0.attn.qkv.bias'],
    ),
    'wrong shape': (
        lambda: {
            **swin_weights(),
            'layers.1.downsample.reduction.weight': torch.zeros(32, 16),
        },
        ['layers.1.downsample.reduction.weight', '(32, 16)', '(32, 64)'],
    ),
    'wrong dimensions': (
        lambda: {**vit_weights(), 'pos_embed': torch.zeros(5, 4)},
        ['pos_embed', '(5, 4)', '3 dimensions'],
    ),
    'distilled': (
        lambda: {**vit_weights(), 'dist_token': torch.zeros(1, 1, 4)},
        ['VisionTransformer', 'no place', 'dist_token'],
    ),
    'layer scale': (
        lambda: {**vit_weights(), 'blocks.0.ls1.gamma': torch.zeros(4)},
        ['VisionTransformer', 'blocks.0.ls1.gamma'],
    ),
    'a list': (lambda: [torch.zeros(1)], ['no weights']),
    'nothing': (lambda: {'state_dict': {}}, ['no weights']),
    'text': (
        lambda: {'model': {'blocks.0.norm1.weight': 'text'}},
        ['norm1.weight is no tensor'],
    ),
    'code': (
        lambda: {'model': vit_weights(), 'args': Code()},
        ['cannot be read safely'],
    ),
}


class Code:
    def __reduce__(self):
        return exec, ('raise AssertionError("executed")',)


@pytest.mark.parametrize('case', REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(case, tmp_path):
    make, parts = REFUSED[case]
    with pytest.raises(QuantizationError) as error:
        converted(make(), tmp_path)
    assert all(part in str(error.value) for part in ['source.pth', *parts]), error.value
    assert [path.name for path in tmp_path.iterdir()] == ['source.pth']


@needs_timm
def test_timms_own_swin_is_refused(tmp_path):
    weights = timm.models.SwinTransformer(
        img_size=48, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=3
    ).state_dict()
    with pytest.raises(
        QuantizationError,
        match=(
            r'lacks .*layers\.0\.downsample\.norm\.weight.*no place'
            r' .*layers\.1\.downsample'
        ),
    ):
        converted(weights, tmp_path)


def test_weights_that_the_refused_ones_are_made_of_are_taken(tmp_path):
    assert len(converted(vit_weights(), tmp_path, kind='vit')['state_dict']) == 18
    assert len(converted(swin_weights(), tmp_path, kind='swin')['state_dict']) == len(
        swin_weights()
    )


def test_another_kind_than_the_named_one(tmp_path):
    with pytest.raises(
        QuantizationError, match=r'source\.pth.* swin.*blocks\.0\.norm1\.weight.*vit'
    ):
        converted(vit_weights(), tmp_path, kind='swin')


def test_names_of_files(tmp_path):
    torch.save(vit_weights(), tmp_path / 'vit.pth')
    (tmp_path / 'folder.pth').mkdir()
    for target in (
        'vit.pth',
        '../' + tmp_path.name + '/vit.pth',
        'vit.safetensors',
        'folder.pth',
    ):
        with pytest.raises(QuantizationError, match=re.escape(target)):
            convert_checkpoint(tmp_path / 'vit.pth', tmp_path / target)
    with pytest.raises(QuantizationError, match=r'absent\.pth does not exist'):
        convert_checkpoint(tmp_path / 'absent.pth', tmp_path / 'target.pth')


def test_a_broken_or_absent_safetensors_file(tmp_path):
    (tmp_path / 'broken.safetensors').write_bytes(b'no tensors here')
    with pytest.raises(QuantizationError, match=r'broken\.safetensors cannot be read'):
        convert_checkpoint(tmp_path / 'broken.safetensors', tmp_path / 'target.pth')
    with pytest.raises(QuantizationError, match=r'absent\.safetensors cannot be read'):
        convert_checkpoint(tmp_path / 'absent.safetensors', tmp_path / 'target.pth')


def test_the_tool(tmp_path, monkeypatch, capsys):
    torch.save(vit_weights(), tmp_path / 'vit.pth')
    monkeypatch.chdir(tmp_path)
    for target, code, text in (
        ('target.pth', 0, 'target.pth: 18 weights'),
        ('vit.pth', 2, 'mmptq: error: vit.pth'),
    ):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', 'vit.pth', target])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(
                str(ROOT / 'tools' / 'convert_checkpoint.py'), run_name='__main__'
            )
        assert end.value.code == code and ''.join(capsys.readouterr()).startswith(text)
