"""The options of a run, once: for the command line, for :func:`mmptq.apis.quantize` and
for PTQHook.

A new option touches two places: its field here, and where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..backbones.presets import recipe_names, recipe_of
from ..errors import QuantizationError

PAPER_IMAGES = 2
"""Calibration images of UQ-ViT's official detection code."""


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    hook: str | None = None,
    tested: bool = False,
    told: bool = True,
) -> Any:
    """A field of :class:`Options`.

    Args:
        default: Its value where it is not given.
        help: What it does, as ``--help`` says it.
        flag: Its name on the command line, if that is not its own with dashes.
        hook: Its name in PTQHook, if it is an option of that.
        tested: Whether the test tools of mmdet and mmsegmentation have it, too.
        told: Whether the command line has it.
    """
    about: dict[str, Any] = dict(flag=flag, hook=hook, tested=tested, told=told)
    return Field(default, description=help, json_schema_extra=about)


class Options(BaseModel):
    """What a user can say of a run; it does not change afterwards."""

    model_config = ConfigDict(
        strict=True, extra='forbid', frozen=True, arbitrary_types_allowed=True
    )

    work_dir: str | Path | None = option(
        None,
        'directory for quantized.pth, quantized.py and summary.json (default: '
        'work_dirs/CONFIG_RECIPE)',
        tested=True,
    )
    out: str | Path | None = option(
        None,
        'file (mmsegmentation: directory) for the predictions of the quantized model',
        tested=True,
    )
    show: bool = option(False, 'show predictions', tested=True)
    show_dir: str | Path | None = option(
        None, 'directory for painted predictions', tested=True
    )
    wait_time: float = option(2, 'interval of --show, s', tested=True)
    cfg_options: Mapping[str, Any] | None = option(
        None, 'changes of the config, key=value', tested=True
    )
    launcher: Literal['none', 'pytorch', 'slurm', 'mpi'] = option(
        'none', 'job launcher; each process calibrates on the same images', tested=True
    )
    tta: bool = option(False, 'evaluate with test-time augmentation', tested=True)

    recipe: str | Mapping[str, Any] | None = option(
        None,
        'METHOD_wXaY (default: adalog_w4a4, or that of a quantized checkpoint), a'
        ' variant of it (adalog_w4a4_fast), or a config file that defines `recipe`',
    )
    method: str | None = option(
        None, f'instead of --recipe: one of {", ".join(recipe_names())}'
    )
    w_bits: int | None = option(
        None, 'with --method: bits of weights, 2 to 8 (default: 4)'
    )
    a_bits: int | None = option(
        None, 'with --method: bits of activations, 2 to 8 (default: 4)'
    )
    softmax_bits: int | None = option(
        None,
        'with --method: bits of attention probabilities (default: those of'
        ' activations)',
    )
    keep_float: list[str] = option(
        [],
        'patterns of layers and attention products that stay float (docs/layers.md)',
    )
    layer_bits: Mapping[str, Sequence[int]] = option(
        {},
        'PATTERN=W,A or PATTERN=W,A,S: other bits of weights, activations and attention'
        ' probabilities for single layers',
    )
    scope: Literal['backbone', 'model'] | None = option(
        None,
        'what is quantized (default: backbone, or as in a quantized checkpoint; with '
        '--paper-protocol: model)',
    )
    calib_images: int | None = option(
        None,
        'number of calibration images, drawn from the train set (default: 32)',
        hook='images',
    )
    calib_cfg: str | Path | None = option(
        None,
        'config file whose train_dataloader has the calibration images',
        hook='calib_cfg',
    )
    calib_on_test: bool = option(
        False, 'calibrate on evaluation images: a leak, logged as one', hook='on_test'
    )
    as_in_paper: bool = option(
        False,
        'with a uqvit_* recipe: the setting of its official detection code, on the'
        ' first two evaluation images: a leak, logged as one',
        flag='--paper-protocol',
    )
    seed: int = option(
        0, 'seed of the calibration images and token samples (default: 0)', hook='seed'
    )
    float_eval: bool = option(
        True,
        'evaluate the float model first, unless the checkpoint is packed and has none',
    )
    evaluate: bool = option(
        True,
        'evaluate the models; --no-eval: calibrate and save only',
        flag='--no-eval',
    )
    pack: bool = option(
        False, 'write quantized.safetensors too, with packed weights', hook='pack'
    )
    backend: Literal['simulated', 'integer'] = option(
        'simulated',
        'how the quantized model is evaluated: rounded values in float32, or integers'
        ' (default: simulated)',
        hook='backend',
    )
    resume: bool = option(
        False,
        'go on after the last block that an interrupted run in the same --work-dir'
        ' calibrated',
        hook='resume',
    )

    dataset: dict[str, Any] | None = option(
        None, 'config of the calibration data set', hook='dataset', told=False
    )
    shuffle: bool = option(
        True,
        'draw the calibration images at random; else they are the first ones',
        hook='shuffle',
        told=False,
    )

    @property
    def images(self) -> int:
        """How many calibration images are drawn."""
        if self.as_in_paper:
            return PAPER_IMAGES
        return 32 if self.calib_images is None else self.calib_images

    @property
    def calib_config(self) -> str | None:
        """The name of the config that has the calibration images, if it is another one."""
        return None if self.calib_cfg is None else str(self.calib_cfg)

    @property
    def on_test(self) -> bool:
        """Whether they are images of the evaluation."""
        return self.calib_on_test or self.as_in_paper

    @property
    def shuffled(self) -> bool:
        """Whether they are drawn at random."""
        return self.shuffle and not self.as_in_paper

    def asked_recipe(self) -> str | Mapping[str, Any] | None:
        """The recipe that was asked for, by name or by method and bits; None if none
        was.
        """
        if not self.method:
            return self.recipe
        bits = [4 if bits is None else bits for bits in (self.w_bits, self.a_bits)]
        return recipe_of(self.method, bits[0], bits[1], self.softmax_bits)

    def of_hook(self) -> dict[str, Any]:
        """These options as PTQHook takes them."""
        return dict(
            images=self.images,
            seed=self.seed,
            on_test=self.on_test,
            shuffle=self.shuffled,
            resume=self.resume,
            pack=self.pack,
            backend=self.backend,
            dataset=self.dataset,
        )


