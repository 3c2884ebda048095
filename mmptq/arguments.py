"""Arguments of the command line that are made from the fields of :class:`Options`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mmengine.config import DictAction

from .engine.options import FLAGS, Options, extra


def key_value(text: str) -> str:
    """One change of a config, checked; DictAction takes it apart."""
    if '=' not in text:
        raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
    return text


def pattern_bits(text: str) -> tuple[str, tuple[int, ...]]:
    """A pattern and its bits, PATTERN=W,A or PATTERN=W,A,S, taken apart and checked."""
    pattern, _, numbers = text.rpartition('=')
    try:
        bits = tuple(map(int, numbers.split(',')))
    except ValueError:
        bits = ()
    if not pattern or len(bits) not in (2, 3):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not PATTERN=W,A or PATTERN=W,A,S'
        )
    return pattern, bits


class LayerBits(argparse.Action):
    """Collects patterns and bits as a dict."""

    def __call__(  # noqa: D102
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, dict(values))


def add_config_changes(
    parser: Any, name: str = '--cfg-options', **settings: Any
) -> None:
    """The argument for changes of a config."""
    settings = {'help': 'changes of the config, key=value', **settings}
    parser.add_argument(name, nargs='+', action=DictAction, type=key_value, **settings)


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of mmdet's tools/test.py, and those of quantization.

    What is not given is not in the namespace: the defaults are those of
    :class:`Options`.
    """
    parser.add_argument(
        'config', help='config file of mmdet or mmsegmentation, or package::name'
    )
    parser.add_argument(
        'checkpoint', help='checkpoint file, float or quantized (.safetensors: packed)'
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS
    )
    quantization = parser.add_argument_group('quantization')
    for name in Options.model_fields:
        about = extra(name)
        if about['told']:
            add_argument(parser if about['tested'] else quantization, name)


def add_argument(parser: Any, name: str) -> None:
    """The argument of one option."""
    field = Options.model_fields[name]
    settings = dict(dest=name, default=argparse.SUPPRESS, help=field.description)
    kind = said_type(field.annotation)
    if kind is bool:
        action = switch(FLAGS[name], field.default)
        parser.add_argument(FLAGS[name], action=action, **settings)
    elif get_origin(kind) is Literal:
        parser.add_argument(FLAGS[name], choices=get_args(kind), **settings)
    elif name == 'layer_bits':
        parser.add_argument(
            FLAGS[name], nargs='+', action=LayerBits, type=pattern_bits, **settings
        )
    elif get_origin(kind) is list:
        parser.add_argument(FLAGS[name], nargs='+', **settings)
    elif get_origin(kind) is Mapping:
        add_config_changes(parser, FLAGS[name], **settings)
    else:
        parser.add_argument(FLAGS[name], type=kind, **settings)


def said_type(annotation: Any) -> Any:
    """The first type of a union: the one that a user can write in a shell; str for text
    or a path.
    """
    return get_args(annotation)[0] if is_union(annotation) else annotation


def is_union(annotation: Any) -> bool:
    """Whether a type is a choice of several."""
    return get_origin(annotation) in (Union, UnionType)


def switch(flag: str, default: bool) -> Any:
    """What a flag without a value does: it turns on, or off, or has a twin for the
    opposite.
    """
    if not default:
        return 'store_true'
    if flag.startswith('--no-'):
        return 'store_false'
    return argparse.BooleanOptionalAction
