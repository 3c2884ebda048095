"""Kernels for a GPU: on one where there is one, else in Triton's interpreter; and that
they compile for one, which needs none.

The references are an int64 product, torch's layer norm, and the attention that the CPU
runs.
"""

import json
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip('triton', reason='needs Triton (requirements/triton.txt)')

from mmptq import QuantizationError
from mmptq.layers import QuantConv2d
from mmptq.runtime import convert, to_integer
from mmptq.runtime.attention import Attention
from mmptq.runtime.coders import AdaLog, Change, DeMax, Uniform
from mmptq.runtime.conv import IntegerConv2d
from mmptq.runtime.cpu.attention import softmax, split_heads
from mmptq.runtime.errors import NoIntegerForm
from mmptq.runtime.kernels import integer_product, with_maxima
from mmptq.runtime.products import Steps
from mmptq.runtime.triton import attention as attention_file
from mmptq.runtime.triton import product as product_file
from mmptq.runtime.triton.attention import GpuAttention
from mmptq.runtime.triton.backend import TritonBackend
from mmptq.runtime.triton.block import GpuBlock
from mmptq.runtime.triton.norm import GpuNorm
from mmptq.runtime.triton.product import GpuProduct
from mmptq.runtime.windows import places

from ..conftest import equip
from .conftest import IMAGES, ready, whole
from .test_blocks import agree, block_calls, first, relative

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
pytestmark = pytest.mark.usefixtures('uncompiled')
torch.backends.cudnn.allow_tf32 = False  # the simulation's convolutions


@pytest.fixture
def triton(monkeypatch):
    """The choice that a GPU makes, wherever the tensors are."""
    monkeypatch.setattr(convert, 'choose_backend', lambda device: TritonBackend())


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed)).to(DEVICE)


def integer(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=generator(seed)).to(DEVICE)


def uniform(scale, zero, bits):
    scale = torch.as_tensor(scale, dtype=torch.float32, device=DEVICE)
    return Uniform(
        1 / scale,
        torch.as_tensor(zero, dtype=torch.float32, device=DEVICE),
        2**bits - 1,
        scale,
    )


def clear(values):
    """Those that are not at the edge between two codes."""
    return (values - values.floor() - 0.5).abs() > 1e-3


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    weight_bits=st.integers(2, 8),
    rows=st.integers(1, 140),
    inner=st.integers(1, 140),
    out=st.integers(1, 140),
    zero=st.floats(0, 1),
    ends=st.booleans(),
)
def test_sums_are_exact(seed, bits, weight_bits, rows, inner, out, zero, ends):
    """For all widths, shapes, zero points at the ends and between; codes and weights
    that are all at their ends too.
    """
    zero, most = round(zero * (2**bits - 1)), 2**bits - 1
    codes = (
        integer(0, 2, rows, inner, seed=seed) * most
        if ends
        else integer(0, most + 1, rows, inner, seed=seed)
    ).to(torch.uint8)
    weight_zero = integer(0, 2**weight_bits, out, 1, seed=seed + 1)
    weight = (
        integer(0, 2, out, inner, seed=seed + 2) * (2**weight_bits - 1)
        if ends
        else integer(0, 2**weight_bits, out, inner, seed=seed + 2)
    ) - weight_zero
    product = GpuProduct(weight, zero, most)
    expected = (codes.long() - zero).cpu() @ weight.cpu().T
    assert torch.equal(
        product(codes, torch.ones(out, device=DEVICE), None).cpu(), expected.float()
    )


