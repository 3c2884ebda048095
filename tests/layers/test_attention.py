"""Attention modules whose two products are reached, on real ones of mmdet, mmseg and
torch.
"""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmptq import QuantizationError
from mmptq.calibration import Block
from mmptq.calibration.capture import listening
from mmptq.layers import QuantLinear, SelfAttention, extend_attention
from mmptq.layers.attention import RouteProducts
from mmptq.quantizers import UniformQuantizer

from ..conftest import TwoProducts, adalog, equip, randomized, uniform


class Fused(TwoProducts):
    """As torch's fused attention; mask and options for it."""

    def forward(self, x, mask=None, **options):
        return F.scaled_dot_product_attention(*self.split(x), mask, **options)


class Keywords(TwoProducts):
    def forward(self, x, mask=None):
        q, k, v = self.split(x)
        return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)


class Operator(TwoProducts):
    def forward(self, x):
        q, k, v = self.split(x)
        return operator.matmul(operator.matmul(q, k.transpose(-2, -1)).softmax(-1), v)


class Functions(TwoProducts):
    def forward(self, x):
        q, k, v = self.split(x)
        return torch.matmul(q, k.transpose(-2, -1)).softmax(-1).matmul(v)


class OneProduct(TwoProducts):
    def forward(self, x):
        q, k, _ = self.split(x)
        return q @ k.transpose(-2, -1)


class ThreeProducts(TwoProducts):
    def forward(self, x):
        return super().forward(x) @ torch.eye(4)


class NotRouted(TwoProducts):
    def forward(self, x):
        q, k, v = self.split(x)
        return torch.einsum(
            'bhij,bhjc->bhic', torch.einsum('bhic,bhjc->bhij', q, k).softmax(-1), v
        )


class Flat(TwoProducts):
    def forward(self, x):
        q, k, v = (t.flatten(0, 1) for t in self.split(x))
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Folded(Flat):
    """Heads folded into the batch, as in ViTDet."""

    num_heads = 2

    def forward(self, x):
        return super().forward(x).unflatten(0, (-1, 2))


class ReadWeight(TwoProducts):
    """Reads the weight of its projection and adds a bias of its own, as BEiT does."""

    def __init__(self, bias=False):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias)
        self.q_bias = nn.Parameter(torch.randn(24))

    def split(self, x):
        return (
            F.linear(input=x, weight=self.qkv.weight, bias=self.q_bias)
            .view(*x.shape[:2], 3, 2, 4)
            .permute(2, 0, 3, 1, 4)
        )


class ReadBoth(ReadWeight):
    def __init__(self):
        super().__init__(bias=True)
        self.q_bias = self.qkv.bias


class Clash(TwoProducts):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, None)


def window_attention():
    """mmdet's, with a mask for two windows."""
    from mmdet.models.backbones.swin import WindowMSA

    x = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 16, 16)
    mask[1, :8, 8:] = mask[1, 8:, :8] = -100
    return WindowMSA(8, 2, (4, 4)), x, mask


def written_out():
    """mmseg's, which calls nn.MultiheadAttention, written out."""
    from mmseg.models.backbones.vit import TransformerEncoderLayer

    layer = TransformerEncoderLayer(8, 2, 16)
    layer.attn.attn = SelfAttention.from_float(layer.attn.attn)
    return layer.attn.attn, torch.randn(
        3, 5, 8, generator=torch.Generator().manual_seed(1)
    )


def extended(attention, **quantizers):
    """A copy with reachable products; quantizers as ``qk_left`` and so on."""
    attention = copy.deepcopy(attention)
    for name, op in zip(('qk', 'pv'), extend_attention(attention), strict=True):
        equip(
            op,
            **{
                key.removeprefix(f'{name}_'): value
                for key, value in quantizers.items()
                if key.startswith(name)
            },
        )
    return attention


def result(attention, x, *args, **kwargs):
    if isinstance(attention, SelfAttention | nn.MultiheadAttention):
        return attention(x, x, x, *args, **kwargs)[0]
    return attention(x, *args, **kwargs)


PLAIN = [TwoProducts, Operator, Functions, Folded]
FUSED = [Fused, Keywords]


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 5, 8)


