"""timm beside the stock stack: in a folder of its own, because mmsegmentation imports
timm wherever it finds it.

timm imports torchvision, whose wheels are built for CUDA: beside a CPU build of torch
its operators do not load and its import fails for want of their schemas. The models
need none of these operators, so it is enough to define the schemas.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from ..errors import QuantizationError

FOLDER = Path(sys.prefix) / 'timm'
"""Where requirements/install.sh puts timm, torchvision and safetensors."""

SCHEMAS = dict.fromkeys(
    ('torchvision::nms', 'torchvision::qnms'),
    '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)
"""What torchvision registers shapes for when it is imported, whether or not its
operators were loaded.
"""


def import_timm() -> ModuleType:
    """Imports timm, from the environment if it is there, else from :data:`FOLDER`,
    which then stays on ``sys.path``.

    Raises:
        QuantizationError: If it is in neither, or it or its torchvision does not fit
            this torch.
    """
    if find_spec('timm') is None and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    if find_spec('timm') is None:
        raise QuantizationError(
            'timm is not installed: pip install timm; beside a CPU build of torch,'
            ' which that would replace, pip install --no-deps timm torchvision'
            ' safetensors'
        )
    try:
        _import_torchvision()
    except (ImportError, RuntimeError) as error:
        raise QuantizationError(
            f'timm needs torchvision, and {_installed("torchvision")} cannot be'
            f' imported beside torch {torch.__version__} ({error}): pip install'
            ' --no-deps the torchvision of that release'
        ) from error
    try:
        return import_module('timm')
    except (ImportError, RuntimeError) as error:
        raise QuantizationError(
            f'{_installed("timm")} cannot be imported beside torch {torch.__version__}'
            f' ({error}): pip install --no-deps --upgrade timm'
        ) from error


def timm_is_installed() -> bool:
    """Whether timm is among the installed packages, or in :data:`FOLDER`; a folder of
    that name in the working directory is not.
    """
    return bool(packages_distributions().get('timm')) or (FOLDER / 'timm').is_dir()


def _installed(package: str) -> str:
    try:
        return f'{package} {version(package)}'
    except PackageNotFoundError:
        return f'{package}, which is not installed,'


def _import_torchvision() -> None:
    try:
        import_module('torchvision')
    except RuntimeError as error:
        if not any(f'operator {name} does not exist' in str(error) for name in SCHEMAS):
            raise
        for name in [
            name for name in sys.modules if name.partition('.')[0] == 'torchvision'
        ]:
            del sys.modules[name]
        for name, schema in SCHEMAS.items():
            torch.library.define(name, schema)
        import_module('torchvision')
