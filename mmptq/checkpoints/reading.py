"""Checkpoints are read without executing anything of them: tensors and plain data only.

Four layers, each for what the one before cannot see: the archive (no bomb), the names
in its pickle (none that we do not expect), torch's own restricted reader, and every
tensor that comes out of it.
"""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..quantizers import calibrated_parts
from .pickles import Machine

LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
"""What a file of torch.save begins with that is no zip archive (before torch 1.6)."""

LONGEST_PICKLE = 2**26
"""Bytes of the pickle that says where the tensors are; a large model's takes some
hundred thousand.
"""

STORAGES = (
    'Double',
    'Float',
    'Half',
    'BFloat16',
    'Long',
    'Int',
    'Short',
    'Char',
    'Byte',
    'Bool',
)

DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""Types that the weights and parameters of a model may have in a file."""

MAKERS = {
    '__builtin__ complex',
    'collections OrderedDict',
    'torch Size',
    'torch device',
    'torch.nn.parameter Parameter',
    'torch._utils _rebuild_parameter',
    'torch._utils _rebuild_tensor_v2',
}
"""Names, as a pickle has them, of what makes tensors and plain data."""

KNOWN = {
    *MAKERS,
    'torch.storage UntypedStorage',
    *(f'torch {kind}Storage' for kind in STORAGES),
    *(str(dtype).replace('.', ' ') for dtype in DTYPES),
}
"""All names that tensors and plain data are made of; storages are named, and never
called.
"""

UNREAD = {
    '_codecs encode',
    '__builtin__ getattr',
    'builtins getattr',
    'mmengine.config.config ConfigDict',
    'mmengine.logging.history_buffer HistoryBuffer',
    'numpy dtype',
    'numpy ndarray',
    *(
        f'numpy.{core}.multiarray {name}'
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    ),
}
"""Names in what a Runner saves beside the weights, loss histories above all;
:class:`Unread` answers.
"""


class Unread:
    """Stands for a value that no one needs: it takes what the value would be made of,
    and drops it.
    """

    def __new__(cls, *values: object) -> Unread:  # noqa: D102
        return object.__new__(cls)

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def without_unread(value: Any) -> Any:
    """A value without the entries that were passed over; of dicts in dicts, as a Runner
    saves them.
    """
    if type(value) not in (dict, OrderedDict):
        return value
    items = ((key, without_unread(item)) for key, item in dict.items(value))
    return {key: item for key, item in items if not isinstance(item, Unread)}


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within it every ``torch.load``, mmengine's too, reads tensors and plain data
    only, never code.

    mmengine asks for full unpickling (or fails on its own files, before 0.11); what a
    Runner saves beside the weights is passed over. Before torch 2.5 nothing can be
    passed over, and only checkpoints without loss histories (published ones) are read.
    """
    allowed: list[Any] = [(Unread, name.replace(' ', '.')) for name in sorted(UNREAD)]
    variable = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = os.environ.get(variable)
    os.environ[variable] = '1'
    try:
        with (
            torch.serialization.safe_globals(allowed)
            if hasattr(torch.serialization, 'safe_globals')
            else nullcontext()
        ):
            yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def read_file(path: str | Path) -> Any:
    """What a file written by ``torch.save`` holds, tensors and plain data only.

    Raises:
        QuantizationError: If it is missing, damaged, inflates, or needs code to be
            read.
    """
    require_file(path)
    try:
        names = _names_in(path)
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        NotImplementedError,
    ) as error:
        raise QuantizationError(
            f'{path} is damaged or no checkpoint: {error}'
        ) from None
    unknown = sorted(names - KNOWN - UNREAD)
    if unknown:
        raise QuantizationError(
            f'{path} cannot be read safely: it names'
            f' {some([_dotted(name) for name in unknown])}, and mmptq reads tensors and'
            ' plain data only; if you trust the file, save its weights alone:'
            " torch.save({'state_dict': weights}, ...)"
        )
    try:
        with safe_loading():
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a broken file
        if hasattr(torch.serialization, 'safe_globals') or not names & UNREAD:
            reason = (
                'is damaged: its content cannot be put together'
                f' ({type(error).__name__})'
            )
        else:
            reason = (
                'holds loss histories, which torch before 2.5 cannot read safely; save'
                " its weights alone: torch.save({'state_dict': weights}, ...)"
            )
        raise QuantizationError(f'{path} {reason}') from None
    return content


