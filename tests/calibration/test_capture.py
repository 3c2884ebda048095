"""Streams of calls and blocks, on real backbones and on modules that misbehave."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from mmptq import QuantizationError
from mmptq.backbones import find_spec
from mmptq.calibration import Block, Call, Stream, calibrate_block, operations
from mmptq.calibration.capture import merge
from mmptq.layers import (
    GeluShift,
    QuantConv2d,
    QuantLinear,
    QuantMatMul,
    Rescale,
    extend_attention,
)
from mmptq.methods import AdaLog, AdaLogBRECQ, MinMax, UQViT

from ..conftest import FAST, SWIN, TwoProducts, equip, image, quantizable

SIZES = [(45, 57), (64, 64), (33, 90)]


def calls_of(*sizes):
    return [Call((image(*size, seed=number),)) for number, size in enumerate(sizes)]


def same(a, b):
    """Whether two calls, outputs or trees of tensors are equal to the last bit."""
    (left, form), (right, other) = (
        tree_flatten((x.args, x.kwargs) if isinstance(x, Call) else x) for x in (a, b)
    )
    return form == other and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


@torch.no_grad()
def ordinary(module, names, inputs, change=None):
    """The calls of each block in ordinary forwards, by block; ``change`` may alter the
    outputs of blocks.
    """
    seen = {name: [] for name in names}
    handles = []
    for name in names:
        block = module.get_submodule(name)
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen[name].append(
                    Call(args, kwargs)
                ),
                with_kwargs=True,
            )
        )
        if change:
            handles.append(
                block.register_forward_hook(lambda _, args, out: change(out))
            )
    for call in inputs:
        module(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    return seen


def streamed(module, names, inputs, change=lambda out: out):
    """The same by a Stream."""
    stream, seen = Stream(module, names, inputs), {}
    for name in names:
        seen[name], unit = stream.calls(), module.get_submodule(name)
        stream.advance(
            [
                change(output)
                for output in Block(
                    name, unit, seen[name], operations(unit, f'{name}.')
                ).observe(4)
            ]
        )
    return seen


def doubled(output):
    return tree_map(lambda x: 2 * x if isinstance(x, torch.Tensor) else x, output)


@pytest.mark.parametrize(
    'change', [None, doubled], ids=['as they are', 'doubled outputs']
)
def test_blocks_get_the_calls_of_an_ordinary_forward(backbone, change):
    names = find_spec(backbone).block_names(backbone)
    inputs = calls_of(*SIZES)
    expected = ordinary(backbone, names, inputs, change)
    found = streamed(backbone, names, inputs, change or (lambda out: out))
    for name in names:
        assert len(expected[name]) == len(SIZES)
        assert all(
            same(*pair) for pair in zip(found[name], expected[name], strict=True)
        ), name
    shapes = {tuple(call.args[0].shape) for call in found[names[-1]]}
    assert len(shapes) == len(SIZES)


def test_swin_blocks_get_their_map_size():
    backbone = quantizable('mmdet', SWIN)
    found = streamed(
        backbone, find_spec(backbone).block_names(backbone), calls_of((45, 57))
    )
    assert {
        name: calls[0].args[1:] + tuple(calls[0].kwargs.values())
        for name, calls in found.items()
    } == {
        'patch_embed': (),
        'stages.0.blocks.0': ((12, 15),),
        'stages.0.blocks.1': ((12, 15),),
        'stages.0.downsample': ((12, 15),),
        'stages.1.blocks.0': ((6, 8),),
    }


def test_modified_outputs_reach_the_next_block(backbone):
    names = find_spec(backbone).block_names(backbone)
    plain, changed = (
        streamed(backbone, names, calls_of((45, 57)), change)
        for change in (lambda out: out, doubled)
    )
    for number, name in enumerate(names):
        assert same(plain[name][0], changed[name][0]) == (number == 0)


# Memory.


def storage(x):
    return x.untyped_storage().nbytes()


def test_only_one_block_is_kept(backbone):
    names = find_spec(backbone).block_names(backbone)
    inputs = calls_of((64, 80))
    stream = Stream(backbone, names, inputs)
    del inputs
    dead = []
    for name in names:
        calls = stream.calls()
        outputs = Block(name, backbone.get_submodule(name), calls, {}).run()
        stream.advance(outputs)
        dead.append(
            [
                weakref.ref(x)
                for x in tree_flatten(outputs)[0]
                if isinstance(x, torch.Tensor)
            ]
        )
        del calls, outputs
    assert all(
        reference() is None for references in dead[:-1] for reference in references
    )
    assert all(reference() is not None for reference in dead[-1])
    hollow = [x for x in tree_flatten(stream.shapes)[0] if isinstance(x, torch.Tensor)]
    assert len(hollow) >= len(names) - 1 and all(
        storage(x) <= 8 < x.numel() for x in hollow
    )


def test_call_sizes():
    call = Call(
        (torch.zeros(3, 4), [torch.zeros(2, dtype=torch.float64)], (7, 8)),
        {'mask': torch.zeros(5, dtype=torch.bool), 'name': 'a'},
    )
    assert call.nbytes == 48 + 16 + 5


# Modules that misbehave.


class Script(nn.Module):
    """Runs its blocks in a given order, each on the output of the one before."""

    def __init__(self, order, names='ab'):
        super().__init__()
        self.order = order
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


def run_through(module, names, inputs=None):
    return streamed(module, list(names), inputs or [Call((torch.randn(2, 4),))])


def untouched(module):
    return not any('forward' in vars(child) for child in module.modules())


@pytest.mark.parametrize(
    ('order', 'names'),
    [
        ('b', 'ab'),
        ('a', 'ab'),
        ('ac', 'abc'),  # one never runs
        ('ba', 'ab'),
        ('acb', 'abc'),  # out of order
        ('aab', 'ab'),
        ('abbc', 'abc'),
        ('abac', 'abc'),  # one runs twice
        ('abb', 'ab'),
        ('aba', 'ab'),
        ('aa', 'a'),  # the same, after or at the last block
    ],
)
def test_blocks_that_do_not_run_once_in_order_are_refused(order, names):
    module = Script(order, names)
    with pytest.raises(QuantizationError, match='Script: block'):
        run_through(module, names)
    assert untouched(module)


def test_the_block_that_did_not_run_is_named():
    with pytest.raises(QuantizationError, match='block c did not run'):
        run_through(Script('ab', 'abc'), 'abc')


class InPlace(Script):
    """Adds to the input or the output of block b in place."""

    def __init__(self, inside):
        super().__init__('abc', 'abc')
        self.inside = inside
        self.b.register_forward_hook(
            lambda _, args, output: args[0].add_(output) if inside else None
        )

    def forward(self, x):
        x = self.b(self.a(x))
        if not self.inside:
            x += 1
        return self.c(x).add_(1)  # nothing needs the last output again


@pytest.mark.parametrize(('inside', 'what'), [(True, 'input'), (False, 'output')])
@torch.no_grad()
def test_changes_in_place_that_calibration_would_not_survive_are_refused(inside, what):
    """A block runs several times on its calls, and its outputs are needed as they were."""
    with pytest.raises(
        QuantizationError,
        match=rf'^the {what} of block b is changed in place.*write x = x \+ y',
    ):
        run_through(InPlace(inside), 'abc')


def test_blocks_that_run_for_some_inputs_only_are_refused():
    class Fickle(Script):
        def forward(self, x):
            return super().forward(x) if len(x) > 1 else x

    with pytest.raises(QuantizationError, match='Fickle: block a did not run'):
        run_through(
            Fickle('ab'), 'ab', [Call((torch.randn(2, 4),)), Call((torch.randn(1, 4),))]
        )


def test_forwards_are_restored():
    module = Script('ab')
    x = torch.randn(2, 4)
    expected = module(x)
    run_through(module, 'ab')
    assert untouched(module) and torch.equal(module(x), expected)


def test_forwards_are_restored_after_errors():
    module = Script('ab')
    module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_through(module, 'ab')
    assert untouched(module)


def test_a_forward_of_the_instance_is_restored():
    module = Script('ab')
    module.a.forward = lambda x: x + 1
    found = run_through(module, 'ab', [Call((torch.zeros(2, 4),))])
    assert (found['b'][0].args[0] == 1).all() and torch.equal(
        module.a(torch.zeros(1)), torch.ones(1)
    )


def test_keyword_arguments_are_kept():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Bilinear(4, 4, 3)

        def forward(self, *, x):
            return self.b(input1=self.a(x), input2=x)

    x = torch.randn(2, 4)
    found = run_through(Keywords(), 'ab', [Call((), {'x': x})])
    assert same(found['a'][0], Call((x,))) and set(found['b'][0].kwargs) == {
        'input1',
        'input2',
    }
    assert torch.equal(found['b'][0].kwargs['input1'], x)


def test_masks_of_minus_infinity_are_passed_on():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Bilinear(4, 4, 3)

        def forward(self, x):
            return self.b(self.a(x), torch.full_like(x, -torch.inf).tril(-1))

    inputs = [Call((torch.randn(2, 4),))]
    assert same(
        run_through(Masked(), 'ab', inputs)['b'][0],
        ordinary(Masked(), 'ab', inputs)['b'][0],
    )


class Skip(Script):
    """The last block needs what the first one gave."""

    def __init__(self):
        super().__init__('', '')
        self.a, self.b, self.c = (
            equip(QuantLinear.from_float(nn.Linear(4, 4))) for _ in range(3)
        )

    def forward(self, x):
        first = self.a(x)
        return self.c(self.b(first) + first)


def test_what_comes_from_an_earlier_block_is_right_or_refused():
    module, inputs = Skip(), [Call((torch.randn(2, 4),))]
    expected = ordinary(module, 'abc', inputs)
    try:
        found = run_through(module, 'abc', inputs)
    except QuantizationError:
        return
    assert same(found['c'][0], expected['c'][0])


# Blocks.


def two_layers(calls=3, rows=50):
    """A block of two quantizable layers, and its calls."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *(equip(QuantLinear.from_float(nn.Linear(4, 4))) for _ in range(2))
    )
    return Block(
        'stage',
        module,
        [Call((torch.randn(rows, 4),)) for _ in range(calls)],
        operations(module, 'stage.'),
        seed=5,
    )


