"""No file runs anything, through no door: what is wrong is refused by name, before long
work.
"""

import pickle
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmptq import QuantizationError
from mmptq.apis import export, load_packed, pack, quantize
from mmptq.checkpoints.progress import checksum
from mmptq.cli import main

from .. import doctored
from ..conftest import fast

EVIL = f'import os\nos.system("{doctored.COMMAND}")\nrecipe = dict()\n'


@pytest.fixture(scope='module')
def honest(upernet, tmp_path_factory):
    """A quantized segmentor's files."""
    work_dir = tmp_path_factory.mktemp('honest')
    quantize(
        upernet.config,
        upernet.checkpoint,
        fast(),
        work_dir=str(work_dir),
        calib_images=2,
        evaluate=False,
        pack=True,
    )
    return work_dir


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which names of files may be found: modules, recipes and weights that
    leave a mark when they are run.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'evil.py').write_text(EVIL)
    torch.save(
        doctored.Calls(__import__('os').system, doctored.COMMAND), tmp_path / 'evil.pth'
    )
    for name in ('evil.pkl', 'pkl'):
        (tmp_path / name).write_bytes(
            pickle.dumps(doctored.Calls(__import__('os').system, doctored.COMMAND))
        )
    yield tmp_path
    assert not (tmp_path / doctored.MARK).exists()


def by_quantize(config, path, place):
    quantize(config, path, work_dir=str(place / 'out'), evaluate=False)


def by_command(config, path, place):
    """Exit code 2 is a refusal by a message; anything else that is not 0 would be a
    traceback.
    """
    code = main(
        [
            'quantize',
            str(config),
            str(path),
            '--work-dir',
            str(place / 'out'),
            '--no-eval',
        ]
    )
    if code == 2:
        raise QuantizationError(str(path))


def by_pack(config, path, place):
    pack(config, path, str(place / 'out.safetensors'))


def by_export(config, path, place):
    export(config, path, str(place / 'out.onnx'), (8, 8))


def by_load_packed(config, path, place):
    load_packed(path)


def by_load_packed_with_config(config, path, place):
    load_packed(path, config)


def by_stock_runner(config, path, place):
    """As the stock test tools do it, with the config that was written beside the honest
    file.
    """
    cfg = Config.fromfile(Path(config).parent / 'quantized.py')
    cfg.work_dir, cfg.load_from = str(place / 'out'), str(path)
    Runner.from_cfg(cfg).load_or_resume()


def by_init_model(config, path, place):
    from mmseg.apis import init_model

    init_model(str(Path(config).parent / 'quantized.py'), str(path), device='cpu')


DOORS = {
    '.pth': [by_quantize, by_pack, by_stock_runner, by_init_model],
    '.safetensors': [
        by_quantize,
        by_export,
        by_load_packed,
        by_load_packed_with_config,
        by_stock_runner,
    ],
}
ALL_DOORS = {
    '.pth': [*DOORS['.pth'], by_command, by_export],
    '.safetensors': [*DOORS['.safetensors'], by_command, by_init_model],
}


@pytest.fixture
def config(honest, upernet):
    """The float model's own config, beside the quantized one."""
    path = honest / 'float.py'
    if not path.exists():
        Config.fromfile(upernet.config).dump(path)
    return str(path)


def refused(doors, config, path, place):
    """Every door refuses a file, by its name, in one line that a terminal can show."""
    for door in doors:
        with pytest.raises(QuantizationError) as error:
            door(config, str(path), place)
        message = str(error.value)
        # mmengine does not say which file it loads; then the key is named.
        named = path.stem in message or (
            door is by_init_model and re.search(r'backbone\.|stages\.', message)
        )
        assert named, f'{door.__name__}: {message}'
        assert message.isprintable() and len(message) < 1500
        assert not re.search(
            r'safe_globals|file an issue|weights_only|0x[0-9a-f]{6}', message
        )


@pytest.mark.parametrize('name', doctored.BYTES)
def test_doctored_archives_are_refused(name, honest, config, place):
    whole = (honest / 'quantized.pth').read_bytes()
    content = torch.load(honest / 'quantized.pth', weights_only=True)
    path = place / 'doctored.pth'
    path.write_bytes(doctored.BYTES[name](whole, content))
    refused(ALL_DOORS['.pth'] if 'call' in name else DOORS['.pth'], config, path, place)


