"""The command line: ``mmptq quantize``, ``pack``, ``export`` and ``convert-checkpoint``, and what the scripts in tools/ call."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mmengine.config import DictAction
from mmengine.dist import is_main_process
from rich.console import Console

from .analysis.table import result_table
from .apis import PAPER_IMAGES, convert_checkpoint, export, pack, quantize, recipe_names, recipe_of
from .checkpoints.layouts import LAYOUTS
from .engine.hook import BACKENDS
from .errors import QuantizationError


def key_value(text: str) -> str:
    """One change of a config, checked; DictAction takes it apart."""
    if '=' not in text:
        raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
    return text


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of mmdet's tools/test.py, and those of quantization."""
    parser.add_argument('config', help='config file of mmdet or mmsegmentation, or package::name')
    parser.add_argument('checkpoint', help='checkpoint file, float or quantized (.safetensors: packed)')
    parser.add_argument('--work-dir', help='directory for quantized.pth, quantized.py and summary.json (default: '
                        'work_dirs/CONFIG_RECIPE)')
    parser.add_argument('--out', help='file (mmsegmentation: directory) for the predictions of the quantized model')
    parser.add_argument('--show', action='store_true', help='show predictions')
    parser.add_argument('--show-dir', help='directory for painted predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='interval of --show, s')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, type=key_value, help='changes of the config, key=value')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--tta', action='store_true', help='evaluate with test-time augmentation')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)

    group = parser.add_argument_group('quantization')
    group.add_argument('--recipe', help='METHOD_wXaY (default: adalog_w4a4, or that of a quantized checkpoint), a variant of it '
                       '(adalog_w4a4_fast), or a config file that defines `recipe`')
    group.add_argument('--method', help=f'instead of --recipe: one of {", ".join(recipe_names())}')
    group.add_argument('--w-bits', type=int, help='with --method: bits of weights, 2 to 8 (default: 4)')
    group.add_argument('--a-bits', type=int, help='with --method: bits of activations, 2 to 8 (default: 4)')
    group.add_argument('--softmax-bits', type=int, help='with --method: bits of attention probabilities (default: those of activations)')
    group.add_argument('--scope', choices=['backbone', 'model'], help='what is quantized (default: backbone, or as in a quantized '
                       'checkpoint; with --paper-protocol: model)')
    group.add_argument('--calib-images', type=int, help='number of calibration images (default: 32)')
    group.add_argument('--calib-cfg', help='config file whose train_dataloader has the calibration images')
    group.add_argument('--calib-on-test', action='store_true', help='calibrate on evaluation images: a leak, logged as one')
    group.add_argument('--paper-protocol', action='store_true', help='with a uqvit_* recipe: the setting of its official detection code, '
                       'on the first two evaluation images: a leak, logged as one')
    group.add_argument('--seed', type=int, default=0, help='seed of the calibration images and token samples (default: 0)')
    group.add_argument('--float-eval', action=argparse.BooleanOptionalAction, default=True, help='evaluate the float model first')
    group.add_argument('--no-eval', action='store_true', help='calibrate and save only')
    group.add_argument('--pack', action='store_true', help='write quantized.safetensors too, with packed weights')
    group.add_argument('--backend', choices=BACKENDS, default='simulated', help='how the quantized model is evaluated: rounded values in '
                       'float32, or integers (default: simulated)')
    group.add_argument('--resume', action='store_true', help='go on after the last block that an interrupted run calibrated')


