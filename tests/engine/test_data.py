"""Which images are calibrated on."""

import pytest
from mmengine.config import Config, ConfigDict

from mmptq import QuantizationError
from mmptq.engine.data import calibration_dataset

TEST = dict(dataset=dict(type='CocoDataset', ann_file='val.json', pipeline=['test']))


def cfg(train, test=TEST):
    return Config(
        ConfigDict(
            train_dataloader=dict(dataset=train) if train else None,
            test_dataloader=test,
        )
    )


def test_wrappers_are_taken_off_and_the_test_pipeline_put_in():
    plain = dict(type='CocoDataset', ann_file='train.json', pipeline=['train'])
    expected = dict(type='CocoDataset', ann_file='train.json', pipeline=['test'])
    assert calibration_dataset(cfg(plain)) == expected
    assert (
        calibration_dataset(cfg(dict(type='RepeatDataset', times=3, dataset=plain)))
        == expected
    )
    balanced = dict(type='ClassBalancedDataset', oversample_thr=1e-3, dataset=plain)
    mixed = dict(type='MultiImageMixDataset', dataset=balanced, pipeline=['mosaic'])
    assert calibration_dataset(cfg(mixed)) == expected
    both = dict(
        type='ConcatDataset', datasets=[plain, dict(plain, ann_file='more.json')]
    )
    assert calibration_dataset(cfg(both)) == dict(
        type='ConcatDataset', datasets=[expected, dict(expected, ann_file='more.json')]
    )


def test_the_test_set_only_when_asked_for():
    assert calibration_dataset(cfg(None), on_test=True) == TEST['dataset']
    with pytest.raises(QuantizationError, match='--calib-cfg'):
        calibration_dataset(cfg(None))
    with pytest.raises(QuantizationError, match='test_dataloader'):
        calibration_dataset(cfg(None, test=None))


def test_calib_cfg_is_any_config_with_a_train_dataloader(tmp_path):
    path = tmp_path / 'set.py'
    path.write_text(
        "train_dataloader = dict(dataset=dict(type='Other', pipeline=[]))\n"
    )
    assert calibration_dataset(cfg(None), str(path)) == dict(
        type='Other', pipeline=['test']
    )
    path.write_text('model = dict()\n')
    with pytest.raises(QuantizationError, match=r'set\.py has no train_dataloader'):
        calibration_dataset(cfg(None), str(path))
