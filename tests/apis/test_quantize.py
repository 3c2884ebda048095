"""The whole road on the bundled demo: what lands in the work_dir, and that it is what
it says.
"""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.models.backbones.swin import WindowMSA

from mmptq import QuantizationError
from mmptq.apis import load_packed, load_recipe, pack, quantize
from mmptq.checkpoints.reading import load_file, safe_loading
from mmptq.engine import loading as LOADING
from mmptq.engine.lock import locked
from mmptq.layers import QuantOp
from mmptq.quantizers import Quantizer
from mmptq.wrapping.configs import quantized_config

from ..conftest import fast
from .conftest import FEW, SHARED, stock_tool


def stock_test(cfg, checkpoint, work_dir):
    """What a Runner without a word of mmptq in this file makes of a config and a
    checkpoint.
    """
    cfg.work_dir, cfg.load_from = str(work_dir), str(checkpoint)
    with safe_loading():
        runner = Runner.from_cfg(cfg)
        return runner, runner.test()


def test_float_metrics_are_those_of_the_stock_runner(task, quantized, tmp_path):
    _, summary = quantized
    cfg = Config.fromfile(task.config)
    cfg.merge_from_dict(FEW)
    _, metrics = stock_test(cfg, task.checkpoint, tmp_path)
    assert summary['float']['metrics'] == {
        name: float(value) for name, value in metrics.items()
    }
    assert summary['float']['seconds'] > 0


def test_summary_on_disk_is_the_one_returned_and_complete(task, quantized):
    work_dir, summary = quantized
    assert json.loads((work_dir / 'summary.json').read_text()) == summary
    assert summary['bits'] == dict(weight=4, activation=4, softmax=4)
    assert (
        summary['scope'] == 'backbone'
        and summary['method'] == 'MinMax'
        and summary['recipe']['name'] == 'minmax_w4a4'
    )
    calibration = summary['calibration']
    assert (
        calibration['images'] == 3
        and calibration['split'] == 'train'
        and calibration['seed'] == 0
        and calibration['leak'] is False
    )
    assert calibration['seconds'] > 0 and calibration['peak_memory_mib'] > 0
    assert (
        task.headline in summary['quantized']['metrics']
        and summary['quantized']['seconds'] > 0
    )
    assert summary['size']['quantized_mib'] < summary['size']['float_mib']
    assert not (work_dir / 'calibration_progress.pth').exists()


def test_every_layer_has_a_row_with_its_quantizer_or_its_reason(quantized, tmp_path):
    work_dir, summary = quantized
    cfg = Config.fromfile(work_dir / 'quantized.py')
    cfg.work_dir = str(tmp_path)
    model = Runner.from_cfg(cfg).model
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(
            module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
        )
    }
    rows = {row['name']: row for row in summary['layers']}
    products = {name for name, row in rows.items() if row['kind'] == 'matmul'}
    assert set(rows) == layers | products
    for name, row in rows.items():
        if name.startswith('backbone.'):
            assert row['reason'] is None and row['sqnr_db'] > 0 and row['site']
            assert set(row['bits'].values()) <= {4, 8} and set(
                row['quantizer'].values()
            ) == {'UniformQuantizer'}
        else:
            assert row['reason'] == 'outside_of_scope' and row['bits'] is None
    assert rows['backbone.patch_embed.projection']['bits'] == dict(input=8, weight=4)
    depth = sum(model.backbone.stages[i].blocks.__len__() for i in range(4))
    assert len(products) == 2 * depth


def test_reloaded_model_is_equal_to_the_last_bit_and_does_not_calibrate(
    task, quantized, tmp_path, caplog
):
    work_dir, summary = quantized
    runner, metrics = stock_test(
        Config.fromfile(work_dir / 'quantized.py'), work_dir / 'quantized.pth', tmp_path
    )
    assert {name: float(value) for name, value in metrics.items()} == summary[
        'quantized'
    ]['metrics']
    again = json.loads((tmp_path / 'summary.json').read_text())
    assert (
        again['calibration'] == summary['calibration']
        and again['layers'] == summary['layers']
    )
    state = torch.load(work_dir / 'quantized.pth', weights_only=True)['state_dict']
    loaded = runner.model.state_dict()
    assert loaded.keys() == state.keys() and all(
        torch.equal(loaded[name], state[name]) for name in state
    )
    x = torch.randn(1, 3, 75, 110)
    runner.model.eval()
    first = [f.clone() for f in runner.model.backbone(x)]
    assert all(
        torch.equal(a, b) for a, b in zip(first, runner.model.backbone(x), strict=True)
    )
    for module in runner.model.modules():
        if isinstance(module, Quantizer):
            module.clear()
    assert not all(
        torch.equal(a, b) for a, b in zip(first, runner.model.backbone(x), strict=True)
    )