def count(samples):
    return sum(len(sample[0]) for sample in samples)


def test_operations_are_named():
    block = two_layers()
    assert list(block.ops) == ['stage.0', 'stage.1']
    assert list(operations(block.module)) == ['0', '1']
    assert list(operations(block.module[0], 'patch_embed.')) == ['patch_embed']


@pytest.mark.parametrize('rows', [1, 10, 100, 1000])
def test_samples_are_bounded(rows):
    block = two_layers()
    block.observe(rows)
    for samples in block.samples.values():
        assert min(rows, 150) <= count(samples) <= min(rows + 2, 150)


def test_samples_are_what_the_operations_get():
    block = two_layers()
    outputs = block.observe(10**6)
    assert all(
        torch.equal(output, block.module(*call.args))
        for output, call in zip(outputs, block.calls, strict=True)
    )
    first, second = (
        torch.cat([sample[0] for sample in block.samples[name]])
        for name in ('stage.0', 'stage.1')
    )
    assert torch.equal(first, torch.cat([call.args[0] for call in block.calls]))
    assert torch.equal(second, block.module[0](first))
    assert not second.requires_grad


def test_samples_are_seeded():
    blocks = [two_layers() for _ in range(3)]
    blocks[2].seed = 6
    for block in blocks:
        block.observe(9)
    first, again, other = (block.samples['stage.1'][0][0] for block in blocks)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_samples_do_not_hold_on_to_the_activations():
    block = two_layers(rows=5000)
    block.observe(9)
    assert all(
        storage(x) <= 16 * 9 for sample in block.samples['stage.0'] for x in sample
    )


