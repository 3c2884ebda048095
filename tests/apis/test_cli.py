"""The command line: what it accepts, and one clear line with exit code 2 for what it
does not.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmptq.arguments import add_quantize_arguments
from mmptq.cli import main

from .conftest import FEW, ROOT


@pytest.fixture
def run(upernet, tmp_path, capsys):
    """Runs ``mmptq quantize`` on the demo and returns exit code and standard error."""

    def call(
        *args,
        config=upernet.config,
        checkpoint=upernet.checkpoint,
        work_dir=tmp_path / 'out',
    ):
        code = main(
            [
                'quantize',
                str(config),
                str(checkpoint),
                '--work-dir',
                str(work_dir),
                '--no-eval',
                '--calib-images',
                '1',
                *args,
                '--cfg-options',
                *(f'{key}={value}' for key, value in FEW.items()),
            ]
        )
        return code, capsys.readouterr().err

    return call


def is_one_line(error, *parts):
    lines = [line for line in error.splitlines() if line.startswith('mmptq: error:')]
    return (
        len(lines) == 1
        and all(part in lines[0] for part in parts)
        and 'Traceback' not in error
    )


@pytest.mark.parametrize(
    'args, parts',
    [
        (['--recipe', 'nonsense_w4a4'], ['nonsense_w4a4', 'adalog', 'minmax']),
        (['--recipe', 'adalog'], ['METHOD_wXaY']),
        (['--recipe', 'adalog_w1a4'], ['1 bits', '2 to 8']),
        (['--recipe', 'adalog_w4a9'], ['9 bits', '2 to 8']),
        (['--recipe', 'no_such_file.py'], ['no_such_file.py', 'does not exist']),
        (['--method', 'nonsense'], ['nonsense', 'adalog']),
        (['--recipe', 'adalog_w4a4_slow'], ['adalog_w4a4_slow', 'adalog_fast']),
        (['--method', 'minmax', '--w-bits', '16'], ['16 bits']),
        (['--method', 'minmax', '--softmax-bits', '1'], ['1 bits']),
        (['--softmax-bits', '4'], ['--method']),
        (['--w-bits', '4'], ['--method']),
        (['--method', 'minmax', '--recipe', 'minmax_w4a4'], ['not both']),
        (
            ['--keep-float', 'backbone.patch_embed'],
            [
                "'backbone.patch_embed'",
                'matches no layer',
                'backbone.patch_embed.projection',
            ],
        ),
        (['--keep-float', '*'], ['leaves all layers', 'float']),
        (
            ['--layer-bits', 'backbone.stages.*=9,4'],
            ["'backbone.stages.*'", 'bits of weight', '9'],
        ),
        (
            ['--layer-bits', 'stages.4.*=8,8'],
            ["'stages.4.*'", 'matches no layer', 'stages.'],
        ),
        (
            ['--recipe', 'adalog_w4a4', '--paper-protocol'],
            ['--paper-protocol', 'drop --calib-images'],
        ),
        (['--calib-images', '0'], ['empty']),
        (['--calib-images', '-3'], ['empty']),
        (['--seed', '-1'], ['seed -1']),
        (['--calib-cfg', 'absent.py'], ['absent.py', 'does not exist']),
    ],
)
def test_wrong_arguments_end_at_once(run, args, parts, tmp_path):
    code, error = run(*args)
    assert code == 2 and is_one_line(error, *parts)
    assert not list(tmp_path.rglob('quantized.*')) and not list(
        tmp_path.rglob('summary.json')
    )


@pytest.mark.parametrize(
    'text', ['backbone.*', '=8,8', 'a=', 'a=8', 'a=8,8,8,8', 'a=w,a', 'a=8;8']
)
def test_bits_of_layers_that_are_not_written_so(run, text, capsys):
    with pytest.raises(SystemExit) as stop:
        run('--layer-bits', text)
    assert (
        stop.value.code == 2
        and f'{text!r} is not PATTERN=W,A or PATTERN=W,A,S' in capsys.readouterr().err
    )


def test_wrong_files_are_named(run, upernet, tmp_path):
    assert is_one_line(run(config='absent.py')[1], 'absent.py', 'does not exist')
    assert is_one_line(run(checkpoint='absent.pth')[1], 'absent.pth', 'does not exist')
    broken = tmp_path / 'broken.py'
    broken.write_text('model = dict(\n')
    assert is_one_line(run(config=broken)[1], 'broken.py')
    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes(Path(upernet.checkpoint).read_bytes()[:10000])
    assert is_one_line(run(checkpoint=truncated)[1], 'truncated.pth')
    no_weights = tmp_path / 'list.pth'
    torch.save([1, 2], no_weights)
    assert is_one_line(run(checkpoint=no_weights)[1], 'list.pth', 'state_dict')


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil_was_here',)


def test_a_checkpoint_with_code_is_not_executed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {}, 'meta': Evil()}, tmp_path / 'evil.pth')
    code, error = run(checkpoint=tmp_path / 'evil.pth')
    assert (
        code == 2
        and is_one_line(error, 'evil.pth', 'cannot be read safely: it names')
        and not (tmp_path / 'evil_was_here').exists()
    )


def test_checkpoint_of_another_model_is_refused(run, tmp_path):
    code, error = run(checkpoint=ROOT / 'demo' / 'mask-rcnn_swin-demo.pth')
    assert code == 2 and is_one_line(error, 'another model', 'decode_head')


def test_weights_that_are_not_finite_name_the_layer(run, upernet, tmp_path):
    checkpoint = torch.load(upernet.checkpoint, weights_only=True)
    checkpoint['state_dict']['backbone.stages.1.blocks.0.ffn.layers.1.weight'][0, 0] = (
        float('nan')
    )
    torch.save(checkpoint, tmp_path / 'nan.pth')
    code, error = run(checkpoint=tmp_path / 'nan.pth')
    assert code == 2 and is_one_line(
        error, 'backbone.stages.1.blocks.0.ffn.layers.1.weight', 'NaN'
    )


def test_activations_that_are_not_finite_name_the_layer(run, upernet, tmp_path):
    checkpoint = torch.load(upernet.checkpoint, weights_only=True)
    name = 'backbone.stages.1.blocks.0.ffn.layers.0.0.weight'
    weight = checkpoint['state_dict'][name].float()
    checkpoint['state_dict'][name] = weight / weight.abs().max() * 3e38
    torch.save(checkpoint, tmp_path / 'inf.pth')
    code, error = run(checkpoint=tmp_path / 'inf.pth')
    assert (
        code == 2
        and is_one_line(error, 'stages.1.blocks.0.ffn.layers.1', 'infinite')
        and not list(tmp_path.rglob('quantized.pth'))
    )


def test_backbone_without_a_spec_lists_the_known_ones(run, upernet, tmp_path):
    config = tmp_path / 'resnet.py'
    config.write_text(
        f'_base_ = {upernet.config!r}\nmodel = dict(backbone=dict(_delete_=True,'
        " type='ResNet', depth=18))\n"
    )
    code, error = run(config=config)
    assert code == 2 and is_one_line(
        error,
        'ResNet',
        'mmdet.SwinTransformer',
        'mmseg.VisionTransformer',
        'BackboneSpec',
    )


@pytest.mark.parametrize(
    ('change', 'part'),
    [
        ('model.backbone.embed_dims.x=1', 'embed_dims'),
        ('test_dataloader.dataset.pipeline.99.type=x', '99'),
        ('model.backbone=3', 'no model with a backbone'),
    ],
)
def test_changes_of_a_config_that_do_not_fit_it(
    upernet, tmp_path, capsys, change, part
):
    assert (
        main(
            [
                'quantize',
                upernet.config,
                upernet.checkpoint,
                '--work-dir',
                str(tmp_path),
                '--cfg-options',
                change,
            ]
        )
        == 2
    )
    assert is_one_line(capsys.readouterr().err, part)


def test_a_change_without_a_value(upernet, capsys):
    with pytest.raises(SystemExit) as end:
        main(['quantize', upernet.config, upernet.checkpoint, '--cfg-options', 'model'])
    assert (
        end.value.code == 2
        and "--cfg-options: 'model' is not key=value" in capsys.readouterr().err
    )


def test_config_without_a_model_or_quantized_already(run, upernet, tmp_path):
    config = tmp_path / 'nothing.py'
    config.write_text(
        f'_base_ = {upernet.config!r}\nmodel = dict(_delete_=True,'
        ' type="EncoderDecoder")\n'
    )
    assert is_one_line(run(config=config)[1], 'no model with a backbone')
    for model in (
        "backbone=dict(_delete_=True, type='mmptq.QuantBackbone')",
        "_delete_=True, type='mmptq.QuantModel', model={}",
    ):
        config.write_text(f'_base_ = {upernet.config!r}\nmodel = dict({model})\n')
        assert is_one_line(run(config=config)[1], 'quantized already')


def test_empty_or_unreadable_calibration_data(run, upernet, tmp_path):
    data = Config.fromfile(upernet.config).train_dataloader.dataset
    images, masks = tmp_path / 'data' / 'images', tmp_path / 'data' / 'masks'
    images.mkdir(parents=True)
    masks.mkdir()
    config = tmp_path / 'calib.py'
    dataset = dict(
        data.to_dict(),
        data_root=str(tmp_path / 'data'),
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
    )
    config.write_text(f'train_dataloader = dict(dataset={dataset!r})\n')
    assert is_one_line(run('--calib-cfg', str(config))[1], 'empty')
    (images / 'broken.jpg').write_bytes(b'no image')
    import cv2

    cv2.imwrite(str(masks / 'broken.png'), np.ones((8, 8), np.uint8))
    code, error = run('--calib-cfg', str(config))
    assert code == 2 and is_one_line(error, 'broken.jpg', 'cannot be read')


@pytest.mark.parametrize(
    'text, part',
    [
        ('recipe = [1]', 'dict'),
        ('recipe = dict(name=[1])', 'name'),
        ('nothing = 1', 'does not define'),
    ],
)
def test_recipe_files_that_hold_no_recipe(run, tmp_path, text, part):
    (tmp_path / 'recipe.py').write_text(text + '\n')
    assert is_one_line(run('--recipe', str(tmp_path / 'recipe.py'))[1], part)


def test_config_with_an_unknown_argument_or_type(run, upernet, tmp_path):
    config = tmp_path / 'typo.py'
    for text in (
        'model = dict(colour=1)',
        *(
            f'{kind}_dataloader = dict(dataset=dict(colour=1))'
            for kind in ('train', 'test')
        ),
    ):
        config.write_text(f'_base_ = {upernet.config!r}\n{text}\n')
        assert is_one_line(run(config=config)[1], 'cannot be built', 'colour')


def test_data_of_the_config_that_is_not_there(run, upernet, tmp_path):
    config = tmp_path / 'moved.py'
    config.write_text(f"""_base_ = {upernet.config!r}
