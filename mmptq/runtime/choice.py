"""Which backend a device has: the one place that asks what it is."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from .backend import Backend
from .cpu.backend import OneDnnBackend
from .portable import PortableBackend


def choose_backend(device: torch.device) -> Backend:
    """The fastest backend of a device; a line in the log if that is slow."""
    if has_triton(device):
        from .triton.backend import TritonBackend  # its files need the package triton

        return TritonBackend()
    if device.type != 'cpu':
        return PortableBackend(fuses=False)
    if not torch.cpu._is_vnni_supported():
        text = 'this CPU has no VNNI: integer products are exact, but slow'
        logging.getLogger('mmengine').warning(text)
    if has_onednn(device):
        return OneDnnBackend()
    return PortableBackend(fuses=True)


def has_onednn(device: torch.device) -> bool:
    """Whether integer products of oneDNN are there and exact.

    Without VNNI their 16-bit sums saturate.
    """
    if device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_vnni_supported()


def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can run.

    On a GPU of NVIDIA's with tensor cores for int8 (from compute capability 8.0 on),
    where the package is.
    """
    if device.type != 'cuda' or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return find_spec('triton') is not None