def test_visitors_see_all_activations():
    block, seen = two_layers(), []
    block.observe(
        1, lambda name, op, activations: seen.append((name, op, activations[0].shape))
    )
    assert [name for name, *_ in seen] == ['stage.0', 'stage.1'] * 3
    assert all(op is block.ops[name] and shape == (50, 4) for name, op, shape in seen)


def test_visitors_may_multiply_within_an_attention():
    attention = TwoProducts()
    attention.qkv = equip(QuantLinear.from_float(attention.qkv))
    for op in extend_attention(attention):
        equip(op)
    sums = {}

    def gram(name, op, activations):
        if op.kind == 'linear':
            x = activations[0].flatten(0, -2)
            sums[name] = x.T @ x

    x = torch.randn(3, 5, 8)
    outputs = Block('block', attention, [Call((x,))], operations(attention)).observe(
        10, gram
    )
    assert torch.equal(outputs[0], attention(x))
    torch.testing.assert_close(sums['qkv'], torch.einsum('bti,btj->ij', x, x))


def moved(block):
    """The block with calls of the float model that differ from those it gets."""
    return Block(
        block.name,
        block.module,
        block.calls,
        block.ops,
        block.seed,
        [Call((call.args[0] + 1,)) for call in block.calls],
    )


def test_samples_are_of_the_calls_and_outputs_of_the_float_model():
    block = moved(two_layers())
    outputs = block.observe(10**6)
    assert all(
        torch.equal(output, block.module(call.args[0] + 1))
        for output, call in zip(outputs, block.calls, strict=True)
    )
    assert torch.equal(
        block.samples['stage.0'][0][0],
        torch.cat([call.args[0] for call in block.calls]),
    )