def test_quantized_config_belongs_to_no_run(task, quantized):
    cfg = Config.fromfile(quantized[0] / 'quantized.py')
    assert (
        'work_dir' not in cfg
        and 'load_from' not in cfg
        and cfg.model.backbone.type == 'mmptq.QuantBackbone'
    )
    assert str(quantized[0]) not in (quantized[0] / 'quantized.py').read_text()


def test_stock_test_tool_runs_on_the_quantized_config(task, quantized, tmp_path):
    work_dir, summary = quantized
    metrics, output = stock_tool(
        task.package, work_dir / 'quantized.py', work_dir / 'quantized.pth', tmp_path
    )
    assert 'no calibration' in output
    again = json.loads((tmp_path / 'summary.json').read_text())['quantized']['metrics']
    assert again == metrics and metrics[task.headline] == pytest.approx(
        summary['quantized']['metrics'][task.headline], abs=1e-3
    )


@pytest.mark.parametrize(
    'change, named',
    [
        (
            lambda state: state.pop(
                'backbone.patch_embed.projection.input_quantizer.scale'
            ),
            r'projection\.input_quantizer\.scale',
        ),
        (
            lambda state: state.update(
                {'backbone.norm3.input_quantizer.scale': torch.ones(())}
            ),
            'backbone.norm3.input_quantizer.scale',
        ),
        (
            lambda state: state.update(
                {
                    'backbone.stages.0.blocks.0.ffn.layers.1.rescale.shift': torch.ones(
                        ()
                    )
                }
            ),
            r'layers\.1\.rescale\.shift',
        ),
        (lambda state: state.pop('backbone.norm3.weight'), 'backbone.norm3.weight'),
        (
            lambda state: state.update({'backbone.norm3.weight': torch.ones(5)}),
            'backbone.norm3.weight',
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_by_key(
    quantized, tmp_path, change, named
):
    work_dir, _ = quantized
    checkpoint = torch.load(work_dir / 'quantized.pth', weights_only=True)
    change(checkpoint['state_dict'])
    torch.save(checkpoint, tmp_path / 'broken.pth')
    with pytest.raises(QuantizationError, match=named):
        stock_test(
            Config.fromfile(work_dir / 'quantized.py'),
            tmp_path / 'broken.pth',
            tmp_path,
        )


def test_calibrated_checkpoint_of_another_recipe_is_refused(task, quantized, tmp_path):
    work_dir, _ = quantized
    with pytest.raises(QuantizationError, match='minmax_w4a4'):
        quantize(
            task.config,
            str(work_dir / 'quantized.pth'),
            'minmax_w8a8',
            work_dir=str(tmp_path),
            cfg_options=FEW,
            float_eval=False,
        )


def test_quantized_checkpoint_with_its_own_recipe_is_only_evaluated(
    task, quantized, tmp_path
):
    work_dir, summary = quantized
    again = quantize(
        task.config,
        str(work_dir / 'quantized.pth'),
        'minmax_w4a4',
        work_dir=str(tmp_path),
        cfg_options=FEW,
        float_eval=False,
    )
    assert again['quantized']['metrics'] == summary['quantized']['metrics']


def test_scope_model_quantizes_neck_and_heads_and_says_so(task, tmp_path):
    summary = quantize(
        task.config,
        task.checkpoint,
        'minmax_w8a8',
        scope='model',
        work_dir=str(tmp_path),
        cfg_options=FEW,
        calib_images=2,
        float_eval=False,
    )
    assert summary['scope'] == 'model'
    rows = {row['name']: row for row in summary['layers']}
    left = {name: row['kind'] for name, row in rows.items() if row['bits'] is None}
    assert all(
        kind == 'ConvTranspose2d' or name.startswith('auxiliary_head.')
        for name, kind in left.items()
    )
    assert all(rows[name]['reason'] for name in left)
    assert sum(name.split('.')[0] != 'backbone' for name in rows) > 5
    with pytest.raises(QuantizationError, match='scope model'):
        quantize(
            task.config,
            str(tmp_path / 'quantized.pth'),
            'minmax_w8a8',
            scope='backbone',
            work_dir=str(tmp_path),
            cfg_options=FEW,
            float_eval=False,
            evaluate=False,
        )


def test_layers_that_receive_nothing_stay_float_and_are_listed(
    mask_rcnn, tmp_path, monkeypatch
):
    """A mask head where nothing is found: in the summary, the log, the config, resumed,
    packed and loaded again.
    """
    settings = dict(scope='model', calib_images=2, float_eval=False)
    nothing = {**FEW, 'model.test_cfg.rcnn.score_thr': 1.1}
    with monkeypatch.context() as patch:
        patch.setattr('mmptq.engine.calibration.calibrate', killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(
                mask_rcnn.config,
                mask_rcnn.checkpoint,
                'minmax_w8a8',
                work_dir=str(tmp_path),
                cfg_options=nothing,
                **settings,
            )
    summary = quantize(
        mask_rcnn.config,
        mask_rcnn.checkpoint,
        'minmax_w8a8',
        work_dir=str(tmp_path),
        cfg_options=nothing,
        resume=True,
        pack=True,
        evaluate=False,
        **settings,
    )
    idle = [row['name'] for row in summary['layers'] if row['reason'] == 'idle']
    prefix = 'roi_head.mask_head.'
    assert idle == [
        f'{prefix}convs.0.conv',
        f'{prefix}convs.1.conv',
        f'{prefix}conv_logits',
    ]
    assert [row['name'] for row in summary['layers'] if row['bits'] is None] == [
        *idle[:2],
        f'{prefix}upsample',
        idle[2],
    ]
    for log in tmp_path.rglob('*.log'):
        assert (
            f'{", ".join(idle)} received nothing in 2 calibration images and will stay'
            ' float' in log.read_text()
        )
    cfg = Config.fromfile(tmp_path / 'quantized.py')
    entries = [dict(pattern=name, float=True) for name in idle]
    assert (
        cfg.model.recipe.to_dict()['layers'] == summary['recipe']['layers'] == entries
        and 'idle' not in cfg.model
    )
    assert summary['recipe']['name'] == 'minmax_w8a8'
    cfg.merge_from_dict({'model.model.test_cfg.rcnn.score_thr': 0.05})
    runner, metrics = stock_test(
        cfg.copy(), tmp_path / 'quantized.pth', tmp_path / 'again'
    )
    left = [runner.model.get_submodule(name) for name in idle]
    assert all(
        isinstance(layer, torch.nn.Conv2d) and not isinstance(layer, QuantOp)
        for layer in left
    )
    assert metrics['coco/segm_mAP'] > 0.04  # all 100 images are counted
    again = quantize(
        mask_rcnn.config,
        str(tmp_path / 'quantized.pth'),
        work_dir=str(tmp_path / 'given'),
        cfg_options=FEW,
        **settings,
    )
    assert again['quantized']['metrics'] == {
        name: float(value) for name, value in metrics.items()
    }
    state = runner.model.state_dict()
    for model in (
        load_packed(tmp_path / 'quantized.safetensors'),
        load_packed(pack(mask_rcnn.config, str(tmp_path / 'quantized.pth'))),
    ):
        found = model.state_dict()
        assert found.keys() == state.keys() and all(
            torch.equal(found[f'{name}.weight'], state[f'{name}.weight'])
            for name in idle
        )
    MODELS.build(cfg.model).load_state_dict(
        state, strict=True
    )  # as where there is no hook
    with pytest.raises(QuantizationError, match='lacks parameters of quantizers'):
        MODELS.build(dict(cfg.model, recipe='minmax_w8a8')).load_state_dict(state)
    assert [row['reason'] for row in again['layers'] if row['name'] in idle] == [
        'idle'
    ] * 3
    named = quantize(
        mask_rcnn.config,
        str(tmp_path / 'quantized.pth'),
        'minmax_w8a8',
        work_dir=str(tmp_path / 'named'),
        cfg_options=FEW,
        **settings,
    )
    assert (
        named['layers'] == again['layers']
        and named['recipe'] == again['recipe'] == summary['recipe']
    )
    check_files_of_version_0_1_0(mask_rcnn, tmp_path, cfg, idle, again)


def check_files_of_version_0_1_0(task, work_dir, cfg, idle, expected):
    """Files whose recipes do not say which layers stay float load as before: the config
    had a list, the checkpoint rows with a reason.
    """
    settings = dict(scope='model', calib_images=2, float_eval=False, cfg_options=FEW)
    old = torch.load(work_dir / 'quantized.pth', weights_only=True)
    del old['meta']['mmptq']['recipe']['layers']
    path = work_dir / 'old.pth'
    torch.save(old, path)
    cfg = cfg.copy()
    del cfg.model.recipe['layers']
    cfg.model.idle = idle
    cfg.dump(work_dir / 'old.py')
    _, metrics = stock_test(
        Config.fromfile(work_dir / 'old.py'), path, work_dir / 'stock'
    )
    assert expected['quantized']['metrics'] == {
        name: float(value) for name, value in metrics.items()
    }
    for recipe in (None, 'minmax_w8a8'):
        found = quantize(
            task.config, str(path), recipe, work_dir=str(work_dir / 'old'), **settings
        )
        assert (
            found['quantized']['metrics'] == expected['quantized']['metrics']
            and found['layers'] == expected['layers']
        )
    load_packed(pack(str(work_dir / 'old.py'), str(path)))


def killed(*_, **__):
    raise KeyboardInterrupt


def test_single_layers_at_other_bits_and_in_float(upernet, tmp_path, monkeypatch):
    """In the report, the config, resumed from no file, packed, in integers, and loaded
    again by the same or no options.
    """
    monkeypatch.setattr(
        'mmptq.runtime.kernels.has_compiler', lambda: False
    )  # it takes seconds for each width
    mixed = dict(
        keep_float=['backbone.patch_embed.*', '*.w_msa.qk'],
        layer_bits={'stages.3.*': (8, 6), 'backbone.stages.0.*': (3, 8, 5)},
    )
    settings = dict(cfg_options=FEW, float_eval=False)
    summary = quantize(
        upernet.config,
        upernet.checkpoint,
        'minmax_w4a4',
        work_dir=str(tmp_path),
        calib_images=2,
        pack=True,
        **settings,
        **mixed,
    )
    assert summary['recipe']['name'] == 'minmax_w4a4_mixed' and summary['bits'] == dict(
        weight=4, activation=4, softmax=4
    )
    rows = {
        row['name'].removeprefix('backbone.'): row
        for row in summary['layers']
        if row['name'].startswith('backbone.')
    }
    kept = [name for name, row in rows.items() if row['reason'] == 'kept']
    assert sorted(kept) == [
        'patch_embed.projection',
        *sorted(name for name in rows if name.endswith('.qk')),
    ]
    assert rows['patch_embed.projection']['bits'] is None and rows[
        'stages.2.blocks.0.attn.w_msa.qk'
    ]['bits'] == dict(left=32, right=32)
    assert rows['stages.0.blocks.0.attn.w_msa.pv']['bits'] == dict(left=5, right=8)
    layers = {
        name: row['bits']
        for name, row in rows.items()
        if row['bits'] and 'weight' in row['bits']
    }
    expected = {'0': dict(input=8, weight=3), '3': dict(input=6, weight=8)}
    assert all(
        bits == expected.get(name.split('.')[1], dict(input=4, weight=4))
        for name, bits in layers.items()
    )

    runner, metrics = stock_test(
        Config.fromfile(tmp_path / 'quantized.py'),
        tmp_path / 'quantized.pth',
        tmp_path / 'stock',
    )
    assert {name: float(value) for name, value in metrics.items()} == summary[
        'quantized'
    ]['metrics']
    state, x = runner.model.state_dict(), torch.randn(1, 3, 75, 110)
    runner.model.eval()
    for model in (
        load_packed(tmp_path / 'quantized.safetensors'),
        load_packed(pack(upernet.config, str(tmp_path / 'quantized.pth'))),
    ):
        assert model.state_dict().keys() == state.keys()
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.backbone(x), runner.model.backbone(x), strict=True)
        )
    again = quantize(
        upernet.config,
        str(tmp_path / 'quantized.pth'),
        'minmax_w4a4',
        work_dir=str(tmp_path / 'again'),
        **settings,
        **mixed,
    )
    assert (
        again['layers'] == summary['layers']
        and again['quantized']['metrics'] == summary['quantized']['metrics']
    )
    integers = quantize(
        upernet.config,
        str(tmp_path / 'quantized.safetensors'),
        work_dir=str(tmp_path / 'int'),
        backend='integer',
        **settings,
    )
    assert {row['path'] for row in integers['layers'] if row['reason'] == 'kept'} == {
        'float',
        (
            'simulated: a product of Float and Float operands has no entry in'
            ' mmptq.runtime.matmul.PAIRS'
        ),
    }
    with pytest.raises(
        QuantizationError, match='was quantized with recipe minmax_w4a4_mixed'
    ):
        quantize(
            upernet.config,
            str(tmp_path / 'quantized.pth'),
            'minmax_w4a4',
            work_dir=str(tmp_path / 'other'),
            **settings,
        )


class OtherAttention(WindowMSA):
    def forward(self, x, mask=None):
        return super().forward(x, mask) @ torch.eye(x.shape[-1])


def test_an_attention_of_another_kind_is_refused_before_anything_is_evaluated(
    upernet, tmp_path, monkeypatch
):
    monkeypatch.setattr('mmseg.models.backbones.swin.WindowMSA', OtherAttention)
    monkeypatch.setitem(quantize.__globals__, 'evaluate_float', pytest.fail)
    with pytest.raises(QuantizationError, match='OtherAttention multiplies'):
        quantize(
            upernet.config,
            upernet.checkpoint,
            'minmax_w4a4',
            work_dir=str(tmp_path),
            cfg_options=FEW,
        )


def test_a_data_preprocessor_beside_the_model_goes_into_it():
    cfg = Config(
        dict(
            model=dict(type='A', backbone=dict(type='B')),
            data_preprocessor=dict(type='C'),
        )
    )
    wrapped = quantized_config(cfg, {}, 'model')
    assert (
        wrapped.model.model.data_preprocessor == dict(type='C')
        and 'data_preprocessor' not in wrapped
    )
    assert cfg.data_preprocessor == dict(type='C')


def test_killed_run_resumes_with_the_same_result(upernet, tmp_path, monkeypatch):
    from mmptq.methods import AdaLog

    settings = dict(cfg_options=FEW, calib_images=2, evaluate=False)
    whole = quantize(
        upernet.config,
        upernet.checkpoint,
        fast(),
        work_dir=str(tmp_path / 'whole'),
        **settings,
    )
    original, blocks = AdaLog.calibrate, []

    def killed_at_the_fourth(self, block):
        blocks.append(block.name)
        if len(blocks) == 4:
            raise KeyboardInterrupt
        return original(self, block)

    monkeypatch.setattr(AdaLog, 'calibrate', killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        quantize(
            upernet.config,
            upernet.checkpoint,
            fast(),
            work_dir=str(tmp_path / 'cut'),
            **settings,
        )
    assert not (tmp_path / 'cut' / 'quantized.pth').exists()
    resumed = quantize(
        upernet.config,
        upernet.checkpoint,
        fast(),
        work_dir=str(tmp_path / 'cut'),
        resume=True,
        **settings,
    )
    assert (
        blocks[4] == blocks[3] and len(set(blocks)) == len(blocks) - 1
    )  # begins again with the block that was cut
    assert resumed['layers'] == whole['layers']
    a, b = (
        torch.load(tmp_path / name / 'quantized.pth', weights_only=True)['state_dict']
        for name in ('whole', 'cut')
    )
    assert (
        all(torch.equal(a[name], b[name]) for name in a)
        and sum('.rescale.' in name for name in a) > 10
    )


def test_progress_of_another_run_is_not_taken_up(upernet, tmp_path, monkeypatch):
    from mmptq.methods import MinMax

    original = MinMax.calibrate

    def killed_at_once(self, block):
        if block.name != 'patch_embed':
            raise KeyboardInterrupt
        return original(self, block)

    settings = dict(
        work_dir=str(tmp_path), cfg_options=FEW, calib_images=2, evaluate=False
    )
    with monkeypatch.context() as patch:
        patch.setattr(MinMax, 'calibrate', killed_at_once)
        with pytest.raises(KeyboardInterrupt):
            quantize(upernet.config, upernet.checkpoint, 'minmax_w4a4', **settings)
    with pytest.raises(QuantizationError, match='another checkpoint, recipe, seed'):
        quantize(
            upernet.config,
            upernet.checkpoint,
            'minmax_w4a4',
            seed=1,
            resume=True,
            **settings,
        )


def test_leak_needs_its_flag_and_is_logged_and_recorded(upernet, tmp_path, caplog):
    test = Config.fromfile(upernet.config).test_dataloader.dataset.to_dict()
    options = {
        **FEW,
        'train_dataloader.dataset': {**test, 'indices': 6, '_delete_': True},
    }
    settings = dict(work_dir=str(tmp_path), calib_images=2, evaluate=False)
    with pytest.raises(QuantizationError, match='leak'):
        quantize(
            upernet.config,
            upernet.checkpoint,
            'minmax_w8a8',
            cfg_options=options,
            **settings,
        )
    summary = quantize(
        upernet.config,
        upernet.checkpoint,
        'minmax_w8a8',
        cfg_options=FEW,
        calib_on_test=True,
        **settings,
    )
    assert (
        summary['calibration']['leak'] is True
        and summary['calibration']['split'] == 'test'
    )
    assert 'leak' in ''.join(path.read_text() for path in tmp_path.rglob('*.log'))


def test_the_paper_protocol_is_said_to_leak(task, tmp_path):
    summary = quantize(
        task.config,
        task.checkpoint,
        'uqvit_w4a4',
        work_dir=str(tmp_path),
        cfg_options=FEW,
        scope='model',
        as_in_paper=True,
        evaluate=False,
    )
    calibration, rows = (
        summary['calibration'],
        {row['name']: row for row in summary['layers'] if row['bits']},
    )
    assert (
        calibration['leak']
        and calibration['images'] == 2
        and not calibration['shuffle']
        and calibration['split'] == 'test'
    )
    assert 'leak' in ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert (
        summary['recipe']['name'] == 'uqvit_w4a4_paper' and summary['scope'] == 'model'
    )
    assert all(
        row['bits']['input'] == 8 for row in rows.values() if row['kind'] == 'conv'
    )
    assert all(all(row['uniform'].values()) for row in rows.values())
    fc2 = {
        name.removesuffix('.weight_quantizer.scale')
        for name in load_file(str(tmp_path / 'quantized.pth'))['state_dict']
        if name.endswith('ffn.layers.1.weight_quantizer.scale')
    }
    state = load_file(str(tmp_path / 'quantized.pth'))['state_dict']
    assert fc2 and not any(f'{name}.rescale.scale' in state for name in fc2)


def test_the_paper_protocol_is_uqvits_and_on_evaluation_images(upernet, tmp_path):
    for recipe, options, part in (
        ('adalog_w4a4', {}, 'uqvit_wXaY, not adalog_w4a4'),
        ('uqvit_w4a4', dict(calib_cfg='any.py'), 'calib_cfg has no place in it'),
    ):
        with pytest.raises(QuantizationError, match=part):
            quantize(
                upernet.config,
                upernet.checkpoint,
                recipe,
                work_dir=str(tmp_path),
                as_in_paper=True,
                **options,
            )


def test_the_first_images_where_nothing_is_drawn(upernet):
    from mmengine.registry import init_default_scope

    from mmptq.engine.data import build_calibration_set, calibration_dataset

    init_default_scope('mmseg')
    dataset = calibration_dataset(Config.fromfile(upernet.config), on_test=True)
    first = build_calibration_set(dataset, 2, 0, [], True, shuffle=False)
    assert first.indices == [0, 1] and first.leak


def test_calibration_images_are_seeded_train_images_through_the_test_pipeline(
    upernet, tmp_path
):
    from mmengine.registry import init_default_scope

    from mmptq.engine.data import build_calibration_set, calibration_dataset

    cfg = Config.fromfile(upernet.config)
    init_default_scope('mmseg')
    dataset = calibration_dataset(cfg)
    assert (
        dataset['pipeline']
        == cfg.test_dataloader.dataset.to_dict()['pipeline']
        != cfg.train_dataloader.dataset.to_dict()['pipeline']
    )
    first, again, other = (
        build_calibration_set(dataset, 4, seed, [], False) for seed in (3, 3, 4)
    )
    assert first.paths == again.paths != other.paths and all(
        'train' in Path(path).parent.name for path in first.paths
    )
    batch = next(iter(first.batches()))
    assert batch['inputs'][0].shape[-2:] == batch['data_samples'][0].ori_shape


def test_calib_cfg_gives_the_data_set_where_the_config_has_none(upernet, tmp_path):
    options = {
        **FEW,
        'train_dataloader': None,
        'train_cfg': None,
        'optim_wrapper': None,
        'param_scheduler': None,
    }
    settings = dict(
        work_dir=str(tmp_path), cfg_options=options, calib_images=2, evaluate=False
    )
    with pytest.raises(QuantizationError, match='--calib-cfg'):
        quantize(upernet.config, upernet.checkpoint, 'minmax_w8a8', **settings)
    summary = quantize(
        upernet.config,
        upernet.checkpoint,
        'minmax_w8a8',
        calib_cfg=upernet.config,
        **settings,
    )
    assert summary['calibration']['images'] == 2


def test_python_objects_do_as_well_as_names(upernet, tmp_path):
    recipe = load_recipe('minmax_w4a4')
    recipe['bits']['softmax'] = 8
    summary = quantize(
        Config.fromfile(upernet.config),
        upernet.checkpoint,
        recipe,
        work_dir=str(tmp_path),
        cfg_options=FEW,
        calib_images=1,
        evaluate=False,
    )
    rows = [row for row in summary['layers'] if row['site'] == 'post_softmax/value']
    assert rows and all(row['bits'] == dict(left=8, right=4) for row in rows)


@pytest.mark.skipif(
    not (SHARED / 'zoo').exists(),
    reason='needs ../shared/zoo and ../shared/data, which are not part of the project',
)
@pytest.mark.parametrize(
    'name, metric',
    [
        ('upernet_deit-t_camvid', 'mIoU'),
        ('mask-rcnn_deit-t_pennfudan', 'coco/bbox_mAP'),
    ],
)
def test_stock_models_on_real_photographs(name, metric, tmp_path):
    summary = quantize(
        str(SHARED / 'zoo' / f'{name}.py'),
        str(SHARED / 'zoo' / f'{name}.pth'),
        fast(),
        work_dir=str(tmp_path),
        cfg_options={'test_dataloader.dataset.indices': 4},
        calib_images=2,
    )
    assert (
        summary['quantized']['metrics'][metric]
        > summary['float']['metrics'][metric] / 2
        > 0
    )
    assert summary['quantized']['metrics'] != summary['float']['metrics']
    assert all(
        row['reason'] is None or not row['name'].startswith('backbone.')
        for row in summary['layers']
    )


def test_a_config_with_the_backbone_wrapper_and_the_hook_needs_no_tool_of_ours(
    task, tmp_path
):
    cfg = Config.fromfile(task.config.replace('.py', '_adalog-w4a4.py'))
    assert cfg.model.backbone.recipe == 'adalog_w4a4'
    cfg.model.backbone.recipe = fast()
    cfg.merge_from_dict({**FEW, 'custom_hooks': [dict(type='mmptq.PTQHook', images=1)]})
    runner, metrics = stock_test(cfg, task.checkpoint, tmp_path / 'a')
    summary = json.loads((tmp_path / 'a' / 'summary.json').read_text())
    assert (
        summary['recipe']['name'] == 'adalog_w4a4'
        and summary['calibration']['images'] == 1
    )
    assert summary['quantized']['metrics'] == {
        name: float(value) for name, value in metrics.items()
    }
    kinds = {
        row['site']: row['quantizer'] for row in summary['layers'] if row['quantizer']
    }
    assert (
        kinds['post_gelu']['input']
        == kinds['post_softmax/value']['left']
        == 'AdaLogQuantizer'
    )
    again, same = stock_test(
        Config.fromfile(tmp_path / 'a' / 'quantized.py'),
        tmp_path / 'a' / 'quantized.pth',
        tmp_path / 'b',
    )
    assert same == metrics
    before, after = runner.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(value, after[key]) for key, value in before.items()
    )
    kept = [key for key in after if '.rescale.' in key]
    assert {key.rsplit('.', 1)[1] for key in kept} == {'scale', 'shift'}
    checkpoint = torch.load(tmp_path / 'a' / 'quantized.pth', weights_only=True)
    del checkpoint['state_dict'][kept[0]]
    torch.save(checkpoint, tmp_path / 'broken.pth')
    with pytest.raises(
        QuantizationError, match=kept[0].removeprefix('backbone.').replace('.', r'\.')
    ):
        stock_test(
            Config.fromfile(tmp_path / 'a' / 'quantized.py'),
            tmp_path / 'broken.pth',
            tmp_path / 'b',
        )


def test_the_given_config_is_not_changed_and_the_float_run_is_float(upernet, tmp_path):
    cfg = Config.fromfile(upernet.config)
    before = cfg.pretty_text
    settings = dict(cfg_options=FEW, calib_images=1)
    first = quantize(
        cfg, upernet.checkpoint, 'minmax_w3a3', work_dir=str(tmp_path / 'a'), **settings
    )
    assert cfg.pretty_text == before
    assert 'mmptq' not in next((tmp_path / 'a' / 'float').glob('*.py')).read_text()
    again = quantize(
        cfg,
        str(tmp_path / 'a' / 'quantized.pth'),
        'minmax_w3a3',
        work_dir=str(tmp_path / 'b'),
        **settings,
    )
    assert (
        again['float']['metrics']
        == first['float']['metrics']
        != again['quantized']['metrics']
        == first['quantized']['metrics']
    )


def test_predictions_are_those_of_the_quantized_model_and_not_part_of_its_config(
    upernet, tmp_path
):
    summary = quantize(
        upernet.config,
        upernet.checkpoint,
        'minmax_w4a4',
        work_dir=str(tmp_path / 'w'),
        cfg_options=FEW,
        calib_images=1,
        out=str(tmp_path / 'predictions'),
        show_dir=str(tmp_path / 'painted'),
    )
    assert (
        summary['float']
        and len(list((tmp_path / 'predictions').glob('*.png'))) == 6
        and list((tmp_path / 'painted').rglob('*.*g'))
    )
    text = (tmp_path / 'w' / 'quantized.py').read_text()
    assert (
        'predictions' not in text
        and 'painted' not in text
        and 'keep_results' not in text
    )


def test_a_half_calibrated_backbone_is_refused_without_the_hook_too(
    quantized, tmp_path
):
    work_dir, _ = quantized
    checkpoint = torch.load(work_dir / 'quantized.pth', weights_only=True)
    for key in [key for key in checkpoint['state_dict'] if '_quantizer' in key][:40]:
        del checkpoint['state_dict'][key]
    torch.save(checkpoint, tmp_path / 'half.pth')
    cfg = Config.fromfile(work_dir / 'quantized.py')
    cfg.custom_hooks = []
    with pytest.raises(QuantizationError, match='lacks parameters of quantizers'):
        stock_test(cfg, tmp_path / 'half.pth', tmp_path)


def test_a_validation_does_not_pass_off_the_float_model(upernet, tmp_path):
    cfg = Config.fromfile(upernet.config.replace('.py', '_adalog-w4a4.py'))
    cfg.work_dir, cfg.load_from = str(tmp_path), upernet.checkpoint
    with safe_loading(), pytest.raises(QuantizationError, match='not calibrated'):
        Runner.from_cfg(cfg).val()


def test_hooks_of_the_config_do_not_get_in_the_way(upernet, tmp_path):
    settings = dict(work_dir=str(tmp_path), calib_images=1, evaluate=False)
    own = {'custom_hooks': [dict(type='mmptq.PTQHook', images=3)]}
    assert (
        quantize(
            upernet.config,
            upernet.checkpoint,
            'minmax_w4a4',
            cfg_options={**FEW, **own},
            **settings,
        )['calibration']['images']
        == 1
    )
    assert not (tmp_path / 'calibration_progress.pth').exists()
    with pytest.raises(QuantizationError, match='EMAHook'):
        quantize(
            upernet.config,
            upernet.checkpoint,
            'minmax_w4a4',
            cfg_options={**FEW, 'custom_hooks': [dict(type='EMAHook')]},
            **settings,
        )


def test_a_config_with_a_validation_only(upernet, tmp_path):
    cfg = Config.fromfile(upernet.config)
    cfg.merge_from_dict({'val_dataloader.dataset.indices': 3})
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    summary = quantize(
        cfg,
        Path(upernet.checkpoint),
        'minmax_w8a8',
        work_dir=tmp_path,
        calib_images=1,
        float_eval=False,
    )
    assert summary['quantized']['metrics']['mIoU'] > 0


def test_runs_of_one_config_in_one_second_have_their_own_logs(
    upernet, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        'mmengine.runner.runner.time.strftime', lambda *_: '20260101_000000'
    )
    for name in ('first', 'second'):
        quantize(
            upernet.config,
            upernet.checkpoint,
            'minmax_w8a8',
            work_dir=str(tmp_path / name),
            cfg_options=FEW,
            calib_images=1,
            evaluate=False,
        )
    first, second = (
        (tmp_path / name / '20260101_000000' / '20260101_000000.log').read_text()
        for name in ('first', 'second')
    )
    assert str(tmp_path / 'first') in first and str(tmp_path / 'second') not in first
    assert str(tmp_path / 'second') in second and str(tmp_path / 'first') not in second


def test_a_checkpoint_is_read_once_and_every_hook_sees_it(
    upernet, tmp_path, monkeypatch
):
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS
    from mmengine.runner import CheckpointLoader

    read, seen, loaded = [], [], []
    original = torch.load

    class Seeing(Hook):
        def after_load_checkpoint(self, runner, checkpoint):
            seen.append(len(checkpoint['state_dict']))

    def counted(path, *args, **options):
        read.append(str(path))
        return original(path, *args, **options)

    load_checked = LOADING.load_checked
    monkeypatch.setattr(torch, 'load', counted)
    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', pytest.fail)
    monkeypatch.setattr(
        LOADING,
        'load_checked',
        lambda *args: loaded.append(args[2]) or load_checked(*args),
    )
    monkeypatch.setitem(HOOKS.module_dict, 'Seeing', Seeing)
    quantize(
        upernet.config,
        upernet.checkpoint,
        'minmax_w4a4',
        work_dir=str(tmp_path),
        calib_images=1,
        cfg_options={**FEW, 'custom_hooks': [dict(type='Seeing')]},
    )
    assert read == loaded == [upernet.checkpoint]
    assert (
        len(seen) == 2 and len(set(seen)) == 1
    )  # of the quantized model's Runner and of the float one's


def test_a_second_run_into_the_same_work_dir_is_refused_and_changes_nothing(
    upernet, tmp_path
):
    settings = dict(work_dir=tmp_path, cfg_options=FEW, calib_images=1, evaluate=False)
    with locked(tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(
            QuantizationError, match=r'another run writes to work_dir .*--work-dir'
        ):
            quantize(upernet.config, upernet.checkpoint, 'minmax_w4a4', **settings)
        assert sorted(tmp_path.iterdir()) == before
    assert quantize(upernet.config, upernet.checkpoint, 'minmax_w4a4', **settings)[
        'layers'
    ]
