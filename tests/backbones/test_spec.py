"""Which layers are known, on real backbones."""

import pytest
import torch
from torch import nn

from mmptq import QuantizationError
from mmptq.backbones import SITES, BackboneSpec, find_spec, register_spec, spec
from mmptq.backbones.spec import matches
from mmptq.backbones.swin import SWIN
from mmptq.backbones.vit import VIT

from ..conftest import build_in, image


@pytest.fixture(scope='session')
def known():
    """The three classes, by package and name."""
    import mmdet.models
    import mmseg.models

    return {
        'mmdet.SwinTransformer': mmdet.models.SwinTransformer,
        'mmseg.SwinTransformer': mmseg.models.SwinTransformer,
        'mmseg.VisionTransformer': mmseg.models.VisionTransformer,
    }


def test_specs_are_found_by_class(family, float_backbone):
    expected = VIT if family[1]['type'] == 'VisionTransformer' else SWIN
    assert find_spec(float_backbone) is expected


def test_specs_are_found_by_base_class(family, float_backbone):
    class Mine(type(float_backbone)):
        pass

    class Younger(Mine):
        pass

    mine = Younger.__new__(Younger)
    assert find_spec(mine) is find_spec(float_backbone)


def test_unknown_backbones_are_refused_with_a_list_of_the_known():
    resnet = build_in('mmdet', dict(type='ResNet', depth=18, base_channels=2))
    with pytest.raises(QuantizationError) as error:
        find_spec(resnet)
    for name in (
        'mmdet.models.backbones.resnet.ResNet',
        'mmdet.SwinTransformer',
        'mmseg.SwinTransformer',
        'mmseg.VisionTransformer',
    ):
        assert name in str(error.value)


def test_a_class_of_the_same_name_elsewhere_is_unknown():
    class SwinTransformer(nn.Module):
        pass

    with pytest.raises(QuantizationError, match=r'SwinTransformer is not known'):
        find_spec(SwinTransformer())


def test_blocks_are_named_in_the_order_in_which_they_run(float_backbone):
    names = find_spec(float_backbone).block_names(float_backbone)
    ran = []
    for name in names:
        float_backbone.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: ran.append(name)
        )
    with torch.no_grad():
        float_backbone(image(40, 48))
    assert ran == names and len(names) == len(set(names))


def test_blocks_hold_every_layer_but_the_output_norms(float_backbone):
    found = find_spec(float_backbone)
    names = found.block_names(float_backbone)
    outside = [
        name
        for name, module in float_backbone.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not name.startswith(tuple(f'{block}.' for block in names))
    ]
    assert outside == []


def test_blocks_by_hand(family, float_backbone):
    expected = (
        ['patch_embed', 'layers.0', 'layers.1', 'layers.2']
        if family[1]['type'] == 'VisionTransformer'
        else [
            'patch_embed',
            'stages.0.blocks.0',
            'stages.0.blocks.1',
            'stages.0.downsample',
            'stages.1.blocks.0',
        ]
    )
    assert find_spec(float_backbone).block_names(float_backbone) == expected


def test_every_pattern_names_something(float_backbone):
    found = find_spec(float_backbone)
    names = [name for name, _ in float_backbone.named_modules()]
    # nn.MultiheadAttention hides its input projection until it is written out.
    for pattern in (
        *found.blocks,
        *found.attentions,
        *(site for site in found.sites if not site.endswith('.in_proj')),
    ):
        assert any(matches(name, (pattern,)) for name in names), pattern
    assert set(found.sites.values()) <= set(SITES)


def tree():
    return nn.ModuleDict(
        {
            'stem': nn.Linear(1, 1),
            'layers': nn.ModuleList([nn.Sequential(nn.Linear(1, 1), nn.ReLU())] * 2),
        }
    )


@pytest.mark.parametrize(
    ('name', 'pattern', 'expected'),
    [
        ('layers.0', 'layers.*', True),
        ('layers.0.1', 'layers.*', False),
        ('layers', 'layers.*', False),
        ('a.b.c', 'a.*.c', True),
        ('a.b.d.c', 'a.*.c', False),
        ('layers.10', 'layers.1', False),
        ('Layers.0', 'layers.*', False),
    ],
)
def test_a_star_is_one_part_of_a_name(name, pattern, expected):
    assert (
        matches(name, (pattern,)) is expected
        and matches(name, ('no', pattern)) is expected
    )


def test_sites_by_the_first_pattern_that_fits():
    found = BackboneSpec(
        (), (), (), {'layers.0.*': 'post_norm', 'layers.*.*': 'post_gelu'}
    )
    assert [found.site(name) for name in ('layers.0.0', 'layers.1.0', 'stem')] == [
        'post_norm',
        'post_gelu',
        None,
    ]


@pytest.mark.parametrize(
    ('blocks', 'message'),
    [
        (('stages.*',), r'ModuleDict has no module named like stages\.\*'),
        (
            ('layers.*', 'layers.*.*'),
            r'ModuleDict: block layers\.0\.0 lies within block layers\.0',
        ),
    ],
)
def test_blocks_that_do_not_fit(blocks, message):
    with pytest.raises(QuantizationError, match=message):
        BackboneSpec((), blocks, (), {}).block_names(tree())


def test_later_specs_win(monkeypatch, known):
    monkeypatch.setattr(spec, '_SPECS', list(spec._SPECS))
    backbone = known['mmdet.SwinTransformer'].__new__(known['mmdet.SwinTransformer'])
    mine = register_spec(
        BackboneSpec(('mmdet.SwinTransformer', 'mine.Backbone'), ('stages.*',), (), {})
    )
    assert find_spec(backbone) is mine and 'mine.Backbone' in spec.known_classes()


def test_the_known_are_listed_in_order(known):
    found = spec.known_classes()
    assert set(found) >= set(known) and found == sorted(set(found))