def test_sums_are_of_what_operations_get():
    """In float; or, where the calls are those of a quantized model, behind the block's
    quantized operations.
    """
    for block in (two_layers(), moved(two_layers())):
        for op in block.ops.values():
            op.input_quantizer.set(
                scale=torch.tensor(0.3), zero_point=torch.tensor(8, dtype=torch.int32)
            )
            op.weight_quantizer.set(
                scale=torch.tensor(0.1), zero_point=torch.tensor(8, dtype=torch.int32)
            )
        x = torch.cat([call.args[0] for call in block.calls])
        first, _ = block.module
        seen = {
            'stage.0': x,
            'stage.1': (
                first.float_forward(x) if block.float_calls is block.calls else first(x)
            ),
        }
        for name, gram in block.grams().items():
            rounded = block.ops[name].input_quantizer(seen[name])
            part = gram.objective(torch.eye(4)[None], 1)
            torch.testing.assert_close(
                part.root[0, 0], rounded.T @ rounded, rtol=1e-5, atol=1e-4
            )
            torch.testing.assert_close(
                part.linear()[0, 0].mT,
                rounded.T @ (rounded - seen[name]),
                rtol=1e-4,
                atol=1e-4,
            )
        assert not torch.allclose(first.float_forward(x), first(x), atol=0.05)


def test_samples_say_how_many_rows_they_stand_for():
    block = two_layers()
    block.observe(30)
    for name in ('stage.0', 'stage.1'):
        ((sample,),) = block.samples[name]
        weights = block.counts[name]
        assert (
            weights.shape == (len(sample),)
            and (weights > 0).all()
            and 90 < weights.sum() < 210
        )  # of 150 rows
    block.observe(10**6)
    assert all(
        (weights == 1).all() and len(weights) == 150
        for weights in block.counts.values()
    )


def test_samples_of_a_convolution_say_how_many_rows_they_stand_for():
    op = equip(QuantConv2d.from_float(nn.Conv2d(3, 5, 3, padding=1, groups=1)))
    block = Block(
        'conv', op, [Call((image(12, 10),)), Call((image(9, 14, 1),))], {'conv': op}
    )
    block.observe(60)
    assert block.samples['conv'][0][0].shape == (60, 3, 3, 3) and block.counts[
        'conv'
    ].shape == (60,)
    assert 120 < block.counts['conv'].sum() < 370  # of 246 rows
    block.observe(10**6)
    assert torch.equal(block.counts['conv'], torch.ones(246))


def test_what_is_calibrated_does_not_change_samples_and_float_outputs():
    block, calibrated = two_layers(), two_layers()
    for op in calibrated.ops.values():
        for quantizer in op.quantizers().values():
            quantizer.set(
                scale=torch.tensor(0.7), zero_point=torch.tensor(3, dtype=torch.int32)
            )
    assert all(
        torch.equal(*pair)
        for pair in zip(block.observe(20), calibrated.observe(20), strict=True)
    )
    assert all(
        torch.equal(a[0], b[0])
        for name in block.samples
        for a, b in zip(block.samples[name], calibrated.samples[name], strict=True)
    )
    assert all(
        torch.equal(*pair)
        for pair in zip(block.run(), calibrated.run_float(), strict=True)
    )
    assert not torch.allclose(calibrated.run()[0], calibrated.run_float()[0])
    assert all('forward' not in vars(op) for op in calibrated.ops.values())


def test_float_outputs_are_those_of_the_float_calls():
    block = moved(two_layers())
    assert all(
        torch.equal(output, block.module(call.args[0] + 1))
        for output, call in zip(block.run_float(), block.calls, strict=True)
    )