@pytest.mark.parametrize('bits', [4, 8])
def test_what_a_product_does_with_its_sums(bits):
    """Gain and offset; added to a tensor; GELU; steps, cut at both ends, of a changed
    output.
    """
    codes, weight = (
        integer(0, 2**bits, 50, 40).to(torch.uint8),
        integer(-100, 155, 48, 40),
    )
    product = GpuProduct(weight, 3, 2**bits - 1)
    gain, offset = rand(48).abs() / 60 / 2**bits, rand(48, seed=1)
    expected = (
        ((codes.long() - 3).cpu() @ weight.cpu().T).double() * gain.cpu().double()
        + offset.cpu().double()
    ).to(DEVICE)
    torch.testing.assert_close(
        product(codes, gain, offset).double(), expected, rtol=1e-6, atol=1e-6
    )
    total = rand(50, 48, seed=2)
    before = total.clone()
    assert torch.equal(
        product.added(total, codes, gain, offset), before + product(codes, gain, offset)
    ) and torch.equal(total, before)
    product.add_to(total, codes, gain, offset)
    torch.testing.assert_close(total.double(), before + expected, rtol=1e-6, atol=1e-6)
    through = nn.functional.gelu(expected)
    torch.testing.assert_close(
        product(codes, gain, offset, gelu=True).double(), through, rtol=1e-5, atol=1e-6
    )
    change = Change(rand(48, seed=3).abs() + 0.1, rand(48, seed=4))
    for each in (None, change):
        changed = through if each is None else through * each.factor - each.shift
        steps = changed / 0.1
        found = product(codes, gain, offset, Steps(0.1, 7, 15, each), True)
        wanted = (steps.round() + 7).clamp(0, 15)
        assert found.dtype == torch.uint8 and len(found.unique()) > 8
        assert torch.equal(found[clear(steps)].double(), wanted[clear(steps)])


@pytest.mark.parametrize('channels', [16, 96, 100])
@pytest.mark.parametrize('affine', [True, False])
def test_codes_of_a_layer_norm(channels, affine):
    norm, x = (
        nn.LayerNorm(channels, elementwise_affine=affine).to(DEVICE),
        rand(37, channels) * 3 + 1,
    )
    coder, change = (
        uniform(0.05, 31, 6),
        Change(rand(channels, seed=1).abs() + 0.5, rand(channels, seed=2) / 10),
    )
    if affine:
        norm.weight.data, norm.bias.data = (
            rand(channels, seed=3),
            rand(channels, seed=4),
        )
    for each in (None, change):
        out = torch.full((38, channels), 77, dtype=torch.uint8, device=DEVICE)
        GpuNorm(norm, each, coder)(x, out)
        normed = (
            norm(x).detach()
            if each is None
            else norm(x).detach() * each.factor - each.shift
        )
        steps = normed / 0.05
        assert (out[-1] == 77).all()
        assert torch.equal(
            out[:-1][clear(steps)].float(), coder.codes(normed)[clear(steps)]
        )


def probabilities_of(kind):
    if kind == 'uniform':
        return uniform(1 / 200, 0, 8)
    if kind == 'uniform about 3':
        return uniform(1 / 12, 3, 4)
    if kind == 'adalog':
        codes = torch.arange(16, device=DEVICE)
        table = torch.cat(
            [
                torch.exp2(-torch.floor(codes * 20 / 37)) * (30 - codes % 8),
                torch.tensor([0.0, torch.nan], device=DEVICE),
            ]
        )
        return AdaLog(
            torch.ones((), device=DEVICE),
            torch.tensor(-37 / 20, device=DEVICE),
            16,
            table,
            torch.tensor(1 / 30, device=DEVICE),
        )
    return DeMax(15, 1, kind == 'demax, half')


KINDS = ['uniform', 'uniform about 3', 'adalog', 'demax', 'demax, half']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'case',
    [
        'windows',
        'shifted windows',
        'a map smaller than its windows',
        'short rows',
        'long rows',
    ],
)
def test_attention_is_that_of_the_cpu(kind, case):
    """With padding, regions and biases by window, two images; rows of more than one
    piece.
    """
    heads, channels, images = 3, 20, 2
    window = {
        'windows': (7, 0),
        'shifted windows': (7, 3),
        'a map smaller than its windows': (7, 3),
    }.get(case)
    sizes = {
        'windows': (9, 15),
        'shifted windows': (15, 9),
        'a map smaller than its windows': (5, 4),
        'short rows': (1, 5),
    }
    size = sizes.get(case, (15, 13))
    tokens = size[0] * size[1]
    low, high = (torch.tensor(value, device=DEVICE) for value in (-100.0, 110.0))
    spans = tuple(
        (torch.tensor([z, z + 2, z], device=DEVICE).view(3, 1, 1), low, high)
        for z in (128.0, 120.0, 126.0)
    )
    bias = None if window is None else rand(heads, 49, 49)
    keys = -2 if window is not None and kind.startswith('uniform') else -1
    layer_change = Change(
        rand(heads * channels, seed=5).abs() + 0.5, rand(heads * channels, seed=6) / 10
    )
    attention = Attention(
        spans,
        (rand(heads, 1, 1, seed=1).abs() + 0.5) / 40000,
        None if bias is None else bias.transpose(keys, -1).contiguous(),
        keys,
        probabilities_of(kind),
        (rand(heads, 1, 1, seed=2).abs() + 0.5) / 5000,
        (258, 258),
        layer_change,
        uniform(1, 0, 8),
    )
    steps = integer(0, 256, images * tokens + 1, 3 * heads * channels).to(torch.uint8)
    exact = []
    for image in range(images):
        rows = torch.cat([steps[image * tokens : (image + 1) * tokens], steps[-1:]])
        if window is None:
            inside, place, seen = rows[None, :-1], None, attention
        else:
            token, region = places(*size, *window, DEVICE)
            inside, place = rows[token.long()], token
            mask = torch.where(
                region[:, None, :, None] != region[:, None, None, :], -100.0, 0.0
            )
            seen = attention._replace(bias=bias.transpose(keys, -1) + mask)
        split = inside.view(*inside.shape[:2], 3, heads, channels)
        result = reference(split, seen)
        if place is not None:
            ordered = torch.empty(tokens + 1, heads * channels, device=DEVICE)
            ordered[place.long().flatten()] = result.flatten(0, 1)
            result = ordered[:-1]
        exact.append(result.view(tokens, -1))
    values = torch.cat(exact)
    coder = uniform(float(values.std()) / 12, 120, 8)
    found = GpuAttention(attention._replace(output=coder), heads, channels, window)(
        steps, images, size
    ).float()
    expected = coder.codes(values)
    assert len(found.unique()) > 30 and (found - expected).abs().max() <= 4
    assert (found == expected)[clear(values * coder.inverse)].float().mean() > 0.998