# Uncalibrated.


@pytest.mark.parametrize('cls', PLAIN)
def test_uncalibrated_is_the_original(cls, x):
    attention = cls()
    assert torch.equal(extended(attention)(x), attention(x))


@pytest.mark.parametrize('masked', [False, True])
def test_uncalibrated_window_attention_is_the_original(masked):
    attention, x, mask = window_attention()
    randomized(attention)
    mask = mask if masked else None
    assert torch.equal(extended(attention)(x, mask), attention(x, mask))


FUSED_MASKS = {
    'none': lambda: None,
    'float': lambda: torch.randn(5, 5),
    'float by head': lambda: torch.randn(2, 5, 5),
    'bool': lambda: torch.rand(3, 1, 5, 5).gt(0.3) | torch.eye(5, dtype=torch.bool),
}


@pytest.mark.parametrize('mask', FUSED_MASKS)
@pytest.mark.parametrize('cls', FUSED)
def test_fused_attention_is_unfolded(cls, x, mask):
    attention, mask = cls(), FUSED_MASKS[mask]()
    torch.testing.assert_close(
        extended(attention)(x, mask), attention(x, mask), rtol=1e-6, atol=1e-6
    )
    assert mask is None or not torch.allclose(attention(x, mask), attention(x))


def test_fused_attention_with_its_own_scale(x):
    attention = Fused()
    torch.testing.assert_close(
        extended(attention)(x, scale=0.9), attention(x, scale=0.9), rtol=1e-6, atol=1e-6
    )


def test_fused_attention_of_a_row_that_is_masked_entirely(x):
    attention = Fused()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    torch.testing.assert_close(
        extended(attention)(x, mask), attention(x, mask), rtol=1e-6, atol=1e-6
    )


def test_fused_attention_drops_out(x):
    attention = extended(Fused())
    torch.manual_seed(0)
    assert not torch.equal(attention(x, dropout_p=0.5), attention(x))
    assert torch.equal(attention(x, dropout_p=1.0), torch.zeros(3, 2, 5, 4))


@pytest.mark.parametrize('options', [dict(is_causal=True), dict(enable_gqa=True)])
def test_fused_attention_of_other_kinds_is_refused(x, options):
    with pytest.raises(QuantizationError, match='Fused uses causal or grouped-query'):
        extended(Fused())(x, **options)


# Calibrated.


def everything():
    """Attentions with arguments, each with two products."""
    window, windows, mask = window_attention()
    written, tokens = written_out()
    return [
        (window, windows, mask),
        (written, tokens),
        *((cls(), torch.randn(3, 5, 8)) for cls in PLAIN + FUSED),
    ]


@pytest.mark.parametrize('number', range(8))
def test_calibrated_quantizers_are_reached(number):
    torch.manual_seed(0)
    attention, x, *rest = everything()[number]
    randomized(attention)
    expected = result(extended(attention), x, *rest)
    for role in ('qk_left', 'qk_right', 'pv_left', 'pv_right'):
        changed = result(extended(attention, **{role: adalog(2, 100, 0.2)}), x, *rest)
        assert not torch.allclose(changed, expected, atol=1e-4), role


@pytest.mark.parametrize('cls', PLAIN + FUSED)
def test_operands_are_queries_keys_probabilities_and_values(cls, x):
    attention = cls()
    q, k, v = attention.split(x)
    quantizers = dict(
        qk_left=uniform([-1.0, -0.5], [1.0, 0.5], 3, -3),
        qk_right=uniform([-0.7, -1.0], [1.0, 0.3], 3, -3),
        pv_left=adalog(3, 30),
        pv_right=uniform([-1.0, -0.4], [0.5, 1.0], 3, -3),
    )
    scale = 0.5 if cls in FUSED else 1  # on the queries, before they are quantized
    scores = quantizers['qk_left'](q * scale) @ quantizers['qk_right'](
        k.transpose(-2, -1)
    )
    expected = quantizers['pv_left'](scores.softmax(-1)) @ quantizers['pv_right'](v)
    torch.testing.assert_close(
        extended(attention, **quantizers)(x), expected, rtol=1e-6, atol=1e-6
    )


