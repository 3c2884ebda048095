"""What the test tools of mmdet and mmsegmentation can do beside testing, for both."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config, ConfigDict

from ..errors import QuantizationError


def draw_predictions(
    cfg: Config, show: bool, show_dir: str | None, wait_time: float
) -> None:
    """Turns the visualization hook of a config on (``--show``, ``--show-dir``)."""
    kind = (
        'SegVisualizationHook'
        if cfg.get('default_scope') == 'mmseg'
        else 'DetVisualizationHook'
    )
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    hook = hooks.setdefault('visualization', ConfigDict(type=kind, interval=1))
    hook.draw = True
    if show:
        hook.show, hook.wait_time = True, wait_time
    if show_dir and cfg.get('default_scope') == 'mmseg':
        cfg.setdefault(
            'visualizer',
            ConfigDict(
                type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
            ),
        )
        # mmengine keeps visualizers by name for the life of the process: one of before
        # would paint elsewhere.
        cfg.visualizer.save_dir, cfg.visualizer.name = (
            show_dir,
            f'visualizer of {show_dir}',
        )
    elif show_dir:
        hook.test_out_dir = show_dir


def dump_predictions(cfg: Config, out: str) -> None:
    """Makes the evaluation write its predictions (``--out``): mmsegmentation's to a
    directory, mmdet's to a pickle file.

    Raises:
        QuantizationError: If the name does not fit.
    """
    if cfg.get('default_scope') == 'mmseg':
        for evaluator in (
            cfg.test_evaluator
            if isinstance(cfg.test_evaluator, list)
            else [cfg.test_evaluator]
        ):
            if evaluator['type'] == 'IoUMetric':
                evaluator.output_dir, evaluator.keep_results = out, True
        return
    if not out.endswith(('.pkl', '.pickle')):
        raise QuantizationError(
            f'--out {out}: predictions of a detector go to a .pkl or .pickle file'
        )
    evaluators: Any = cfg.test_evaluator
    cfg.test_evaluator = [
        *(evaluators if isinstance(evaluators, list) else [evaluators]),
        dict(type='DumpDetResults', out_file_path=out),
    ]


def test_time_augmentation(cfg: Config) -> None:
    """Makes the test use the config's ``tta_model`` and ``tta_pipeline`` (``--tta``); a
    detector has defaults, flip and none.

    Raises:
        QuantizationError: If the config of a segmentor has none.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if cfg.get('default_scope') != 'mmseg':
        cfg.setdefault(
            'tta_model',
            ConfigDict(
                type='DetTTAModel',
                tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
            ),
        )
        meta_keys = (
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'flip',
            'flip_direction',
        )
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pack = dict(type='PackDetInputs', meta_keys=meta_keys)
        cfg.setdefault(
            'tta_pipeline',
            [
                *dataset['pipeline'][:-1],
                dict(type='TestTimeAug', transforms=[flips, [pack]]),
            ],
        )
    missing = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
    if missing:
        raise QuantizationError(
            f'--tta: the config does not define {" and ".join(missing)}'
        )
    dataset['pipeline'] = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