def reference(split, attention):
    """The attention's output before its codes, by the CPU's functions."""
    queries, keys, values = split_heads(split, attention.spans)
    left, right = (queries, keys) if attention.keys == -1 else (keys, queries)
    scores = integer_product(left, right.transpose(-1, -2), attention.held[0])
    probabilities, side = softmax(
        scores, attention.scale, attention.bias, attention.probabilities, attention.keys
    )
    product = integer_product(
        probabilities.transpose(attention.keys, -1), values, attention.held[1]
    )
    if side is not None:
        product = with_maxima(product, values, *side)
    out = (product * attention.gain).transpose(1, 2).flatten(2)
    return out * attention.change.factor - attention.change.shift


@pytest.mark.parametrize(
    'kernel, stride, padding, dilation, mode',
    [
        ((1, 1), 1, 0, 1, 'zeros'),
        ((3, 2), 2, 1, 1, 'zeros'),
        ((2, 3), 1, (2, 1), 2, 'reflect'),
        ((4, 4), 4, 0, 1, 'zeros'),
    ],
)
@torch.no_grad()
def test_a_convolution_is_that_of_the_simulation(
    kernel, stride, padding, dilation, mode, triton
):
    """As a product with receptive fields; weights that int8 does not hold among them."""
    op = QuantConv2d.from_float(
        nn.Conv2d(5, 7, kernel, stride, padding, dilation, padding_mode=mode)
    )
    op.weight.data = torch.randint(
        -90, 166, op.weight.shape, generator=generator(1)
    ).float()
    equip(op, input=whole(0.5, 90, 8), weight=whole(1, [90] * 7, 8, axis=-4)).to(DEVICE)
    x = rand(2, 5, 13, 11) * 40
    converted = IntegerConv2d(op, TritonBackend())
    assert converted.path == 'int8, by Triton'
    torch.testing.assert_close(converted(x), op(x), rtol=1e-6, atol=1e-2)
    grouped = equip(
        QuantConv2d.from_float(nn.Conv2d(4, 4, 1, groups=2)),
        input=whole(1, 0, 8),
        weight=whole(1, [8] * 4, 4, axis=-4),
    )
    with pytest.raises(NoIntegerForm, match='in groups on a GPU'):
        IntegerConv2d(grouped, TritonBackend())


