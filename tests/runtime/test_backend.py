"""Which backend a device has, and that the files of the runtime import one way."""

from graphlib import TopologicalSorter
from types import SimpleNamespace

import pytest
import torch

from mmptq.runtime import choice, convert, to_integer
from mmptq.runtime.blocks import IntegerBlock
from mmptq.runtime.choice import choose_backend
from mmptq.runtime.cpu.backend import OneDnnBackend
from mmptq.runtime.cpu.block import CpuBlock
from mmptq.runtime.portable import PortableBackend

from ..test_architecture import FILES, ROOT, imports
from .conftest import ready

CPU, GPU = torch.device('cpu'), torch.device('cuda')
RUNTIME = [path for path in FILES if path.is_relative_to(ROOT / 'mmptq' / 'runtime')]


@pytest.mark.parametrize(
    'vnni, mkldnn, kind',
    [
        (True, True, OneDnnBackend),
        (True, False, PortableBackend),
        (False, True, PortableBackend),
    ],
)
def test_a_cpu_has_onednn_where_that_is_exact(vnni, mkldnn, kind, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: vnni)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: mkldnn)
    backend = choose_backend(CPU)
    assert type(backend) is kind
    assert backend.block is CpuBlock and backend.fuses_maps


@pytest.mark.parametrize(
    'capability, hip, found',
    [
        ((8, 0), None, True),
        ((9, 0), None, True),
        ((7, 5), None, False),
        ((9, 0), '6', False),
    ],
)
def test_a_gpu_has_triton_from_compute_capability_8_on(
    capability, hip, found, monkeypatch
):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(choice, 'find_spec', lambda name: SimpleNamespace())
    assert choice.has_triton(GPU) == found
    monkeypatch.setattr(choice, 'find_spec', lambda name: None)
    assert not choice.has_triton(GPU)
    backend = choose_backend(GPU)  # without Triton blocks keep their own forward
    assert (
        type(backend) is PortableBackend
        and backend.block is None
        and not backend.fuses_maps
    )


def test_a_gpu_with_triton_has_its_kernels(monkeypatch):
    pytest.importorskip('triton', reason='needs Triton (requirements/triton.txt)')
    monkeypatch.setattr(choice, 'has_triton', lambda device: device == GPU)
    backend = choose_backend(GPU)
    assert type(backend).__name__ == 'TritonBackend' and not backend.fuses_maps
    assert backend.block.__name__ == 'GpuBlock' and issubclass(
        backend.block, IntegerBlock
    )


def test_it_is_chosen_once_for_a_model(monkeypatch, uncompiled):
    asked = []

    def choose(device):
        asked.append(device)
        return choose_backend(device)

    monkeypatch.setattr(convert, 'choose_backend', choose)
    to_integer(ready('mmdet swin'))
    assert asked == [CPU]


def test_a_backend_that_fuses_nothing_leaves_blocks_and_maps(monkeypatch, uncompiled):
    monkeypatch.setattr(
        convert, 'choose_backend', lambda device: PortableBackend(fuses=False)
    )
    fused, apart = ready('mmdet swin'), ready('mmdet swin')
    assert to_integer(fused) == to_integer(apart, fuse=False)
    assert [type(module) for module in fused.modules()] == [
        type(module) for module in apart.modules()
    ]


def runtime_imports(path):
    """The files of the runtime that a file imports, in functions too."""
    found = set()
    for name in imports(path):
        parts = name.split('.')
        for length in range(len(parts), 2, -1):
            file = ROOT.joinpath(*parts[:length]).with_suffix('.py')
            if file in RUNTIME:
                found.add(file)
                break
    return found - {path}


def test_no_file_imports_itself_by_a_detour():
    graph = {path: runtime_imports(path) for path in RUNTIME}
    names = {path.name for path in graph[ROOT / 'mmptq' / 'runtime' / 'linear.py']}
    assert names >= {'backend.py', 'coders.py', 'kernels.py'}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize('path', RUNTIME, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_choice_asks_what_a_device_is(path):
    asks = [
        word
        for word in (
            'device.type',
            'find_spec',
            '_is_vnni_supported',
            'get_device_capability',
        )
        if word in path.read_text()
    ]
    assert not asks or path.name == 'choice.py'
