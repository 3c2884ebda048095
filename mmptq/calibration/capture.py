"""The calls that a block really gets: a forward that is cut at the blocks and goes on
from where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..errors import QuantizationError
from ..layers import QuantOp
from ..layers.standins import StandIn, in_place_of_forward, standing_in
from ..quantizers import Calibrated
from .channels import Channels
from .objective import Gram

Samples = list[tuple[Tensor, ...]]
"""Sampled activations of one operation; one entry a call, since shapes differ between
images.
"""

LARGEST = 1e15
"""The norm of an activation must be less, or sums of its squares would overflow."""

Visitor = Callable[[str, QuantOp, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors among the arguments, bytes."""
        return sum(
            x.numel() * x.element_size()
            for x in tree_flatten((self.args, self.kwargs))[0]
            if isinstance(x, Tensor)
        )


class Block:
    """A calibration unit and the calls that it gets, one an image or more.

    Args:
        name: Its name in the model, for messages.
        module: What is called: a module, or a function that runs one.
        calls: Its calls.
        ops: The operations to calibrate, by name.
        seed: Of the samples.
        float_calls: Its calls in the float model, if they differ.
        some_idle: Whether operations may receive nothing; they are then no longer among
            its ``ops``. Else that is an error.

    Attributes:
        samples: A sample of each operation's activations.
        counts: How many rows each sampled row of an operation stands for, (rows,),
            where that differs.
        float_parameters: The float model's value of each weight and bias that is
            another one now, by name (``fc.weight``).
        targets: The outputs of the float block, one a call.
        order: The names of its operations, as they first ran.
        channels: Values of each channel of inputs that are rescaled by channels, by
            operation, where a stage needs them.
        extremes: Minima and maxima by operation and role, (groups,) each, where a stage
            needs them.
    """

    def __init__(
        self,
        name: str,
        module: Callable[..., Any],
        calls: list[Call],
        ops: dict[str, QuantOp],
        seed: int = 0,
        float_calls: list[Call] | None = None,
        some_idle: bool = False,
    ) -> None:
        self.name = name
        self.module = module
        self.calls = calls
        self.ops = ops
        self.seed = seed
        self.float_calls = calls if float_calls is None else float_calls
        self.some_idle = some_idle
        self.samples: dict[str, Samples] = {}
        self.counts: dict[str, Tensor] = {}
        self.float_parameters: dict[str, Tensor] = {}
        self.targets: list[Any] = []
        self.order: list[str] = []
        self.channels: dict[str, Channels] = {}
        self.extremes: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def call(self, call: Call) -> Any:
        """The output of one call, with the quantizers as they are."""
        return self.module(*call.args, **call.kwargs)

    @torch.no_grad()
    def run(self) -> list[Any]:
        """The outputs of all calls, with the quantizers as they are."""
        return [self.call(call) for call in self.calls]

    @torch.no_grad()
    def run_float(self) -> list[Any]:
        """The outputs of all calls in the float model."""
        with self.as_float():
            return [self.call(call) for call in self.float_calls]

    @contextmanager
    def as_float(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Inside, operations (by default all) compute what the float model does,
        whatever was changed since.
        """
        ops = self.ops if names is None else {name: self.ops[name] for name in names}
        stand_ins = [in_place_of_forward(op, op.float_forward) for op in ops.values()]
        for key, value in self.float_parameters.items():
            name, _, kind = key.rpartition('.')
            if name in ops:
                stand_ins.append(StandIn(ops[name], kind, value))
        with standing_in(stand_ins):
            yield

    @torch.no_grad()
    def observe(self, rows: int, visit: Visitor | None = None) -> list[Any]:
        """Runs all calls in float and keeps a bounded, seeded sample of every
        operation's activations; sets dynamic quantizers.

        Args:
            rows: Rows to keep of each operation over all calls, about.
            visit: Is shown all activations, as ``visit(name, op, activations)``.

        Returns:
            The outputs of the float model.

        Raises:
            QuantizationError: If an activation or output is not finite, naming the
                operation, or an operation does not run that has to.
        """
        generator = torch.Generator().manual_seed(self.seed)
        rows_a_call = -(-rows // max(len(self.calls), 1))
        samples: dict[str, Samples] = {name: [] for name in self.ops}
        counts: dict[str, list[Tensor]] = {name: [] for name in self.ops}

        def keep(name: str, op: QuantOp, activations: tuple[Tensor, ...]) -> None:
            if not all(
                float(torch.linalg.vector_norm(x)) < LARGEST for x in activations
            ):
                kind = (
                    'too large to be squared'
                    if all(bool(torch.isfinite(x).all()) for x in activations)
                    else 'NaN or infinite'
                )
                raise QuantizationError(
                    f'{name} receives activations that are {kind}; check the checkpoint'
                    ' and the calibration images'
                )
            places = op.places(activations, rows_a_call, generator)
            samples[name].append(tuple(x.clone() for x in op.take(activations, places)))
            if places.counts is not None:
                counts[name].append(places.counts)
            if visit:
                visit(name, op, activations)

        with self.as_float(), listening(self.ops, keep):
            outputs = self.run()
        idle = [name for name, found in samples.items() if not found]
        if idle and not self.some_idle:
            raise QuantizationError(
                f'{", ".join(idle)} received nothing in {len(self.calls)} calibration'
                ' images; use more or other images (--calib-images, --calib-cfg)'
            )
        self.ops = {name: op for name, op in self.ops.items() if samples[name]}
        self.samples = {name: merge(samples[name]) for name in self.ops}
        self.counts = {
            name: torch.cat(found) for name, found in counts.items() if found
        }
        for name, op in self.ops.items():
            if not all(
                bool(torch.isfinite(op.compute(*op.operands(*sample)).square().sum()))
                for sample in self.samples[name]
            ):
                raise QuantizationError(
                    f'{name} gives outputs too large to be squared; check the'
                    ' checkpoint'
                )
        for name, op in self.ops.items():
            for index, quantizer in enumerate(op.quantizers().values()):
                if quantizer.dynamic:
                    quantizer.set(
                        **quantizer.observed(
                            [
                                op.operands(*sample)[index]
                                for sample in self.samples[name]
                            ]
                        )
                    )
        return outputs if self.float_calls is self.calls else self.run_float()

    @torch.no_grad()
    def grams(self) -> dict[str, Gram]:
        """Sums over all tokens of all calls, for every operation with a weight that can
        stream them, given its input's quantizer.

        Where the calls are those of a quantized model, so are the operations before it
        in the block; else all are float.
        """
        ops = {name: op for name, op in self.ops.items() if op.streams}
        sums = {name: Gram() for name in ops}

        def add(name: str, op: QuantOp, activations: tuple[Tensor, ...]) -> None:
            x, weight = op.operands(*op.take(activations))
            rounded, plain = (
                op.factors(one, weight)[0][0] for one in (op.quantizer('input')(x), x)
            )
            offset = op.offset()
            sums[name].add(
                rounded if offset is None else rounded + offset, rounded - plain
            )

        with (
            self.as_float(self.ops if self.float_calls is self.calls else ()),
            listening(ops, add),
        ):
            for call in self.calls:  # outputs are not kept
                self.call(call)
        return sums

    def state(self) -> dict[str, Tensor]:
        """All parameters that calibration gave its operations, and weights and biases
        that it changed, by name.
        """
        params = {
            f'{name}.{key}.{param}': value
            for name, op in self.ops.items()
            for key, module in op.named_modules()
            if isinstance(module, Calibrated)
            for param, value in (module.params or {}).items()
        }
        return params | {
            key: self._parameter(key).detach() for key in self.float_parameters
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Sets the parameters, weights and biases that :meth:`state` returned, by way
        of a file.

        Raises:
            QuantizationError: If one is missing, too many or does not fit, naming it;
                before anything is set.
        """
        parts = {
            f'{name}.{key}.{param}': (module, param)
            for name, op in self.ops.items()
            for key, module in op.named_modules()
            if isinstance(module, Calibrated)
            for param in module.param_names
        }
        own = {
            f'{name}.{kind}': parameter
            for name, op in self.ops.items()
            for kind, parameter in changeable(op).items()
        }
        odd = sorted(parts.keys() - state.keys()) or sorted(
            state.keys() - parts.keys() - own.keys()
        )
        if odd:
            raise self._misfit(f'{odd[0]} is missing or too many')
        for key, value in state.items():
            part, param = parts.get(key, (None, ''))
            fault = (
                part.fault(param, value) if part else parameter_fault(own[key], value)
            )
            if fault:
                raise self._misfit(f'{key} {fault}')
        for name, op in self.ops.items():
            for kind in changeable(op):
                if f'{name}.{kind}' in state:
                    self._change(f'{name}.{kind}', state[f'{name}.{kind}'])
            for key, module in op.named_modules():
                if isinstance(module, Calibrated):
                    module.set(
                        **{
                            param: (
                                state[f'{name}.{key}.{param}'].to(module.place.device)
                            )
                            for param in module.param_names
                        }
                    )

    def restore(self, before: dict[str, Tensor]) -> None:
        """Goes back to a state that :meth:`state` returned; what was not calibrated
        then is not any more.
        """
        self.restore_parameters()
        for name, op in self.ops.items():
            for kind in changeable(op):
                if f'{name}.{kind}' in before:
                    self._change(f'{name}.{kind}', before[f'{name}.{kind}'])
            for key, module in op.named_modules():
                if not isinstance(module, Calibrated):
                    continue
                params = {
                    param: before.get(f'{name}.{key}.{param}')
                    for param in module.param_names
                }
                known = {
                    param: value for param, value in params.items() if value is not None
                }
                if len(known) == len(params):
                    module.set(**known)
                else:
                    module.clear()

    def _misfit(self, reason: str) -> QuantizationError:
        return QuantizationError(
            f'the progress of block {self.name} does not fit the model: {reason};'
            ' remove the file of progress to calibrate from the start'
        )

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Changes the weight of an operation, in place."""
        self._change(f'{name}.weight', weight)

    def set_bias(self, name: str, bias: Tensor) -> None:
        """Changes the bias of an operation that has one, in place."""
        self._change(f'{name}.bias', bias)

    @torch.no_grad()
    def restore_parameters(self) -> None:
        """Sets the weights and biases back to those of the float model."""
        for key, value in self.float_parameters.items():
            self._parameter(key).copy_(value)
        self.float_parameters = {}

    @torch.no_grad()
    def _change(self, key: str, value: Tensor) -> None:
        parameter = self._parameter(key)
        if (
            key not in self.float_parameters
        ):  # another operation that shares it may have changed it already
            known = [
                before
                for other, before in self.float_parameters.items()
                if self._parameter(other) is parameter
            ]
            self.float_parameters[key] = known[0] if known else parameter.clone()
        parameter.copy_(value)

    def _parameter(self, key: str) -> nn.Parameter:
        name, _, kind = key.rpartition('.')
        return self.ops[name].get_parameter(kind)


def changeable(op: QuantOp) -> dict[str, nn.Parameter]:
    """The weight and the bias of an operation, those of the two that it has."""
    return {
        kind: parameter
        for kind, parameter in op.named_parameters(recurse=False)
        if kind in ('weight', 'bias')
    }


def parameter_fault(parameter: Tensor, value: Tensor) -> str | None:
    """Why a value cannot be that of a parameter, if it is so."""
    if value.shape != parameter.shape or value.dtype != parameter.dtype:
        return (
            f'is of shape {tuple(value.shape)} and {value.dtype}, not'
            f' {tuple(parameter.shape)} and {parameter.dtype}'
        )
    return None if bool(torch.isfinite(value).all()) else 'is not finite'


@contextmanager
def listening(ops: dict[str, QuantOp], visit: Visitor) -> Iterator[None]:
    """Inside, ``visit(name, op, activations)`` is called before an operation runs,
    unless they are empty.
    """

    def hook(name: str, op: QuantOp) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with (
                torch._C.DisableTorchFunction()
            ):  # products of its own are not those of the attention that it looks into
                activations = op.activations(*inputs)
                if all(x.numel() for x in activations):
                    visit(name, op, activations)

        return before

    handles = [op.register_forward_pre_hook(hook(name, op)) for name, op in ops.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def merge(samples: Samples) -> Samples:
    """Joins the samples that differ in their first dimension only."""
    groups: dict[tuple[torch.Size, ...], Samples] = {}
    for sample in samples:
        groups.setdefault(tuple(x.shape[1:] for x in sample), []).append(sample)
    return [
        tuple(torch.cat(parts) for parts in zip(*group, strict=True))
        for group in groups.values()
    ]


def operations(module: nn.Module, prefix: str = '') -> dict[str, QuantOp]:
    """All quantized operations in a module, by name, with a prefix such as
    ``stages.0.``.
    """
    return {
        (prefix + name).rstrip('.'): op
        for name, op in module.named_modules()
        if isinstance(op, QuantOp)
    }


class _Reached(Exception):  # noqa: N818  (control flow, not an error)
    """The block whose calls are wanted is about to run."""


class Stream:
    """A module's forward over several inputs, cut at its blocks.

    :meth:`calls` runs what lies between the last block and the next one and returns the
    next one's calls; :meth:`advance` takes that block's outputs. Blocks already passed
    are not computed again: the last one answers with its outputs, those before it with
    NaN of the right shape that takes no memory. Only one block's calls and outputs are
    kept, and a block that needs more than the last one's outputs is found out.

    Args:
        module: The module whose forward is cut (a backbone).
        names: Its blocks, in forward order; each must be called once for an input.
        inputs: Calls of the module.

    Raises:
        QuantizationError: If a block does not run, runs twice, runs out of order, needs
            what an earlier one gave, or if its input or output is changed in place.
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
                raise self._misfit(
                    f'block {name} did not run after the blocks before it'
                )
            if self.position and _has_nan((reached[0].args, reached[0].kwargs)):
                before = self.names[self.position - 1]
                if _has_nan(self.outputs[index]):
                    raise QuantizationError(
                        f'block {before} gives outputs that are NaN; check the'
                        ' checkpoint and the calibration images'
                    )
                raise self._misfit(
                    f'block {name} needs more than the outputs of block {before}'
                )
            calls.append(reached[0])
        return calls

    def _misfit(self, reason: str) -> QuantizationError:
        return QuantizationError(
            f'{type(self.module).__name__}: {reason}; the blocks of its BackboneSpec do'
            ' not fit its forward'
        )

    def _check_order(self) -> None:
        ran: list[str] = []
        present: list[
            tuple[str, Any, list[int]]
        ] = []  # the input of the block that runs, or the output of the one before

        def check() -> None:
            for what, tensors, then in present:
                if versions(tensors) != then:
                    raise QuantizationError(
                        f'{what} is changed in place, and calibration needs it again:'
                        ' write x = x + y for x += y'
                    )

        def before(name: str, args: Any, kwargs: Any) -> None:
            check()
            ran.append(name)
            present[:] = [
                (f'the input of block {name}', (args, kwargs), versions((args, kwargs)))
            ]

        def after(name: str, output: Any) -> None:
            check()
            present[:] = [(f'the output of block {name}', output, versions(output))]

        handles = []
        for name in self.names:
            block = self.module.get_submodule(name)
            handles.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, args, kwargs),
                    with_kwargs=True,
                )
            )
            handles.append(
                block.register_forward_hook(
                    lambda _, args, output, name=name: after(name, output)
                )
            )
        try:
            for call in self.inputs[:1]:
                self.module(*call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name in self.names:
            if self.inputs and ran.count(name) != 1:
                raise self._misfit(
                    f'block {name} did not run once, but {ran.count(name)} times'
                )
        if self.inputs and ran != self.names:
            raise self._misfit(
                'block'
                f' {next(a for a, b in zip(ran, self.names, strict=True) if a != b)}'
                ' ran out of order'
            )

    def advance(self, outputs: list[Any]) -> None:
        """Goes on to the next block; ``outputs`` are those of the present one for the
        calls that it got.
        """
        if self.position:
            for shapes, output in zip(self.shapes, self.outputs, strict=True):
                shapes.append(tree_map(_hollow, output))
        self.outputs = outputs
        self.position += 1

    @contextmanager
    def _replay(self, index: int) -> Iterator[list[Call]]:
        blocks = [
            self.module.get_submodule(name) for name in self.names[: self.position + 1]
        ]
        answers = [*self.shapes[index], *self.outputs[index : index + 1]]
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
        with standing_in(map(in_place_of_forward, blocks, forwards)):
            yield reached


def versions(tree: Any) -> list[int]:
    """How often each tensor of a tree was changed in place."""
    return [
        leaf._version
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]


def _hollow(x: Any) -> Any:
    """NaN of the shape, dtype and device of a tensor, without memory of its own; other
    things as they are.
    """
    if not isinstance(x, Tensor):
        return x
    return x.new_full((), float('nan') if x.is_floating_point() else 0).expand(x.shape)


def _has_nan(tree: Any) -> bool:
    return any(
        bool(torch.isnan(x).any())
        for x in tree_flatten(tree)[0]
        if isinstance(x, Tensor)
    )