@pytest.mark.parametrize('suffix', DOORS)
@pytest.mark.parametrize('name', doctored.CONTENT)
def test_doctored_content_is_refused(name, suffix, honest, config, place):
    change, path = doctored.CONTENT[name], place / f'doctored{suffix}'
    make = doctored.changed_pth if suffix == '.pth' else doctored.changed_packed
    path.write_bytes(make(honest / f'quantized{suffix}', change))
    refused(
        ALL_DOORS[suffix] if 'as method' in name else DOORS[suffix], config, path, place
    )


@pytest.mark.parametrize('name', doctored.MODELS)
def test_models_from_files_are_built_from_a_list(name, honest, config, place):
    path = place / 'doctored.safetensors'
    path.write_bytes(
        doctored.changed_packed(
            honest / 'quantized.safetensors', model=doctored.MODELS[name]
        )
    )
    refused([by_load_packed], config, path, place)
    load_packed(path, config)  # the file's own model has no say


def test_a_package_beside_the_file_is_not_imported(honest, config, place, capfd):
    (place / 'mmpretrain').mkdir()
    (place / 'mmpretrain' / '__init__.py').write_text(EVIL)
    path = place / 'doctored.safetensors'

    def of_mmpretrain(content):
        content['backbone']['type'] = 'mmpretrain.VisionTransformer'

    path.write_bytes(
        doctored.changed_packed(honest / 'quantized.safetensors', model=of_mmpretrain)
    )
    refused([by_load_packed], config, path, place)


def test_names_of_tensors_do_not_reach_the_terminal(honest, config, place, capfd):
    path = place / 'doctored.safetensors'
    change = doctored.holds(doctored.NORM, lambda x: x)
    path.write_bytes(
        doctored.changed_packed(
            honest / 'quantized.safetensors',
            lambda state, made: [
                change(state, made),
                state.update({doctored.ESCAPE: torch.zeros(1)}),
            ],
        )
    )
    refused(DOORS['.safetensors'], config, path, place)
    assert '\x1b[2J' not in ''.join(capfd.readouterr())


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_stock_tools_compare_recipe_and_scope(suffix, honest, config, place):
    def other(state, made):
        made['bits'].update(activation=8)
        made['recipe']['bits'].update(activation=8)

    make = doctored.changed_pth if suffix == '.pth' else doctored.changed_packed
    path = place / f'doctored{suffix}'
    for change in (other, doctored.says(('scope',), 'model')):
        path.write_bytes(make(honest / f'quantized{suffix}', change))
        for door in (by_init_model, by_stock_runner):
            with pytest.raises(QuantizationError, match='was quantized with recipe'):
                door(config, str(path), place)


def test_a_config_in_a_checkpoint_is_not_run_on_resume(honest, config, place):
    content = torch.load(honest / 'quantized.pth', weights_only=True)
    path = place / 'doctored.pth'
    path.write_bytes(doctored.HARMLESS['a program as config'](None, content))
    cfg = Config.fromfile(honest / 'quantized.py')
    cfg.work_dir, cfg.load_from, cfg.resume = str(place / 'out'), str(path), True
    runner = Runner.from_cfg(cfg)
    try:
        runner.load_or_resume()
    except (KeyError, AttributeError):  # it has no state of a training
        pass


def test_damaged_safetensors_are_refused(honest, config, place):
    path = place / 'doctored.safetensors'
    for content in doctored.packed_bytes(honest / 'quantized.safetensors').values():
        path.write_bytes(content)
        refused(ALL_DOORS['.safetensors'], config, path, place)


@pytest.mark.parametrize('name', doctored.HARMLESS)
def test_what_no_one_needs_is_passed_over(name, honest, config, place):
    content = torch.load(honest / 'quantized.pth', weights_only=True)
    path = place / 'doctored.pth'
    path.write_bytes(doctored.HARMLESS[name](None, content))
    for door in (by_quantize, by_pack, by_stock_runner, by_init_model):
        door(config, str(path), place)


def test_honest_files_pass_every_door(honest, config, place):
    for suffix, doors in ALL_DOORS.items():
        for door in [door for door in doors if door is not by_export]:  # below
            door(config, str(honest / f'quantized{suffix}'), place)
    export(config, str(honest / 'quantized.pth'), str(place / 'out.onnx'), (64, 64))


# Progress of an interrupted run, whose checksum anyone can make.


def forged(key, change):
    """A change of one block's entry."""
    return lambda blocks: blocks[-1].update({key: change(blocks[-1][key])})


def params(name, change):
    return forged('params', lambda found: {**found, name: change(found[name])})