test_dataloader = dict(dataset=dict(type='mmdet.CocoDataset', ann_file='/absent/val.json', _delete_=True, pipeline=[]))
custom_imports = dict(imports=['mmdet.datasets', 'mmseg.models', 'mmseg.datasets', 'mmseg.evaluation'])
""")
    code, error = run(config=config)
    assert code == 2 and is_one_line(error, 'test data set', 'absent')


def test_work_dir_that_cannot_be_written_to(run, tmp_path):
    (tmp_path / 'file').write_text('')
    code, error = run(work_dir=tmp_path / 'file' / 'below')
    assert code == 2 and is_one_line(error, 'cannot be written', '--work-dir')


def test_too_little_memory_is_said_before_the_machine_suffers(
    run, monkeypatch, tmp_path
):
    monkeypatch.setattr('mmptq.engine.memory.available', lambda: 1000)
    code, error = run()
    assert code == 2 and is_one_line(error, 'too little memory', '--calib-images')
    assert not list(tmp_path.rglob('quantized.pth'))


@pytest.mark.parametrize(
    ('command', 'more'),
    [('quantize', True), ('pack', False), ('convert-checkpoint', False)],
)
def test_an_interrupted_command_says_how_to_go_on_if_it_can(
    command, more, monkeypatch, capsys
):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f'mmptq.cli.{command.replace("-", "_")}', stop)
    assert main([command, 'first', 'second']) == 130
    error = capsys.readouterr().err
    assert error.startswith('mmptq: interrupted') and ('--resume' in error) == more


def test_arguments_are_a_superset_of_mmdets_test_tool():
    import argparse

    import mmdet

    parser = argparse.ArgumentParser()
    add_quantize_arguments(parser)
    ours = {
        option
        for action in parser._actions
        for option in action.option_strings or [action.dest]
    }
    package = Path(mmdet.__file__).parent
    tool = next(
        path
        for path in (
            package / '.mim' / 'tools' / 'test.py',
            package.parent / 'tools' / 'test.py',
        )
        if path.exists()
    )
    calls = [
        node
        for node in ast.walk(ast.parse(tool.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, 'attr', '') == 'add_argument'
    ]
    theirs = {arg.value for node in calls for arg in node.args}
    assert theirs and theirs <= ours


def test_the_tool_the_console_command_and_their_output(upernet, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    args = [
        upernet.config,
        upernet.checkpoint,
        '--method',
        'minmax',
        '--w-bits',
        '8',
        '--a-bits',
        '6',
        '--no-float-eval',
        '--calib-images',
        '2',
        '--cfg-options',
        'test_dataloader.dataset.indices=3',
    ]
    commands = {
        'tool': [sys.executable, str(ROOT / 'tools' / 'quantize.py')],
        'mmptq': [str(Path(sys.executable).parent / 'mmptq'), 'quantize'],
    }
    summaries = []
    for name, command in commands.items():
        done = subprocess.run(
            [*command, *args, '--work-dir', str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert (
            'minmax_w8a6' in done.stdout
            and '8/6/6' in done.stdout
            and 'scope backbone' in done.stdout
        )
        assert (
            'calibrated [1/' in done.stdout + done.stderr
            and 'eta' in done.stdout + done.stderr
        )
        summaries.append(json.loads((tmp_path / name / 'summary.json').read_text()))
    assert (
        summaries[0]['layers'] == summaries[1]['layers']
        and summaries[0]['float'] is None
    )
    commands['module'] = [sys.executable, '-m', 'mmptq', 'quantize']
    for command in (commands['tool'], commands['module']):
        done = subprocess.run(
            [*command, upernet.config, 'absent.pth'],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and is_one_line(done.stderr, 'absent.pth')
