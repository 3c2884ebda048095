"""ViTDet: mmdetection's class is in no package, so a small backbone of the same
structure stands in for it.
"""

import pytest
import torch
from torch import nn

from mmptq.backbones import find_spec
from mmptq.backbones.convert import convert
from mmptq.backbones.vitdet import VITDET
from mmptq.calibration import Call, calibrate, operations
from mmptq.methods import MinMax

from ..conftest import image, quantizers_of, randomized, recipe


class Attention(nn.Module):
    """Heads are folded into the batch, and terms of relative position added, products
    of the query with tables.
    """

    def __init__(self, window):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.rel_pos_h = nn.Parameter(torch.zeros(window, window, 4))

    def forward(self, x):  # (batch, height, width, channels)
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * 2, height * width, 4).unbind(0)
        scores = (q * 0.5) @ k.transpose(-2, -1)
        terms = torch.einsum(
            'bhwc,hkc->bhwk', q.view(-1, height, width, 4), self.rel_pos_h
        )
        scores = (
            (scores.view(-1, height, width, height, width) + terms[..., None])
            .flatten(3)
            .flatten(1, 2)
        )
        out = (scores.softmax(-1) @ v).view(batch, 2, height, width, 4)
        return self.proj(out.permute(0, 2, 3, 1, 4).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """In windows of 2 x 2, or over all."""

    def __init__(self, windowed):
        super().__init__()
        self.windowed = windowed
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(8),
            Attention(2 if windowed else 4),
            nn.LayerNorm(8),
            Mlp(),
        )

    def forward(self, x):
        batch, height, width, _ = x.shape
        inside = self.norm1(x)
        if self.windowed:
            inside = (
                inside.view(batch, height // 2, 2, width // 2, 2, 8)
                .transpose(2, 3)
                .reshape(-1, 2, 2, 8)
            )
        inside = self.attn(inside)
        if self.windowed:
            inside = (
                inside.view(batch, height // 2, width // 2, 2, 2, 8)
                .transpose(2, 3)
                .reshape(x.shape)
            )
        x = x + inside
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 16, 16)

    def forward(self, x):
        return self.proj(x).permute(0, 2, 3, 1)


class ViT(nn.Module):
    __module__ = 'projects.ViTDet.vitdet.vit'

    def __init__(self):
        super().__init__()
        self.patch_embed, self.blocks = (
            PatchEmbed(),
            nn.ModuleList([Block(True), Block(False)]),
        )

    def forward(self, x):
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return randomized(ViT())


@pytest.fixture
def backbone(plain):
    built = ViT().eval()
    built.load_state_dict(plain.state_dict())
    assert convert(built, find_spec(built), recipe('minmax_w4a4')).skipped == {}
    return built


@torch.no_grad()
def test_uncalibrated_it_is_the_original(plain, backbone):
    assert find_spec(plain) is VITDET
    assert torch.equal(backbone(image(64, 64)), plain(image(64, 64)))


@torch.no_grad()
def test_each_head_has_a_range_of_its_own(plain, backbone):
    names = VITDET.block_names(backbone)
    assert names == ['patch_embed', 'blocks.0', 'blocks.1']
    calibrate(
        backbone, names, [Call((image(64, 64, seed),)) for seed in range(2)], MinMax()
    )
    assert all(
        quantizer.params is not None for quantizer in quantizers_of(backbone).values()
    )
    ops = operations(backbone)
    assert len(ops) == 1 + 2 * 6
    for number in range(2):
        keys = ops[f'blocks.{number}.attn.qk'].quantizer('right').params['scale']
        assert keys.numel() == 2 and keys.flatten()[0] != keys.flatten()[1]
    x = image(64, 64)
    assert 0.01 < float((backbone(x) - plain(x)).norm() / plain(x).norm()) < 1
