"""Imports run one way, and no OpenMMLab class is imported at the top of a file."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'mmptq').rglob('*.py'))
OUTSIDE = {'torch', 'numpy', 'mmptq', *sys.stdlib_module_names}

MAY_IMPORT = {
    'quantizers': {'errors'},
    'layers': {'quantizers', 'errors'},
    'calibration': {'layers', 'quantizers', 'errors'},
    'methods': {'calibration', 'layers', 'quantizers', 'errors'},
}
"""Rooms that know of nothing else, and of nothing outside but torch and numpy."""

MAY_NOT_IMPORT = {
    'backbones': {
        'engine',
        'apis',
        'analysis',
        'checkpoints',
        'runtime',
        'export',
        'cli',
    },
    'wrapping': {
        'engine',
        'apis',
        'analysis',
        'checkpoints',
        'runtime',
        'export',
        'cli',
    },
    'runtime': {'engine', 'apis', 'analysis', 'checkpoints', 'export', 'cli'},
    'checkpoints': {'engine', 'apis', 'export', 'cli'},
    'engine': {'apis', 'cli'},
    'analysis': {'engine', 'apis', 'checkpoints', 'cli'},
}

CLASSES = {'mmdet', 'mmseg', 'mmcv', 'mmpretrain', 'timm'}
"""Packages whose classes are reached by name, through registries."""


def room_of(path):
    """``quantizers`` for mmptq/quantizers/base.py, ``errors`` for mmptq/errors.py."""
    return path.relative_to(ROOT / 'mmptq').parts[0].removesuffix('.py')


def checking_only(node):
    """Whether a statement is ``if TYPE_CHECKING``."""
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == 'TYPE_CHECKING'
    )


def statements(body, inside_functions=True):
    """All statements that run: not those for type checkers; those in functions only if
    asked for.
    """
    for node in body:
        yield node
        if checking_only(node) or (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and not inside_functions
        ):
            continue
        for field in ('body', 'orelse', 'finalbody', 'handlers', 'cases'):
            yield from statements(getattr(node, field, []), inside_functions)


def imports(path, inside_functions=True):
    """What a file imports, as absolute dotted names."""
    package = path.relative_to(ROOT).parent.parts
    for node in statements(ast.parse(path.read_text()).body, inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                '.'.join(package[: len(package) - node.level + 1]) if node.level else ''
            )
            module = '.'.join(part for part in (base, node.module) if part)
            yield from (f'{module}.{alias.name}' for alias in node.names)


def rooms(path):
    """The rooms of mmptq that a file imports from, its own left out."""
    found = {name.split('.')[1] for name in imports(path) if name.startswith('mmptq.')}
    return found - {room_of(path)}


def names(paths):
    return pytest.mark.parametrize(
        'path', paths, ids=lambda path: str(path.relative_to(ROOT))
    )


def in_rooms(wanted):
    return [path for path in FILES if room_of(path) in wanted]


def test_files_are_seen_as_they_are():
    assert len(FILES) > 20 and {room_of(path) for path in FILES} >= {
        *MAY_IMPORT,
        *MAY_NOT_IMPORT,
        'errors',
        'registry',
        'cli',
        'apis',
    }
    found = set(imports(ROOT / 'mmptq' / 'quantizers' / 'uniform.py'))
    assert found >= {'torch', 'torch.Tensor', 'mmptq.quantizers.base.Quantizer'}
    top = set(imports(ROOT / 'mmptq' / 'apis' / 'export.py', inside_functions=False))
    assert 'mmptq.export.onnx.Difference' not in top  # under TYPE_CHECKING
    assert 'methods' in rooms(ROOT / 'mmptq' / 'registry.py')
    assert 'methods' in rooms(ROOT / 'mmptq' / 'backbones' / 'stages.py')


@names(in_rooms(MAY_IMPORT))
def test_rooms_import_only_those_below(path):
    assert rooms(path) <= MAY_IMPORT[room_of(path)]


@names(in_rooms(MAY_NOT_IMPORT))
def test_rooms_do_not_import_those_above(path):
    assert not rooms(path) & MAY_NOT_IMPORT[room_of(path)]


@names(in_rooms(MAY_IMPORT))
def test_the_core_imports_torch_only(path):
    assert {name.split('.')[0] for name in imports(path)} <= OUTSIDE


@names([path for path in FILES if room_of(path) in {'errors', 'version'}])
def test_leaves_import_nothing(path):
    assert set(imports(path)) <= {'__future__.annotations'}


@names(FILES)
def test_classes_of_openmmlab_are_reached_by_name(path):
    assert (
        not {name.split('.')[0] for name in imports(path, inside_functions=False)}
        & CLASSES
    )


@names(FILES)
def test_no_bare_except(path):
    assert not [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


@names(
    sorted(
        path
        for folder in ('mmptq', 'configs', 'tools', 'demo', 'benchmarks')
        for path in (ROOT / folder).rglob('*.py')
    )
)
def test_no_paths_of_a_machine(path):
    assert (
        re.findall(
            r'(?<![\w.])/(?:home|root|work|mnt|media|Users|tmp|data\d*|opt|workspace)\b',
            path.read_text(),
        )
        == []
    )