@pytest.mark.parametrize(
    'name, recipe',
    [
        ('mmdet swin', 'minmax_w8a8'),
        ('mmdet swin', 'adalog_w4a4'),
        ('mmdet swin', 'uqvit_w4a4'),
        ('mmseg vit', 'adalog_w4a4'),
        ('mmseg vit', 'uqvit_w4a4'),
        ('timm vit scaled', 'minmax_w8a8'),
    ],
)
@torch.no_grad()
def test_every_block_is_that_of_the_simulation(name, recipe, triton):
    """Blocks of a backbone, padded and shifted windows."""
    backbone = ready(name, recipe).to(DEVICE)
    calls = block_calls(backbone, IMAGES[0].to(DEVICE))
    converted = ready(name, recipe).to(DEVICE)
    paths = to_integer(converted)
    assert any(isinstance(module, GpuBlock) for module in converted.modules())
    assert {path for path in paths.values() if 'AdaLog' not in path} <= {
        'int8, by Triton',
        'integers, exact in float32',
    }
    for block, (args, kwargs, expected) in calls.items():
        assert agree(
            first(converted.get_submodule(block)(*args, **kwargs)),
            first(expected),
            args[0],
        ), block


@torch.no_grad()
def test_a_whole_backbone_and_its_batch(triton):
    """As on a CPU: to 1e-6, but where a code goes to the other side."""
    backbone, converted = (
        ready('mmdet swin', 'minmax_w8a8_symmetric').to(DEVICE),
        ready('mmdet swin', 'minmax_w8a8_symmetric').to(DEVICE),
    )
    to_integer(converted)
    x = torch.cat(IMAGES).to(DEVICE)
    outputs = converted(x)
    errors = [relative(a, b) for a, b in zip(outputs, backbone(x), strict=True)]
    assert max(errors) <= 5e-2, errors
    for number in range(2):
        for batch, single in zip(
            outputs, converted(x[number : number + 1]), strict=True
        ):
            torch.testing.assert_close(batch[number], single[0], rtol=1e-5, atol=1e-5)


def test_inputs_of_another_width_are_refused():
    """A kernel would read beyond them."""
    product = GpuProduct(integer(-8, 8, 5, 16), 3, 15)
    ones = torch.ones(5, device=DEVICE)
    with pytest.raises(
        QuantizationError, match=r'16 inputs and 5 outputs got codes of shape \(2, 15\)'
    ):
        product(torch.zeros(2, 15, dtype=torch.uint8, device=DEVICE), ones, None)
    with pytest.raises(QuantizationError, match=r'for a tensor of shape \(2, 4\)'):
        product.add_to(
            torch.zeros(2, 4, device=DEVICE),
            torch.zeros(2, 16, dtype=torch.uint8, device=DEVICE),
            ones,
            None,
        )


def test_two_maxima_and_wide_heads_have_no_kernel():
    attention = Attention(
        ((0, 0, 0),) * 3,
        torch.ones(1),
        None,
        -1,
        DeMax(15, 2, True),
        torch.ones(1),
        (1, 1),
        None,
        uniform(1, 0, 8),
    )
    with pytest.raises(NoIntegerForm, match='two or more maxima'):
        GpuAttention(attention, 1, 8, None)
    with pytest.raises(NoIntegerForm, match='heads of 300 channels'):
        GpuAttention(attention._replace(probabilities=uniform(1, 0, 8)), 1, 300, None)


COMPILE = '''
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmptq.runtime.triton import attention, norm, product
from tests.runtime.test_gpu import swin_launches

TYPES = {torch.uint8: '*u8', torch.int8: '*i8', torch.int32: '*i32', torch.float32: '*fp32', int: 'i32', float: 'fp32'}
made = []

class Launched:
    """In place of a kernel: compiled for a GPU as it is launched, and not run."""
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self
    def __call__(self, *values, **options):
        signature, constants, attributes = {}, {}, {}
        for number, (parameter, value) in enumerate(zip(self.kernel.params, values, strict=True)):
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
            # Otherwise 1 would be a constant, and sizes compiled for.
            assert kind is not int or parameter.is_constexpr or parameter.do_not_specialize
            signature[parameter.name] = 'constexpr' if parameter.is_constexpr else TYPES[kind]
            if parameter.is_constexpr:
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                attributes[number,] = [['tt.divisibility', 16]]
        for arch in (80, 90):
            source = ASTSource(self.kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget('cuda', arch, 32), options=options)
            made.append(dict(kernel=self.kernel.__name__, arch=arch, shared=compiled.metadata.shared, size=len(compiled.asm['cubin']),
                             mma=sorted({line.split()[0].split('.sync')[0] + ' ' + line.split()[0].split('.', 3)[-1]
                                         for line in compiled.asm['ptx'].splitlines() if line.strip().startswith(('mma.', 'wgmma.mma'))})))

for file, name in ((norm, 'encode_normalized_kernel'), (product, 'multiply_kernel'), (attention, 'attend_kernel')):
    setattr(file, name, Launched(getattr(file, name)))
product.GpuProduct._check = lambda *_: None
swin_launches()
print(json.dumps(made))
'''