def run_quantize(args: argparse.Namespace) -> None:
    """Runs ``mmptq quantize``."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.recipe and args.method:
        raise QuantizationError('give --recipe, or --method with --w-bits and --a-bits, not both')
    if not args.method and any(bits is not None for bits in (args.w_bits, args.a_bits, args.softmax_bits)):
        raise QuantizationError('--w-bits, --a-bits and --softmax-bits go with --method')
    if args.paper_protocol and args.calib_images is not None:
        raise QuantizationError(f'--paper-protocol calibrates on {PAPER_IMAGES} evaluation images: drop --calib-images')
    recipe = args.recipe or ('uqvit_w4a4' if args.paper_protocol else None)
    if args.method:
        weight_bits, activation_bits = (4 if bits is None else bits for bits in (args.w_bits, args.a_bits))
        recipe = recipe_of(args.method, weight_bits, activation_bits, args.softmax_bits)
    summary = quantize(
        args.config, args.checkpoint, recipe, scope=args.scope or ('model' if args.paper_protocol else None), work_dir=args.work_dir,
        cfg_options=args.cfg_options, launcher=args.launcher, calib_images=32 if args.calib_images is None else args.calib_images,
        calib_cfg=args.calib_cfg, calib_on_test=args.calib_on_test, as_in_paper=args.paper_protocol, seed=args.seed,
        float_eval=args.float_eval, evaluate=not args.no_eval, resume=args.resume, pack=args.pack, backend=args.backend, out=args.out,
        show=args.show, show_dir=args.show_dir, wait_time=args.wait_time, tta=args.tta)
    if not is_main_process():
        return
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(result_table([summary]))


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mmptq pack``."""
    parser.add_argument('config', help='config file that the model was quantized from, or its quantized.py')
    parser.add_argument('checkpoint', help='quantized.pth')
    parser.add_argument('--out', help='file to write (default: the checkpoint with the suffix .safetensors)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, type=key_value, help='changes of the config, key=value')


def run_pack(args: argparse.Namespace) -> None:
    """Runs ``mmptq pack``."""
    path = pack(args.config, args.checkpoint, args.out, args.cfg_options)
    print(f'wrote {path}, {path.stat().st_size / 2**20:.2f} MiB')


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mmptq export``."""
    parser.add_argument('config', help='config file that the model was quantized from, or its quantized.py')
    parser.add_argument('checkpoint', help='quantized.pth or quantized.safetensors')
    parser.add_argument('--out', required=True, help='the .onnx file to write')
    parser.add_argument('--shape', type=int, nargs=2, required=True, metavar=('HEIGHT', 'WIDTH'), help='size of the images that the '
                        'backbone gets, and of the one that it is compared on')
    parser.add_argument('--dynamic', action='store_true', help='any height and width, where torch can export that; slow for Swin')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, type=key_value, help='changes of the config, key=value')


def run_export(args: argparse.Namespace) -> None:
    """Runs ``mmptq export``."""
    found = export(args.config, args.checkpoint, args.out, (args.shape[0], args.shape[1]), args.dynamic, args.cfg_options)
    step, end_to_end, floor = (max(getattr(each, name) for each in found) for name in ('step', 'end_to_end', 'floor'))
    print(f'wrote {args.out}, {os.path.getsize(args.out) / 2**20:.2f} MiB; ONNX Runtime differs from torch by {step:.1e} in a step, '
          f'{end_to_end:.1e} from end to end (torch from itself, if outputs of layers change in their last bit: {floor:.1e})')


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mmptq convert-checkpoint``."""
    parser.add_argument('source', help='checkpoint file, of torch.save or safetensors')
    parser.add_argument('target', help='the .pth file to write')
    parser.add_argument('--kind', choices=list(LAYOUTS), help='the layout that the source must have (default: found by its keys)')


def run_convert(args: argparse.Namespace) -> None:
    """Runs ``mmptq convert-checkpoint``."""
    done = convert_checkpoint(args.source, args.target, args.kind)
    print(f'{args.target}: {len(done.state_dict)} weights, the backbone from {done.layout.owner} to {done.layout.target}: '
          f'{done.renamed} renamed, {done.permuted} permuted, {done.unchanged} as they were, {len(done.dropped)} dropped')
    for key in done.dropped:
        print(f'dropped: {key}')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog='mmptq', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('quantize', help='quantize a detector or segmentor, evaluate and save it')
    add_quantize_arguments(command)
    command.set_defaults(run=run_quantize)
    command = commands.add_parser('pack', help='write a quantized checkpoint as one small file, its weights packed')
    add_pack_arguments(command)
    command.set_defaults(run=run_pack)
    command = commands.add_parser('export', help='write a quantized backbone as an ONNX file, compared with torch')
    add_export_arguments(command)
    command.set_defaults(run=run_export)
    command = commands.add_parser('convert-checkpoint', help='convert a Swin or timm checkpoint for mmdet 3 and mmsegmentation 1')
    add_convert_arguments(command)
    command.set_defaults(run=run_convert)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (QuantizationError, OSError) as error:
        print(f'mmptq: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = '; the same command with --resume goes on after the last calibrated block' if args.command == 'quantize' else ''
        print(f'mmptq: interrupted{more}', file=sys.stderr)
        return 130
    return 0