def test_operator_matmul_is_routed():
    """A strict torch.export hands this function, not a method of a tensor, to a mode."""
    attention = TwoProducts()
    qk, pv = extend_attention(attention)
    equip(qk, left=uniform(-0.1, 0.1, 2)), equip(pv)
    mode, left, right = (
        RouteProducts('name', attention),
        torch.randn(1, 1, 2, 3),
        torch.randn(1, 1, 3, 2),
    )
    assert torch.equal(
        mode.__torch_function__(operator.matmul, (), (left, right)), qk(left, right)
    )
    assert not torch.equal(qk(left, right), left @ right)


@pytest.mark.parametrize('strict', [True, False])
def test_export_keeps_the_quantizers(x, strict):
    plain = TwoProducts().eval()
    attention = extended(
        plain,
        qk_left=uniform(-1, 1, 3),
        pv_left=adalog(3, 30),
        pv_right=uniform([-1.0, -1], [1.0, 1], 3, -3),
    )
    exported = torch.export.export(attention, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), attention(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(exported(x), plain(x), atol=1e-3)


def test_products_outside_of_the_attention_are_left_alone(x):
    attention = extended(TwoProducts(), qk_left=uniform(-1, 1, 2))
    attention(x)
    a, b = torch.randn(1, 1, 2, 3), torch.randn(1, 1, 3, 2)
    assert torch.equal(a @ b, torch.bmm(a[0], b[0])[None])


def test_two_attentions_keep_apart(x):
    first, second = (
        extended(TwoProducts(), pv_right=uniform(-1, 1, 2)),
        extended(TwoProducts()),
    )
    second.load_state_dict(
        {
            key: value
            for key, value in first.state_dict().items()
            if 'quantizer' not in key
        }
    )
    plain = TwoProducts()
    plain.load_state_dict(second.state_dict())
    assert torch.equal(second(x), plain(x)) and not torch.allclose(first(x), plain(x))


# Weights that are read without a call of their layer.


def reading(cls, **quantizers):
    """An attention, extended, its projection quantized."""
    attention = extended(cls())
    attention.qkv = equip(QuantLinear.from_float(attention.qkv), **quantizers)
    return attention


@pytest.mark.parametrize('cls', [ReadWeight, ReadBoth])
def test_a_layer_whose_weight_is_read_is_run(cls, x):
    attention = reading(cls)
    expected = cls.forward(attention, x)
    torch.testing.assert_close(attention(x), expected, rtol=1e-6, atol=1e-6)
    quantized = reading(cls, input=uniform(-2, 2, 3), weight=uniform(-0.3, 0.3, 3))
    quantized.load_state_dict(attention.state_dict(), strict=False)
    rounded, weight = (
        quantized.qkv.quantizer(role)(value)
        for role, value in (('input', x), ('weight', quantized.qkv.weight))
    )
    by_hand = reading(cls)
    by_hand.load_state_dict({**attention.state_dict(), 'qkv.weight': weight})
    torch.testing.assert_close(
        quantized(x), cls.forward(by_hand, rounded), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(quantized(x), expected, atol=1e-2)


@pytest.mark.parametrize('cls', [TwoProducts, ReadWeight, ReadBoth])
def test_a_layer_is_seen_once_a_call(cls, x):
    attention = reading(cls)
    expected, seen = attention(x), []
    ops = {'qkv': attention.qkv, 'qk': attention.qk}
    block = Block('attention', attention, [], ops)
    with (
        block.as_float(),
        listening(
            ops, lambda name, op, activations: seen.append((name, activations[0].shape))
        ),
    ):
        assert torch.equal(attention(x), expected)
    assert seen == [('qkv', (3, 5, 8)), ('qk', (3, 2, 5, 4))]


@pytest.mark.parametrize('strict', [True, False])
def test_export_keeps_the_quantizers_of_a_weight_that_is_read(x, strict):
    attention = reading(
        ReadWeight, input=uniform(-2, 2, 3), weight=uniform(-0.3, 0.3, 3)
    ).eval()
    exported = torch.export.export(attention, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), attention(x), rtol=1e-5, atol=1e-5)
    plain = reading(ReadWeight)
    plain.load_state_dict(attention.state_dict(), strict=False)
    assert not torch.allclose(exported(x), plain(x), atol=1e-2)


def test_a_weight_that_is_read_without_its_bias_is_refused(x):
    with pytest.raises(
        QuantizationError,
        match='ReadWeight uses the weight of a layer, but not its bias',
    ):
        reading(lambda: ReadWeight(bias=True))(x)


def test_other_uses_of_linear_in_an_attention_are_left_alone(x):
    attention = TwoProducts()
    assert torch.equal(extended(attention)(x), attention(x))


# What does not fit.


@pytest.mark.parametrize(
    ('cls', 'message'),
    [
        (OneProduct, 'OneProduct ran 1 matrix products'),
        (ThreeProducts, 'ThreeProducts multiplies more than two'),
        (NotRouted, 'NotRouted ran 0 matrix products'),
        (Flat, r'Flat multiplies tensors of shape \(6, 5, 4\)'),
    ],
)
def test_other_than_two_products_are_refused_by_name(cls, message, x):
    with pytest.raises(QuantizationError, match=message):
        extended(cls())(x)


def test_torch_is_as_before_after_a_refusal(x):
    attention = extended(ThreeProducts())
    for _ in range(2):
        with pytest.raises(QuantizationError, match='ThreeProducts'):
            attention(x)
    plain = TwoProducts()
    assert torch.equal(extended(plain)(x), plain(x))


@pytest.mark.parametrize('name', ['qk', 'pv'])
def test_a_taken_name_is_refused(name):
    with pytest.raises(
        QuantizationError, match=f"Clash already has an attribute '{name}'"
    ):
        extend_attention(Clash(name))


def test_it_is_extended_once():
    attention = TwoProducts()
    extend_attention(attention)
    with pytest.raises(QuantizationError, match="already has an attribute 'qk'"):
        extend_attention(attention)


# The class.


def test_the_class_stays_what_it_was():
    attention = window_attention()[0]
    original, names = (
        type(attention),
        [name for name, _ in attention.named_parameters()],
    )
    extend_attention(attention)
    assert (
        isinstance(attention, original)
        and type(attention) is not original
        and type(attention).__mro__[1] is original
    )
    assert [name for name, _ in attention.named_parameters()] == names
    assert {name for name, _ in attention.named_children()} >= {
        'qkv',
        'proj',
        'qk',
        'pv',
    }
    assert type(window_attention()[0]) is original  # new ones are as before


def test_deepcopy(x):
    attention = extended(TwoProducts(), qk_left=uniform(-1, 1, 3))
    twin = copy.deepcopy(attention)
    assert type(twin) is type(attention) and torch.equal(twin(x), attention(x))
    before = attention(x)
    twin.pv.right_quantizer.set(scale=torch.tensor(0.5), zero_point=torch.tensor(2))
    assert torch.equal(attention(x), before) and not torch.allclose(twin(x), before)


def test_state_dict_holds_the_quantizers_of_both_products(x):
    attention = extended(TwoProducts(), qk_left=uniform(-1, 1), pv_left=adalog(4, 30))
    new = [
        'qk.left_quantizer.scale',
        'qk.left_quantizer.zero_point',
        'pv.left_quantizer.scale',
        'pv.left_quantizer.q',
    ]
    assert sorted(attention.state_dict()) == sorted(['qkv.weight', 'qkv.bias', *new])
    other = extended(TwoProducts())
    other.pv.left_quantizer = adalog(4, 100)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))