def test_operations_compute_as_before_after_an_error_in_float():
    block = two_layers()
    block.calls.append(Call((torch.randn(2, 5),)))
    for run in (lambda: block.observe(10), block.run_float, block.grams):
        with pytest.raises(RuntimeError):
            run()
        assert all(
            'forward' not in vars(op) and not op._forward_pre_hooks
            for op in block.ops.values()
        )


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_activations_that_are_not_finite_name_their_operation(bad):
    block = two_layers()
    with torch.no_grad():
        block.module[0].bias[2] = bad
    with pytest.raises(
        QuantizationError,
        match=r'stage\.1 receives activations that are NaN or infinite',
    ):
        block.observe(10)
    assert not any(layer._forward_pre_hooks for layer in block.module)


def test_operations_that_do_not_run_are_named():
    block = two_layers()
    block.ops['stage.idle'] = equip(QuantLinear.from_float(nn.Linear(4, 4)))
    with pytest.raises(
        QuantizationError, match=r'stage\.idle received nothing in 3 calibration images'
    ):
        block.observe(10)


@pytest.mark.parametrize(
    'method',
    [MinMax(), AdaLog(**FAST), AdaLogBRECQ(**FAST, iterations=4), UQViT(rows=64)],
    ids=lambda method: type(method).__name__,
)
def test_operations_that_need_not_run_are_left_out_by_every_method(method):
    block = two_layers()
    block.some_idle, block.ops['stage.idle'] = (
        True,
        equip(QuantLinear.from_float(nn.Linear(4, 4))),
    )
    idle = block.ops['stage.idle']
    result, outputs = calibrate_block(block, method)
    assert len(outputs) == 3 and list(block.ops) == list(result.sqnr_db) == list(
        block.samples
    ) == ['stage.0', 'stage.1']
    assert all(
        quantizer.params
        for op in block.ops.values()
        for quantizer in op.quantizers().values()
    )
    assert not any(quantizer.params for quantizer in idle.quantizers().values())
    resumed = two_layers()
    resumed.some_idle, resumed.ops['stage.idle'] = True, idle
    calibrate_block(resumed, method, result)
    assert list(resumed.ops) == ['stage.0', 'stage.1']
    assert all(
        torch.equal(value, result.params[name])
        for name, value in resumed.state().items()
    )


def test_empty_activations_are_passed_over():
    block = two_layers(calls=2)
    block.calls.insert(1, Call((torch.zeros(0, 4),)))
    assert [len(output) for output in block.observe(10**6)] == [50, 0, 50]
    assert count(block.samples['stage.0']) == 100


def test_samples_of_like_shapes_are_joined():
    a, b, c = (
        (torch.randn(rows, 2, size, 3), torch.randn(rows, 2, 3, size))
        for rows, size in ((1, 4), (2, 5), (3, 4))
    )
    merged = merge([a, b, c])
    assert [tuple(x.shape for x in sample) for sample in merged] == [
        ((4, 2, 4, 3), (4, 2, 3, 4)),
        ((2, 2, 5, 3), (2, 2, 3, 5)),
    ]
    assert torch.equal(merged[0][0], torch.cat([a[0], c[0]])) and torch.equal(
        merged[0][1], torch.cat([a[1], c[1]])
    )


def test_state_is_loaded_again():
    blocks = [two_layers() for _ in range(2)]
    for block in blocks:
        block.module[0].rescale, block.module[1].rescale = Rescale(), GeluShift()
    blocks[0].module[0].rescale.set(scale=torch.rand(4) + 0.5, shift=torch.randn(4))
    blocks[0].module[1].rescale.set(shift=torch.tensor(0.17))
    for op in blocks[0].ops.values():
        for quantizer in op.quantizers().values():
            quantizer.set(
                scale=torch.rand(()) + 0.1,
                zero_point=torch.randint(0, 15, (), dtype=torch.int32),
            )
    state = blocks[0].state()
    assert len(state) == 11 and {
        'stage.1.weight_quantizer.zero_point',
        'stage.0.rescale.scale',
        'stage.1.rescale.shift',
    } <= set(state)
    blocks[1].load(state)
    x = torch.randn(6, 4)
    assert torch.equal(blocks[1].module(x), blocks[0].module(x))
    assert two_layers().state() == {}


def calibrated_params(block):
    """Parameters for all quantizers of a block."""
    values = dict(
        scale=torch.tensor(1.0), zero_point=torch.tensor(1, dtype=torch.int32)
    )
    return {
        f'{name}.{role}_quantizer.{key}': value
        for name in block.ops
        for role in ('input', 'weight')
        for key, value in values.items()
    }