def require_file(path: str | Path) -> None:
    """Raises QuantizationError if there is no file."""
    if not Path(path).is_file():
        reason = 'is no file' if Path(path).exists() else 'does not exist'
        raise QuantizationError(f'checkpoint {path} {reason}')


def _dotted(name: str) -> str:
    return name.replace(' ', '.')


def _names_in(path: str | Path) -> set[str]:
    """All names that a file's pickles would have imported, as ``module name``.

    Raises:
        ValueError: If it is no file of ``torch.save``, or inflates.
    """
    if tarfile.is_tarfile(path):
        raise ValueError('it is a file of a torch before 0.2')
    with open(path, 'rb') as file:
        start = file.read(max(4, len(LEGACY)))
        if start.startswith(b'PK\x03\x04'):
            return Machine(KNOWN - MAKERS).run(_pickle_of_archive(file))
        if start != LEGACY:
            raise ValueError('it is not a file of torch.save')
        file.seek(0)
        names: set[str] = set()
        for _ in range(
            5
        ):  # magic number, protocol, machine, content, keys of the storages
            names |= Machine(KNOWN - MAKERS).run(file)
        return names


def _pickle_of_archive(file: IO[bytes]) -> bytes:
    """The pickle in a zip archive of ``torch.save``, after a check that the archive
    does not inflate.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        inflated = sum(entry.file_size for entry in entries)
        if inflated > 2 * size:
            raise ValueError(f'its {size} bytes inflate to {inflated}')
        if archive.comment or len({entry.filename for entry in entries}) < len(entries):
            raise ValueError('its archive is not as torch.save writes it')
        if len({entry.filename.partition('/')[0] for entry in entries}) != 1:
            raise ValueError('its archive has more than one folder')
        if any(entry.filename.endswith('constants.pkl') for entry in entries):
            raise ValueError('it is a program of TorchScript; save its state_dict')
        pickles = [
            entry
            for entry in entries
            if entry.filename.rpartition('/')[2] == 'data.pkl'
        ]
        if len(pickles) != 1:
            raise ValueError(f'it has {len(pickles)} data.pkl, not one')
        if pickles[0].file_size > LONGEST_PICKLE:
            raise ValueError(f'its data.pkl has {pickles[0].file_size} bytes')
        return archive.read(pickles[0])


def load_file(path: str | Path) -> dict[str, Any]:
    """A checkpoint file's content, with the weights under ``state_dict``.

    Raises:
        QuantizationError: If it is missing, is no checkpoint, needs code to be read, or
            a tensor in it claims more than the file holds.
    """
    content = read_file(path)
    if type(content) not in (dict, OrderedDict):
        raise QuantizationError(f'{path} holds no state_dict')
    checkpoint = {key: value for key, value in dict.items(content) if type(key) is str}
    if 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': content}
    checkpoint['state_dict'] = checked_state(checkpoint['state_dict'], path)
    return checkpoint


def checked_state(state: Any, path: str | Path) -> OrderedDict[str, Tensor]:
    """The weights of a file, each an ordinary tensor with all its values in the file.

    Raises:
        QuantizationError: If there is something else, naming the key.
    """
    if type(state) not in (dict, OrderedDict):
        raise QuantizationError(f'{path} holds no state_dict')
    result: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in dict.items(state):
        if type(key) is not str or not isinstance(value, Tensor):
            name = (
                key[:100] if type(key) is str else f'a key of type {type(key).__name__}'
            )
            raise QuantizationError(f'{path} holds no state_dict: {name} is no tensor')
        if len(key) > 500 or not key.isprintable():
            raise QuantizationError(f'{path} has a weight of the name {key[:100]!r}')
        fault = tensor_fault(value)
        if fault:
            raise QuantizationError(f'{path}: {key} {fault}')
        result[key] = value.detach()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage()
        for value in result.values()
    }
    held = sum(storage.nbytes() for storage in storages.values())
    if held > 2 * os.path.getsize(path):
        raise QuantizationError(
            f'{path}: its tensors claim {held} bytes, more than the file holds'
        )
    _keep_versions(state, result)
    return result


def _keep_versions(state: Any, result: OrderedDict[str, Tensor]) -> None:
    """torch keeps versions of modules beside a state dict, which heads of mmdet ask
    for.
    """
    versions: Any = vars(state).get('_metadata') if type(state) is OrderedDict else None
    if type(versions) in (dict, OrderedDict):
        result._metadata = OrderedDict(  # type: ignore[attr-defined]
            (name, {'version': about.get('version')})
            for name, about in dict.items(versions)
            if type(name) is str
            and type(about) is dict
            and type(about.get('version')) is int
        )


def tensor_fault(value: Tensor) -> str | None:
    """Why a tensor of a file is none that a model could hold, if it is so."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
        return 'is no ordinary tensor'
    if value.device.type != 'cpu' or value.dtype not in DTYPES:
        return f'is of type {value.dtype} on {value.device.type}, which no weight is'
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f'claims {value.numel()} values, more than the file holds for it'
    return None