# nn.MultiheadAttention, written out.


def multihead(batch_first, bias=True):
    torch.manual_seed(0)
    return randomized(nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first))


MASKS = {
    'none': lambda: None,
    'bool': lambda: torch.ones(5, 5).triu(1).bool(),
    'float': lambda: torch.randn(5, 5),
    'bool by head': (
        lambda: torch.rand(6, 5, 5).gt(0.7) & ~torch.eye(5, dtype=torch.bool)
    ),
    'float by head': lambda: torch.randn(6, 5, 5),
}


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('batch_first', [True, False])
def test_self_attention_is_nn_multihead_attention(batch_first, bias, mask, x):
    attention, mask = multihead(batch_first, bias), MASKS[mask]()
    x = x if batch_first else x.transpose(0, 1)
    expected = result(attention, x, attn_mask=mask)
    for ours in (
        SelfAttention.from_float(attention),
        extended(SelfAttention.from_float(attention)),
    ):
        torch.testing.assert_close(
            result(ours, x, attn_mask=mask), expected, rtol=1e-6, atol=1e-6
        )
    assert mask is None or not torch.allclose(result(attention, x), expected, atol=1e-4)


def test_self_attention_in_the_wrapper_of_mmcv(x):
    from mmcv.cnn.bricks.transformer import MultiheadAttention

    wrapper = randomized(MultiheadAttention(8, 2, batch_first=True))
    expected = wrapper(x)
    wrapper.attn = extended(SelfAttention.from_float(wrapper.attn))
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('bias', [True, False])
def test_self_attention_shares_parameters(bias):
    attention = multihead(True, bias)
    ours = SelfAttention.from_float(attention)
    assert (
        ours.in_proj.weight is attention.in_proj_weight
        and ours.out_proj.weight is attention.out_proj.weight
    )
    assert (
        ours.in_proj.bias is attention.in_proj_bias
        and ours.out_proj.bias is attention.out_proj.bias
    )
    assert ours.training == attention.training