def extra(name: str) -> dict[str, Any]:
    """What :func:`option` was told of a field."""
    found = Options.model_fields[name].json_schema_extra
    assert isinstance(found, dict)
    return found


def flag_of(name: str) -> str:
    """The name of an option on the command line."""
    return str(extra(name)['flag'] or f'--{name.replace("_", "-")}')


FLAGS = {name: flag_of(name) for name in Options.model_fields}
NAMES = {name: name for name in Options.model_fields}
HOOK_NAMES = {
    name: str(extra(name)['hook'])
    for name in Options.model_fields
    if extra(name)['hook']
}


def options_of_command(given: Mapping[str, Any]) -> Options:
    """The options that were given on the command line, by field.

    Raises:
        QuantizationError: If one is wrong or two do not go together.
    """
    return _checked(dict(given), FLAGS)


def options_of_call(given: Mapping[str, Any]) -> Options:
    """The options that were given to :func:`mmptq.apis.quantize`.

    Raises:
        QuantizationError: If one is unknown or wrong, or two do not go together.
    """
    return _checked(dict(given), NAMES)


def options_of_hook(given: Mapping[str, Any]) -> Options:
    """The options that a config gives to PTQHook.

    Raises:
        QuantizationError: If one is unknown or wrong.
    """
    fields = {hook: name for name, hook in HOOK_NAMES.items()}
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise QuantizationError(
            f'PTQHook has no option {unknown[0]}; it has {", ".join(fields)}'
        )
    return _checked(
        {fields[hook]: value for hook, value in given.items()}, {**NAMES, **HOOK_NAMES}
    )


def _checked(given: dict[str, Any], spelled: Mapping[str, str]) -> Options:
    """Options, each checked; errors name them as the user wrote them."""
    try:
        options = Options(**given)
    except ValidationError as error:
        raise QuantizationError(_fault(error, spelled)) from None
    _check_numbers(options, spelled)
    _check_pairs(options, spelled)
    return options


def _check_numbers(options: Options, spelled: Mapping[str, str]) -> None:
    if not 0 <= options.seed < 2**63:
        raise QuantizationError(
            f'{spelled["seed"]} {options.seed}: it is a number from 0 to 2^63 - 1'
        )


def _check_pairs(options: Options, spelled: Mapping[str, str]) -> None:
    """Raises QuantizationError if two options do not go together."""
    bits = (options.w_bits, options.a_bits, options.softmax_bits)
    if options.recipe and options.method:
        raise QuantizationError(
            f'give {spelled["recipe"]}, or {spelled["method"]} with {spelled["w_bits"]}'
            f' and {spelled["a_bits"]}, not both'
        )
    if not options.method and any(number is not None for number in bits):
        raise QuantizationError(
            f'{spelled["w_bits"]}, {spelled["a_bits"]} and {spelled["softmax_bits"]} go'
            f' with {spelled["method"]}'
        )
    if options.as_in_paper and options.calib_images is not None:
        raise QuantizationError(
            f'{spelled["as_in_paper"]} calibrates on {PAPER_IMAGES} evaluation images:'
            f' drop {spelled["calib_images"]}'
        )
    if options.as_in_paper and options.calib_cfg is not None:
        raise QuantizationError(
            f'the paper protocol ({spelled["as_in_paper"]}) calibrates on evaluation'
            f' images: {spelled["calib_cfg"]} has no place in it'
        )
    if options.backend != 'simulated' and not options.evaluate:
        raise QuantizationError(
            f'the backend {options.backend} is how the model is evaluated, and it is'
            ' not to be; leave out one of the two'
        )


def _fault(error: ValidationError, spelled: Mapping[str, str]) -> str:
    """The first value that is wrong, by the option's name."""
    fault = error.errors(include_url=False)[0]
    field = str(fault['loc'][0])
    if fault['type'] == 'extra_forbidden':
        return (
            f'there is no option {field}; known are {", ".join(Options.model_fields)}'
        )
    if fault['type'] == 'literal_error':
        known = str(fault['ctx']['expected']).replace("'", '').replace(' or ', ', ')
        return f'unknown {spelled[field]} {fault["input"]!r}: it is one of {known}'
    return f'{spelled[field]}={fault["input"]!r}: {fault["msg"]}'
