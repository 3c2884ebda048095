"""How kernels are launched, and what their arguments are made of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..coders import Change
from ..errors import NoIntegerForm

Result = TypeVar('Result')


def launch(kernel: Any, programs: tuple[int, ...], *args: Any, **options: int) -> None:
    """Runs a kernel on the GPU of its first argument.

    Multiplications and additions round one after the other, as in the simulation.
    """
    with torch.cuda.device_of(args[0]):
        kernel[programs](*args, enable_fp_fusion=False, **options)


def tried(run: Callable[[], Result]) -> Result:
    """What a first launch gives.

    Raises:
        NoIntegerForm: If it fails: Triton's compiler raises errors of several kinds,
            and what a GPU lacks is known only then.
    """
    try:
        return run()
    except Exception as error:
        reason = f'a kernel of Triton failed: {type(error).__name__}: {error}'
        logging.getLogger('mmengine').warning(
            f'{reason}; what it is for runs without it'
        )
        raise NoIntegerForm(reason) from error


def vectors(change: Change | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and shift of a change for each channel of a vector; without a change one
    and zero.
    """
    if change is None:
        return torch.ones_like(like), torch.zeros_like(like)
    return each_of(change.factor, len(like)), each_of(change.shift, len(like))


def each_of(values: Tensor, count: int) -> Tensor:
    """One value for each of so many, (count,), from these or from one."""
    return values.reshape(-1).expand(count).contiguous()


def power_of_two(number: int) -> int:
    """The next one that is not less."""
    return 1 << (number - 1).bit_length()