def test_changed_weights_are_part_of_the_state_and_are_taken_back():
    block, other = two_layers(), two_layers()
    before, parameter = block.module[0].weight.clone(), block.module[0].weight
    block.set_weight('stage.0', before + 1)
    block.set_weight('stage.0', before + 2)
    assert block.module[0].weight is parameter and torch.equal(parameter, before + 2)
    assert torch.equal(block.float_parameters['stage.0.weight'], before) and list(
        block.float_parameters
    ) == ['stage.0.weight']
    state = block.state()
    assert set(state) == {'stage.0.weight'} and torch.equal(
        state['stage.0.weight'], before + 2
    )
    other.load({**state, **calibrated_params(block)})
    assert torch.equal(other.module[0].weight, before + 2)
    for one in (block, other):
        one.restore_parameters()
        assert torch.equal(one.module[0].weight, before) and one.float_parameters == {}


def test_products_are_sampled_with_both_operands():
    op = equip(QuantMatMul())
    block = Block(
        'pv',
        op,
        [Call((torch.rand(6, 2, 5, 5), torch.randn(6, 2, 5, 4)))] * 2,
        operations(op, 'pv.'),
    )
    block.observe(20)
    left, right = block.samples['pv'][0]
    assert (
        left.shape == (4, 2, 5, 5)
        and right.shape == (4, 2, 5, 4)
        and 'pv' not in block.counts
    )


def test_sums_pass_over_empty_activations():
    block, whole = two_layers(calls=2), two_layers(calls=2)
    block.calls.insert(1, Call((torch.zeros(0, 4),)))
    for name, gram in block.grams().items():
        parts = [
            one.objective(torch.eye(4)[None], 1) for one in (gram, whole.grams()[name])
        ]
        assert torch.equal(parts[0].root, parts[1].root) and torch.equal(
            parts[0].linear(), parts[1].linear()
        )


def test_a_block_as_float_is_float_whatever_was_changed():
    """Weights, biases and quantizers; afterwards all is as it was, also after an error."""
    block = two_layers()
    expected = block.run()
    for name, op in block.ops.items():
        block.set_weight(name, 2 * op.weight.detach())
        block.set_bias(name, op.bias.detach() - 1)
        for quantizer in op.quantizers().values():
            quantizer.set(
                scale=torch.tensor(0.7), zero_point=torch.tensor(3, dtype=torch.int32)
            )
    changed, state = block.run(), block.state()
    with block.as_float():
        assert all(
            torch.equal(*pair) for pair in zip(block.run(), expected, strict=True)
        )
    with pytest.raises(ZeroDivisionError), block.as_float():
        raise ZeroDivisionError
    assert all(torch.equal(*pair) for pair in zip(block.run(), changed, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in block.state().items())
    assert all(
        torch.equal(*pair) for pair in zip(block.run_float(), expected, strict=True)
    )
    _, second = block.module
    with block.as_float(['stage.0']), torch.no_grad():
        x = block.calls[0].args[0]
        assert torch.equal(
            block.module(x),
            second(
                nn.functional.linear(
                    x,
                    block.float_parameters['stage.0.weight'],
                    block.float_parameters['stage.0.bias'],
                )
            ),
        )


def test_changed_biases_are_part_of_the_state_and_are_taken_back():
    block, other = two_layers(), two_layers()
    before = block.module[1].bias.detach().clone()
    block.set_bias('stage.1', before + 1)
    assert set(block.state()) == {'stage.1.bias'} and torch.equal(
        block.module[1].bias, before + 1
    )
    parameters = calibrated_params(block)
    with pytest.raises(QuantizationError, match=r'stage\.1\.bias is of shape \(3,\)'):
        other.load({**parameters, 'stage.1.bias': torch.zeros(3)})
    assert torch.equal(other.module[1].bias, before)
    other.load({**parameters, **block.state()})
    assert torch.equal(other.module[1].bias, before + 1)
    other.restore_parameters()
    assert torch.equal(other.module[1].bias, before)


def test_a_weight_that_two_operations_share_is_restored():
    block = two_layers()
    block.module[1].weight = block.module[0].weight
    before = block.module[0].weight.detach().clone()
    for number, name in enumerate(block.ops):
        block.set_weight(name, before + number + 1)
    with block.as_float():
        assert torch.equal(block.module[0].weight, before)
    assert torch.equal(block.module[0].weight, before + 2)
    block.restore_parameters()
    assert torch.equal(block.module[0].weight, before)