def swin_launches():
    """What a block of a Swin-T's first stage launches, and attention over 1025 tokens
    of a DeiT-Tiny, with coders of probabilities.
    """
    channels, heads = 96, 3
    spans = ((torch.tensor(128.0), torch.tensor(-128.0), torch.tensor(127.0)),) * 3
    for kind, window, size in (
        ('uniform', (7, 3), (8, 9)),
        ('demax, half', (7, 0), (7, 7)),
        ('adalog', None, (25, 41)),
        ('uniform', None, (25, 41)),
    ):
        attention = Attention(
            spans,
            torch.tensor(1e-4),
            None if window is None else torch.zeros(heads, 49, 49),
            -1,
            probabilities_of(kind),
            torch.tensor(1e-3),
            (258, 258),
            None,
            uniform(0.1, 3, 8),
        )
        steps = torch.zeros(size[0] * size[1] + 1, 3 * channels, dtype=torch.uint8)
        GpuAttention(attention, heads, channels // heads, window)(steps, 1, size)
    wide = Attention(
        spans,
        torch.tensor(1e-4),
        None,
        -1,
        probabilities_of('adalog'),
        torch.tensor(1e-3),
        (258, 258),
        None,
        uniform(0.1, 3, 8),
    )
    GpuAttention(wide, 2, 160, None)(
        torch.zeros(1026, 960, dtype=torch.uint8), 1, (25, 41)
    )
    rows, out = torch.zeros(64, channels), torch.zeros(65, channels, dtype=torch.uint8)
    GpuNorm(nn.LayerNorm(channels), None, uniform(0.1, 3, 8))(rows, out)
    for low, most, change in (
        (-128, 255, None),
        (0, 15, Change(torch.ones(4 * channels), torch.zeros(4 * channels))),
    ):
        wide = GpuProduct(integer(low, low + 256, 4 * channels, channels), 3, most)
        wide(out, wide.none, None, Steps(0.1, 3, most, change), True)
        narrow = GpuProduct(integer(low, low + 256, channels, 4 * channels), 3, most)
        narrow.add_to(
            rows, torch.zeros(64, 4 * channels, dtype=torch.uint8), narrow.none, None
        )


def test_kernels_compile_for_a_gpu_to_its_integer_instructions(monkeypatch):
    """Machine code for compute capabilities 8.0 and 9.0, by Triton's own assembler;
    that it runs, only a GPU shows.
    """
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', COMPILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert {row['kernel'] for row in made} == {
        'encode_normalized_kernel',
        'multiply_kernel',
        'attend_kernel',
    }
    for row in made:
        assert row['size'] > 1000 and row['shared'] <= 99 * 1024, (
            row
        )  # what the smallest of these GPUs have
        if row['kernel'] == 'multiply_kernel':
            assert row['mma'] and all('.s32.s8.s8' in name for name in row['mma']), row
        if row['kernel'] == 'attend_kernel':
            assert row['mma'] and not any('bf16' in name for name in row['mma']), row


def test_a_kernel_that_fails_leaves_the_layer_or_block_as_it_was(
    triton, monkeypatch, caplog
):
    """Named, and nothing half converted: what Triton's compiler or a GPU cannot do is
    known at the first launch.
    """

    def broken(*args, **options):
        raise RuntimeError('out of shared memory')

    monkeypatch.setattr(logging.getLogger('mmengine'), 'propagate', True)
    backbone = ready('mmdet swin')
    with monkeypatch.context() as patch:
        patch.setattr(
            attention_file,
            'attend_kernel',
            type('Broken', (), {'__getitem__': lambda *_: broken})(),
        )
        paths = to_integer(backbone)
    assert not any(isinstance(module, GpuBlock) for module in backbone.modules())
    assert set(paths.values()) == {'int8, by Triton', 'integers, exact in float32'}
    assert (
        'a kernel of Triton failed: RuntimeError: out of shared memory' in caplog.text
    )
    backbone = ready('mmdet swin')
    with monkeypatch.context() as patch:
        patch.setattr(
            product_file,
            'multiply_kernel',
            type('Broken', (), {'__getitem__': lambda *_: broken})(),
        )
        paths = to_integer(backbone)
    assert (
        'simulated: a kernel of Triton failed: RuntimeError: out of shared memory'
        in paths.values()
    )
