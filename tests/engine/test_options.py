"""One place for the options: three doors to it, and errors that name an option as it
was written.
"""

import argparse

import pytest

from mmptq import QuantizationError
from mmptq.arguments import add_quantize_arguments
from mmptq.engine.options import (
    FLAGS,
    HOOK_NAMES,
    Options,
    options_of_call,
    options_of_command,
    options_of_hook,
)

DEFAULTS = dict(
    work_dir=None,
    out=None,
    show=False,
    show_dir=None,
    wait_time=2,
    cfg_options=None,
    launcher='none',
    tta=False,
    recipe=None,
    scope=None,
    calib_cfg=None,
    calib_on_test=False,
    as_in_paper=False,
    seed=0,
    float_eval=True,
    evaluate=True,
    pack=False,
    backend='simulated',
    resume=False,
)


def parsed(*args):
    parser = argparse.ArgumentParser()
    add_quantize_arguments(parser)
    given = vars(parser.parse_args(['config.py', 'a.pth', *args]))
    return {
        name: value for name, value in given.items() if name in Options.model_fields
    }


def test_defaults_are_as_they_were():
    options = options_of_call({})
    assert {name: getattr(options, name) for name in DEFAULTS} == DEFAULTS
    assert (options.images, options.on_test, options.shuffled) == (32, False, True)
    assert options_of_command(parsed()) == options_of_hook({}) == options


@pytest.mark.parametrize(
    ('args', 'given'),
    [
        (['--no-eval'], dict(evaluate=False)),
        (['--no-float-eval'], dict(float_eval=False)),
        (['--float-eval'], dict(float_eval=True)),
        (['--paper-protocol'], dict(as_in_paper=True)),
        (['--calib-images', '7', '--seed', '3'], dict(calib_images=7, seed=3)),
        (
            ['--calib-on-test', '--pack', '--resume'],
            dict.fromkeys(['calib_on_test', 'pack', 'resume'], True),
        ),
        (['--wait-time', '0.5'], dict(wait_time=0.5)),
        (['--work-dir', 'out', '--show-dir', 'x'], dict(work_dir='out', show_dir='x')),
        (
            ['--backend', 'integer', '--launcher', 'slurm'],
            dict(backend='integer', launcher='slurm'),
        ),
        (['--cfg-options', 'a.b=1', 'c=x'], dict(cfg_options={'a.b': 1, 'c': 'x'})),
        (['--method', 'minmax', '--w-bits', '8'], dict(method='minmax', w_bits=8)),
    ],
)
def test_the_command_line_gives_the_same_options_as_a_call(args, given):
    assert parsed(*args) == given
    assert options_of_command(parsed(*args)) == options_of_call(given)


@pytest.mark.parametrize(
    ('given', 'call', 'command'),
    [
        (dict(seed=-1), 'seed -1: it is a number', '--seed -1: it is a number'),
        (dict(seed=2**63), 'seed 9223', '--seed 9223'),
        (dict(calib_images='many'), "calib_images='many'", "--calib-images='many'"),
        (dict(as_in_paper=3), 'as_in_paper=3', '--paper-protocol=3'),
        (
            dict(scope='head'),
            "unknown scope 'head': it is one of backbone, model",
            '--scope',
        ),
        (
            dict(w_bits=4),
            'go with method',
            '--w-bits, --a-bits and --softmax-bits go with --method',
        ),
        (
            dict(recipe='a', method='b'),
            'give recipe, or method',
            'give --recipe, or --method',
        ),
        (
            dict(as_in_paper=True, calib_images=2),
            'drop calib_images',
            'drop --calib-images',
        ),
        (
            dict(as_in_paper=True, calib_cfg='a.py'),
            'calib_cfg has no',
            '--calib-cfg has no',
        ),
        (dict(evaluate=False, backend='integer'), 'it is not to be', 'it is not to be'),
    ],
)
def test_errors_name_options_as_they_were_written(given, call, command):
    for door, part in ((options_of_call, call), (options_of_command, command)):
        with pytest.raises(QuantizationError) as error:
            door(given)
        assert part in str(error.value)


def test_a_hook_has_options_of_its_own_names():
    options = options_of_hook(
        dict(images=3, on_test=True, shuffle=False, dataset=dict(type='D'))
    )
    assert (options.images, options.on_test, options.shuffled) == (3, True, False)
    assert options_of_hook(options.of_hook()) == options
    assert options_of_hook(
        options_of_call(dict(as_in_paper=True)).of_hook()
    ).of_hook() == dict(
        images=2,
        seed=0,
        on_test=True,
        shuffle=False,
        resume=False,
        pack=False,
        backend='simulated',
        dataset=None,
    )
    for given, part in (
        (dict(images='x'), "images='x'"),
        (dict(image=1), 'no option image; it has'),
    ):
        with pytest.raises(QuantizationError, match=part):
            options_of_hook(given)


def test_an_unknown_option_is_refused_and_options_do_not_change():
    with pytest.raises(QuantizationError, match='no option colour'):
        options_of_call(dict(colour=1))
    with pytest.raises(Exception, match='frozen'):
        options_of_call({}).seed = 1


def test_method_and_bits_are_a_recipe():
    named = options_of_call(dict(method='minmax', w_bits=8, a_bits=6)).asked_recipe()
    assert named['name'] == 'minmax_w8a6' and named['bits']['weight'] == 8
    assert (
        options_of_call(dict(method='minmax')).asked_recipe()['name'] == 'minmax_w4a4'
    )
    assert options_of_call(dict(recipe='uqvit_w4a4')).asked_recipe() == 'uqvit_w4a4'


def test_every_option_says_what_it_does_and_has_one_name_at_each_door():
    assert all(field.description for field in Options.model_fields.values())
    for names in (FLAGS, HOOK_NAMES):
        assert len(set(names.values())) == len(names)