def load_checked(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str
) -> list[str]:
    """Loads weights, float or quantized, and refuses what does not fit.

    Args:
        model: A model with quantized operations.
        state_dict: Its weights, by the float model's names, with or without parameters
            of quantizers.
        source: Where they come from, for messages.

    Returns:
        Surplus keys that no quantizer wants; the Runner passes over them as well.

    Raises:
        QuantizationError: If weights are missing or have other shapes; if parameters of
            some quantizers, but not of all, are there; or if some have no quantizer.
    """
    try:
        missing, unexpected = model.load_state_dict(
            without_prefix(state_dict), strict=False
        )
    except QuantizationError as error:
        raise QuantizationError(f'{source}: {error}') from None
    except RuntimeError as error:
        mismatches = [line.strip() for line in str(error).splitlines()[1:]]
        raise QuantizationError(
            f'{source} is of another model: {some(mismatches)}'
        ) from None
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    if missing:
        instead = f', and has instead {some(unexpected)}' if unexpected else ''
        raise QuantizationError(
            f'{source} is of another model: it lacks {some(missing)}{instead}'
        )
    quantizers = calibrated_parts(model)
    absent = [
        f'{name}.{key}'
        for name, module in quantizers.items()
        for key in module.param_names
        if getattr(module, key) is None
    ]
    surplus = [key for key in unexpected if '_quantizer.' in key or '.rescale.' in key]
    if surplus:
        raise QuantizationError(
            f'{source} has parameters of quantizers that the recipe does not have:'
            f' {some(surplus)}'
        )
    if absent and any(module.params is not None for module in quantizers.values()):
        raise QuantizationError(
            f'{source} lacks parameters of quantizers: {some(absent)}'
        )
    return list(unexpected)


def without_prefix(state_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Weights without the prefix ``module.`` that a distributed model's have; versions
    of modules are kept.
    """
    state = OrderedDict(
        (re.sub(r'^module\.', '', key), value) for key, value in state_dict.items()
    )
    versions = getattr(state_dict, '_metadata', None)
    if versions is not None:
        state._metadata = versions  # type: ignore[attr-defined]  # torch has it there
    return state


def is_calibrated(model: nn.Module) -> bool:
    """Whether all quantizers of a model have parameters."""
    return all(module.params is not None for module in calibrated_parts(model).values())


def some(names: list[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
