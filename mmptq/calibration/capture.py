"""The calls that a block really gets: a forward that is cut at the blocks and goes on from where it stopped."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import QuantizationError
from ..layers import QuantOp

Samples = list[tuple[Tensor, ...]]
"""Sampled activations of one operation; one entry a call, since shapes differ between images."""

Visitor = Callable[[str, QuantOp, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors among the arguments, bytes."""
        return sum(x.numel() * x.element_size() for x in tree_flatten((self.args, self.kwargs))[0] if isinstance(x, Tensor))


class Block:
    """A calibration unit and the calls that it gets, one an image or more.

    Args:
        name: Its name in the model, for messages.
        module: What is called: a module, or a function that runs one.
        calls: Its calls.
        ops: The operations to calibrate, by name.
        seed: Of the samples.
    """

    def __init__(self, name: str, module: Callable[..., Any], calls: list[Call], ops: dict[str, QuantOp], seed: int = 0) -> None:
        self.name = name
        self.module = module
        self.calls = calls
        self.ops = ops
        self.seed = seed
        self.samples: dict[str, Samples] = {}

    @torch.no_grad()
    def run(self) -> list[Any]:
        """The outputs of all calls, with the quantizers as they are."""
        return [self.module(*call.args, **call.kwargs) for call in self.calls]

    def observe(self, rows: int, visit: Visitor | None = None) -> list[Any]:
        """Runs all calls and keeps a bounded, seeded sample of every operation's activations in ``samples``.

        Args:
            rows: Rows to keep of each operation over all calls, about.
            visit: Is shown all activations, as ``visit(name, op, activations)``.

        Returns:
            The outputs.

        Raises:
            QuantizationError: If an activation is not finite, naming the operation, or an operation does not run.
        """
        rows_a_call = -(-rows // max(len(self.calls), 1))
        generator = torch.Generator().manual_seed(self.seed)
        self.samples = {name: [] for name in self.ops}

        def hook(name: str, op: QuantOp) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                activations = op.activations(*inputs)
                if not all(bool(torch.isfinite(x).all()) for x in activations):
                    raise QuantizationError(f'{name} receives activations that are NaN or infinite; '
                                            'check the checkpoint and the calibration images')
                if any(x.numel() == 0 for x in activations):
                    return
                sample = op.sample(activations, rows_a_call, generator)
                self.samples[name].append(tuple(x.clone() for x in sample))
                if visit:
                    with torch._C.DisableTorchFunction():  # products of its own are not those of the attention that it looks into
                        visit(name, op, activations)
            return before

        handles = [op.register_forward_pre_hook(hook(name, op)) for name, op in self.ops.items()]
        try:
            outputs = self.run()
        finally:
            for handle in handles:
                handle.remove()
        idle = [name for name, samples in self.samples.items() if not samples]
        if idle:
            raise QuantizationError(f'{", ".join(idle)} received nothing in {len(self.calls)} calibration images; use more or other '
                                    'images (--calib-images, --calib-cfg)')
        self.samples = {name: merge(samples) for name, samples in self.samples.items()}
        return outputs

    def state(self) -> dict[str, Tensor]:
        """The parameters of all its quantizers, by name."""
        return {f'{name}.{key}': value for name, op in self.ops.items() for role, quantizer in op.quantizers().items()
                for key, value in quantizer.state_dict(prefix=f'{role}_quantizer.').items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Sets the parameters that :meth:`state` returned."""
        for name, op in self.ops.items():
            for role, quantizer in op.quantizers().items():
                prefix = f'{name}.{role}_quantizer.'
                quantizer.set(**{key: state[prefix + key] for key in quantizer.param_names})


def merge(samples: Samples) -> Samples:
    """Joins the samples that differ in their first dimension only."""
    groups: dict[tuple[torch.Size, ...], Samples] = {}
    for sample in samples:
        groups.setdefault(tuple(x.shape[1:] for x in sample), []).append(sample)
    return [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups.values()]


def operations(module: nn.Module, prefix: str = '') -> dict[str, QuantOp]:
    """All quantized operations in a module, by name, with a prefix such as ``stages.0.``."""
    return {(prefix + name).rstrip('.'): op for name, op in module.named_modules() if isinstance(op, QuantOp)}


class _Reached(Exception):  # noqa: N818  (control flow, not an error)
    """The block whose calls are wanted is about to run."""


class Stream:
    """A module's forward over several inputs, cut at its blocks.

    :meth:`calls` runs what lies between the last block and the next one and returns the next one's calls;
    :meth:`advance` takes that block's outputs. Blocks already passed are not computed again: the last one answers with
    its outputs, those before it with NaN of the right shape that takes no memory. Only one block's calls and outputs are
    kept, and a block that needs more than the last one's outputs is found out.

    Args:
        module: The module whose forward is cut (a backbone).
        names: Its blocks, in forward order; each must be called once for an input.
        inputs: Calls of the module.

    Raises:
        QuantizationError: If a block does not run, runs twice, runs out of order, or needs what an earlier one gave.
    """

    def __init__(self, module: nn.Module, names: list[str], inputs: list[Call]) -> None:
        self.module = module
        self.names = names
        self.inputs = inputs
        self.position = 0
        self.outputs: list[Any] = []
        self.shapes: list[list[Any]] = [[] for _ in inputs]

    @torch.no_grad()
    def calls(self) -> list[Call]:
        """The calls that the next block gets, one an input."""
        if self.position == 0:
            self._check_order()
        name = self.names[self.position]
        calls = []
        for index, call in enumerate(self.inputs):
            with self._replay(index) as reached:
                try:
                    self.module(*call.args, **call.kwargs)
                except _Reached:
                    pass
            if not reached:
                raise self._misfit(f'block {name} did not run after the blocks before it')
            if self.position and _has_nan((reached[0].args, reached[0].kwargs)):
                before = self.names[self.position - 1]
                if _has_nan(self.outputs[index]):
                    raise QuantizationError(f'block {before} gives outputs that are NaN; check the checkpoint and the '
                                            'calibration images')
                raise self._misfit(f'block {name} needs more than the outputs of block {before}')
            calls.append(reached[0])
        return calls

    def _misfit(self, reason: str) -> QuantizationError:
        return QuantizationError(f'{type(self.module).__name__}: {reason}; the blocks of its BackboneSpec do not fit its forward')

    def _check_order(self) -> None:
        ran: list[str] = []
        handles = [self.module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name in self.names]
        try:
            for call in self.inputs[:1]:
                self.module(*call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name in self.names:
            if self.inputs and ran.count(name) != 1:
                raise self._misfit(f'block {name} did not run once, but {ran.count(name)} times')
        if self.inputs and ran != self.names:
            raise self._misfit(f'block {next(a for a, b in zip(ran, self.names, strict=True) if a != b)} ran out of order')

    def advance(self, outputs: list[Any]) -> None:
        """Goes on to the next block; ``outputs`` are those of the present one for the calls that it got."""
        if self.position:
            for shapes, output in zip(self.shapes, self.outputs, strict=True):
                shapes.append(tree_map(_hollow, output))
        self.outputs = outputs
        self.position += 1

    @contextmanager
    def _replay(self, index: int) -> Iterator[list[Call]]:
        blocks = [self.module.get_submodule(name) for name in self.names[:self.position + 1]]
        answers = [*self.shapes[index], *self.outputs[index:index + 1]]
        ran = [0] * len(answers)
        reached: list[Call] = []

        def answer(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                ran[number] += 1
                return answers[number]
            return forward

        def reach(*args: Any, **kwargs: Any) -> Any:
            if all(count == 1 for count in ran):
                reached.append(Call(args, kwargs))
            raise _Reached

        forwards = [answer(number) for number in range(len(answers))] + [reach]
        own = [block.__dict__.get('forward') for block in blocks]
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward  # type: ignore[method-assign]
        try:
            yield reached
        finally:
            for block, before in zip(blocks, own, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before  # type: ignore[method-assign]


def _hollow(x: Any) -> Any:
    """NaN of the shape, dtype and device of a tensor, without memory of its own; other things as they are."""
    if not isinstance(x, Tensor):
        return x
    return x.new_full((), float('nan') if x.is_floating_point() else 0).expand(x.shape)


def _has_nan(tree: Any) -> bool:
    return any(bool(torch.isnan(x).any()) for x in tree_flatten(tree)[0] if isinstance(x, Tensor))
