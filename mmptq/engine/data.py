"""Calibration images: of the train set, through the test pipeline, seeded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS

from ..errors import QuantizationError


@dataclass(frozen=True)
class CalibrationSet:
    """Images to calibrate on.

    Attributes:
        dataset: The data set that was built.
        indices: The images that were drawn from it.
        paths: Their files.
        leak: Whether images of the evaluation are among them.
    """

    dataset: Any
    indices: list[int]
    paths: list[str]
    leak: bool

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches of one image, as ``model.test_step`` takes them.

        Raises:
            QuantizationError: If an image cannot be read, naming it.
        """
        prepare = getattr(self.dataset, 'prepare_data', self.dataset.__getitem__)
        for index, path in zip(self.indices, self.paths, strict=True):
            try:
                item = prepare(index)
            except Exception as error:  # a pipeline may raise anything
                raise QuantizationError(
                    f'calibration image {path} cannot be read, or prepared by the test'
                    f' pipeline: {error}'
                ) from error
            if item is None:
                raise QuantizationError(
                    f'calibration image {path} cannot be read: the test pipeline'
                    ' returns nothing for it'
                )
            yield pseudo_collate([item])


def calibration_dataset(
    cfg: Config, calib_cfg: str | None = None, on_test: bool = False
) -> dict[str, Any]:
    """The config of the calibration data set: train images through the test pipeline.

    Args:
        cfg: The config of the model.
        calib_cfg: A config file whose ``train_dataloader`` is used instead.
        on_test: Take the evaluation's data set: a leak, to reproduce protocols that do.

    Raises:
        QuantizationError: If there is no such data set or no test pipeline.
    """
    test = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    if not test:
        raise QuantizationError(
            'the config has neither test_dataloader nor val_dataloader: its pipeline is'
            ' needed for calibration'
        )
    test_dataset = _plain(test['dataset'])
    if on_test:
        return test_dataset
    if calib_cfg is not None:
        train = load_config(calib_cfg).get('train_dataloader')
        if not train:
            raise QuantizationError(
                f'{calib_cfg} has no train_dataloader, from which --calib-cfg takes its'
                ' data set'
            )
    else:
        train = cfg.get('train_dataloader')
        if not train:
            raise QuantizationError(
                'the config has no train_dataloader to take calibration images from;'
                ' name a config that has one with --calib-cfg'
            )
    return _with_pipeline(
        _plain(train['dataset']), _innermost(test_dataset)['pipeline']
    )


def build_calibration_set(
    dataset: Mapping[str, Any],
    images: int,
    seed: int,
    evaluated: Any,
    on_test: bool,
    shuffle: bool = True,
) -> CalibrationSet:
    """Builds a calibration data set and draws images from it.

    Args:
        dataset: Its config.
        images: How many, at most.
        seed: Of the draw.
        evaluated: The data set of the evaluation, to find leaks.
        on_test: Whether a leak is wanted.
        shuffle: Draw at random; else take the first ones.

    Raises:
        QuantizationError: If it is empty or cannot be built, or holds images of the
            evaluation that were not asked for.
    """
    if images < 1:
        raise QuantizationError(
            f'the calibration set is empty: {images} images were asked for, 1 is the'
            ' least'
        )
    try:
        built = DATASETS.build(dict(dataset))
    except Exception as error:  # a data set may raise anything
        raise QuantizationError(
            'the calibration data set cannot be built, or is empty:'
            f' {type(error).__name__}: {error}'
        ) from error
    if not len(built):
        raise QuantizationError(
            f'the calibration set is empty: {type(built).__name__} found no image;'
            ' check its data_root and ann_file, or name another one with --calib-cfg'
        )
    order = (
        torch.randperm(len(built), generator=torch.Generator().manual_seed(seed))
        if shuffle
        else torch.arange(len(built))
    )
    indices = order[:images].tolist()
    paths = [_path(built, index) for index in indices]
    evaluation = {
        os.path.realpath(_path(evaluated, index)) for index in range(len(evaluated))
    }
    leaks = [path for path in paths if os.path.realpath(path) in evaluation]
    if leaks and not on_test:
        raise QuantizationError(
            f'leak: {len(leaks)} of {len(paths)} calibration images are also evaluated,'
            f' for one {leaks[0]}; name other images with --calib-cfg, or ask for the'
            ' leak with --calib-on-test'
        )
    return CalibrationSet(built, indices, paths, bool(leaks) or on_test)


def load_config(
    config: str | Config, changes: Mapping[str, Any] | None = None
) -> Config:
    """A config by file name, or by ``package::name`` as OpenMMLab's model zoos name
    theirs; of one that is loaded a copy.

    Args:
        config: The name, or the config.
        changes: Of it, as ``--cfg-options`` has them.

    Raises:
        QuantizationError: If there is none, or it cannot be read, or changed so.
    """
    cfg = deepcopy(config) if isinstance(config, Config) else _read(str(config))
    try:
        cfg.merge_from_dict(dict(changes or {}))
    except (KeyError, TypeError) as error:
        raise QuantizationError(
            f'--cfg-options do not fit the config: {error.args[0]}'
        ) from None
    return cfg


def _read(config: str) -> Config:
    try:
        if '::' in config:
            from mmengine.hub import get_config

            return get_config(config)
        return Config.fromfile(config)
    except FileNotFoundError as error:
        raise QuantizationError(f'config {config} does not exist: {error}') from None
    except Exception as error:  # a config is a program: it may raise anything
        raise QuantizationError(
            f'config {config} cannot be read: {type(error).__name__}: {error}'
        ) from error


def _plain(cfg: Any) -> Any:
    if isinstance(cfg, Mapping):
        return {key: _plain(value) for key, value in cfg.items()}
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_plain(value) for value in cfg)
    return cfg


def _innermost(dataset: dict[str, Any]) -> dict[str, Any]:
    while 'pipeline' not in dataset or 'dataset' in dataset:
        if 'dataset' in dataset:
            dataset = dataset['dataset']
        elif dataset.get('datasets'):
            dataset = dataset['datasets'][0]
        else:
            raise QuantizationError(
                f'the test data set {dataset.get("type")} has no pipeline'
            )
    return dataset


def _with_pipeline(dataset: dict[str, Any], pipeline: list[Any]) -> dict[str, Any]:
    if 'dataset' in dataset:  # repeats, balances or mixes the images of another one
        return _with_pipeline(dataset['dataset'], pipeline)
    if 'datasets' in dataset:
        return {
            **dataset,
            'datasets': [
                _with_pipeline(part, pipeline) for part in dataset['datasets']
            ],
        }
    return {**dataset, 'pipeline': pipeline}


def _path(dataset: Any, index: int) -> str:
    info = dataset.get_data_info(index)
    return str(info.get('img_path', f'image {index}'))
