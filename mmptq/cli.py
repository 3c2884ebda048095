"""The command line: ``mmptq quantize``, ``pack``, ``export`` and
``convert-checkpoint``, and what the scripts in tools/ call.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.dist import is_main_process
from rich.console import Console

from .analysis.table import result_table
from .apis import convert_checkpoint, export, pack
from .apis.quantize import run as quantize
from .arguments import add_config_changes, add_quantize_arguments
from .checkpoints.layouts import LAYOUTS
from .engine.options import Options, options_of_command
from .errors import QuantizationError


def run_quantize(args: argparse.Namespace) -> None:
    """Runs ``mmptq quantize``."""
    given = dict(vars(args))
    os.environ.setdefault('LOCAL_RANK', str(given.pop('local_rank')))
    config, checkpoint = given.pop('config'), given.pop('checkpoint')
    options = {
        name: value for name, value in given.items() if name in Options.model_fields
    }
    if options.get('as_in_paper'):
        options = {**defaults_in_paper(options), **options}
    summary = quantize(config, checkpoint, options_of_command(options))
    if not is_main_process():
        return
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(result_table([summary]))


def defaults_in_paper(options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--paper-protocol`` stands for where the user does not say otherwise."""
    recipe = {} if options.get('method') else dict(recipe='uqvit_w4a4')
    return dict(scope='model', **recipe)


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mmptq pack``."""
    parser.add_argument(
        'config',
        help='config file that the model was quantized from, or its quantized.py',
    )
    parser.add_argument('checkpoint', help='quantized.pth')
    parser.add_argument(
        '--out',
        help='file to write (default: the checkpoint with the suffix .safetensors)',
    )
    add_config_changes(parser)


def run_pack(args: argparse.Namespace) -> None:
    """Runs ``mmptq pack``."""
    path = pack(args.config, args.checkpoint, args.out, args.cfg_options)
    print(f'wrote {path}, {path.stat().st_size / 2**20:.2f} MiB')


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mmptq export``."""
    parser.add_argument(
        'config',
        help='config file that the model was quantized from, or its quantized.py',
    )
    parser.add_argument('checkpoint', help='quantized.pth or quantized.safetensors')
    parser.add_argument('--out', required=True, help='the .onnx file to write')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        required=True,
        metavar=('HEIGHT', 'WIDTH'),
        help=(
            'size of the images that the '
            'backbone gets, and of the one that it is compared on'
        ),
    )
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='any height and width, where torch can export that; slow for Swin',
    )
    add_config_changes(parser)


def run_export(args: argparse.Namespace) -> None:
    """Runs ``mmptq export``."""
    found = export(
        args.config,
        args.checkpoint,
        args.out,
        (args.shape[0], args.shape[1]),
        args.dynamic,
        args.cfg_options,
    )
    step, end_to_end, floor = (
        max(getattr(each, name) for each in found)
        for name in ('step', 'end_to_end', 'floor')
    )
    print(
        f'wrote {args.out}, {os.path.getsize(args.out) / 2**20:.2f} MiB; ONNX Runtime'
        f' differs from torch by {step:.1e} in a step, {end_to_end:.1e} from end to end'
        ' (torch from itself, if outputs of layers change in their last bit:'
        f' {floor:.1e})'
    )


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mmptq convert-checkpoint``."""
    parser.add_argument('source', help='checkpoint file, of torch.save or safetensors')
    parser.add_argument('target', help='the .pth file to write')
    parser.add_argument(
        '--kind',
        choices=list(LAYOUTS),
        help='the layout that the source must have (default: found by its keys)',
    )


def run_convert(args: argparse.Namespace) -> None:
    """Runs ``mmptq convert-checkpoint``."""
    done = convert_checkpoint(args.source, args.target, args.kind)
    print(
        f'{args.target}: {len(done.state_dict)} weights, the backbone from'
        f' {done.layout.owner} to {done.layout.target}: {done.renamed} renamed,'
        f' {done.permuted} permuted, {done.unchanged} as they were, {len(done.dropped)}'
        ' dropped'
    )
    for key in done.dropped:
        print(f'dropped: {key}')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog='mmptq', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser(
        'quantize', help='quantize a detector or segmentor, evaluate and save it'
    )
    add_quantize_arguments(command)
    command.set_defaults(run=run_quantize)
    command = commands.add_parser(
        'pack',
        help='write a quantized checkpoint as one small file, its weights packed',
    )
    add_pack_arguments(command)
    command.set_defaults(run=run_pack)
    command = commands.add_parser(
        'export', help='write a quantized backbone as an ONNX file, compared with torch'
    )
    add_export_arguments(command)
    command.set_defaults(run=run_export)
    command = commands.add_parser(
        'convert-checkpoint',
        help='convert a Swin or timm checkpoint for mmdet 3 and mmsegmentation 1',
    )
    add_convert_arguments(command)
    command.set_defaults(run=run_convert)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (QuantizationError, OSError) as error:
        print(f'mmptq: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = (
            '; the same command with --resume goes on after the last calibrated block'
            if args.command == 'quantize'
            else ''
        )
        print(f'mmptq: interrupted{more}', file=sys.stderr)
        return 130
    return 0