@pytest.mark.parametrize('nested', [False, True])
def test_self_attention_loads_packed_keys_strictly(nested, x):
    attention, other = multihead(True), randomized(multihead(True), seed=7)
    ours = extended(SelfAttention.from_float(attention))
    state = (
        other.state_dict()
        if not nested
        else nn.ModuleDict({'attn': other}).state_dict()
    )
    keys = list(state)
    (nn.ModuleDict({'attn': ours}) if nested else ours).load_state_dict(
        state, strict=True
    )
    assert list(state) == keys and any(key.endswith('in_proj_weight') for key in keys)
    torch.testing.assert_close(result(ours, x), result(other, x), rtol=1e-6, atol=1e-6)


def test_self_attention_loads_its_own_keys_strictly(x):
    saved, loaded = (
        SelfAttention.from_float(randomized(multihead(True), seed)) for seed in (1, 2)
    )
    assert set(saved.state_dict()) == {
        'in_proj.weight',
        'in_proj.bias',
        'out_proj.weight',
        'out_proj.bias',
    }
    loaded.load_state_dict(saved.state_dict(), strict=True)
    assert torch.equal(result(loaded, x), result(saved, x))


def test_self_attention_misses_keys():
    state = multihead(True).state_dict()
    del state['in_proj_weight']
    with pytest.raises(RuntimeError, match=r'in_proj\.weight'):
        SelfAttention.from_float(multihead(True)).load_state_dict(state)


@pytest.mark.parametrize('change', ['key', 'value', 'key_padding_mask', 'is_causal'])
def test_other_than_self_attention_is_refused(change, x):
    ours = SelfAttention.from_float(multihead(True))
    arguments = dict(query=x, key=x, value=x)
    arguments[change] = {
        'key_padding_mask': torch.zeros(3, 5, dtype=torch.bool),
        'is_causal': True,
    }.get(change, x.clone())
    with pytest.raises(QuantizationError, match='only self-attention'):
        ours(**arguments)


@pytest.mark.parametrize(
    'options',
    [dict(kdim=6), dict(vdim=6), dict(add_bias_kv=True), dict(add_zero_attn=True)],
)
def test_unusual_multihead_attention_is_refused(options):
    with pytest.raises(
        QuantizationError, match='kdim, vdim, add_bias_kv or add_zero_attn'
    ):
        SelfAttention.from_float(nn.MultiheadAttention(8, 2, **options))


def test_self_attention_drops_out_in_training_only(x):
    ours = SelfAttention.from_float(
        nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    )
    assert not torch.equal(result(ours, x), result(ours, x))
    ours.eval()
    assert torch.equal(result(ours, x), result(ours, x))


def test_quantizers_without_parameters_have_no_keys():
    assert isinstance(extended(TwoProducts()).qk.left_quantizer, UniformQuantizer)
    assert set(extended(TwoProducts()).state_dict()) == {'qkv.weight', 'qkv.bias'}