SCALE, ZERO = (
    f'{doctored.QKV.removeprefix("backbone.")}.input_quantizer.scale',
    'zero_point',
)
FORGED = {
    'a scale of another shape': params(SCALE, lambda x: x[None]),
    'a scale below zero': params(SCALE, torch.neg),
    'a scale that is not finite': params(SCALE, lambda x: x / 0),
    'a scale of whole numbers': params(SCALE, lambda x: x.ceil().int()),
    'a zero point that is no code': params(
        SCALE.replace('scale', ZERO), lambda x: x + 99
    ),
    'a parameter less': forged(
        'params', lambda found: {k: v for k, v in found.items() if k != SCALE}
    ),
    'a parameter more': forged(
        'params', lambda found: {**found, 'evil.scale': torch.ones(())}
    ),
    'a weight of another shape': forged(
        'params',
        lambda found: {
            **found,
            SCALE.replace('input_quantizer.scale', 'weight'): torch.ones(3),
        },
    ),
    'an operation less': forged('sqnr_db', lambda found: dict(list(found.items())[1:])),
    'an operation more': forged('sqnr_db', lambda found: {**found, 'evil': 1.0}),
    'a ratio as text': forged('sqnr_db', lambda found: dict.fromkeys(found, 'high')),
    'parameters as a list': forged('params', list),
    'a name as a number': forged('name', lambda name: 5),
    'a tensor without values': params(
        SCALE, lambda x: torch.zeros(1).expand(20000, 20000)
    ),
}


@pytest.fixture(scope='module')
def progress(upernet, tmp_path_factory):
    """The progress of a run that was killed after its second block, the first one with
    an attention.
    """
    work_dir = tmp_path_factory.mktemp('killed')
    with pytest.MonkeyPatch.context() as patch:
        from mmptq.engine import calibration

        save = calibration.save_progress

        def killed(path, identity, finished):
            save(path, identity, finished)
            if len(finished) == 2:
                raise KeyboardInterrupt

        patch.setattr(calibration, 'save_progress', killed)
        with pytest.raises(KeyboardInterrupt):
            run(upernet, work_dir)
    return work_dir / 'calibration_progress.pth'


def run(task, work_dir, **options):
    quantize(
        task.config,
        task.checkpoint,
        'minmax_w4a4',
        work_dir=str(work_dir),
        calib_images=2,
        evaluate=False,
        **options,
    )


@pytest.mark.parametrize('name', FORGED)
def test_forged_progress_is_refused(name, upernet, progress, place):
    content = torch.load(progress, weights_only=True)
    FORGED[name](content['blocks'])
    try:
        content['checksum'] = checksum(content['identity'], content['blocks'])
    except Exception:  # no one can make one, not we either
        content['checksum'] = 'x'
    torch.save(content, place / progress.name)
    with pytest.raises(QuantizationError, match=r'remove (it|the file)'):
        run(upernet, place, resume=True)


@pytest.mark.parametrize(
    'name',
    [
        'a call beside the weights',
        'a file of old torch with a call',
        'a bomb as pickle',
        'half of it',
    ],
)
def test_doctored_progress_runs_nothing(name, upernet, progress, place):
    content = torch.load(progress, weights_only=True)
    (place / progress.name).write_bytes(
        doctored.BYTES[name](progress.read_bytes(), content)
    )
    with pytest.raises(QuantizationError, match='remove it'):
        run(upernet, place, resume=True)


# Detectors, and the stock tool as its users start it.


@pytest.mark.parametrize(
    'name', ['a call beside the weights', 'a weight without values', 'a class as type']
)
def test_init_detector_refuses_as_well(name, mask_rcnn, tmp_path_factory, place):
    from mmdet.apis import init_detector

    work_dir = tmp_path_factory.mktemp('detector')
    quantize(
        mask_rcnn.config,
        mask_rcnn.checkpoint,
        'minmax_w8a8',
        work_dir=str(work_dir),
        calib_images=1,
        evaluate=False,
    )
    honest = work_dir / 'quantized.pth'
    init_detector(str(work_dir / 'quantized.py'), str(honest), device='cpu')
    content = torch.load(honest, weights_only=True)
    path = place / 'doctored.pth'
    path.write_bytes(doctored.BYTES[name](honest.read_bytes(), content))
    with pytest.raises(QuantizationError, match='doctored'):
        init_detector(str(work_dir / 'quantized.py'), str(path), device='cpu')
