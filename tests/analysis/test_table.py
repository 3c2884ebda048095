"""The table at the end, by hand."""

import io

from rich.console import Console

from mmptq.analysis.table import result_table
from mmptq.engine.evaluation import test_result as result_of


def summary(name, quantized=None, float_result=None):
    return dict(
        scope='backbone',
        recipe=dict(name=name),
        bits=dict(weight=4, activation=4, softmax=3),
        float=float_result,
        quantized=quantized,
        calibration=dict(
            dataset='CocoDataset', split='train', images=32, leak=True, seconds=1.5
        ),
        size=dict(float_mib=10.0, quantized_mib=2.5),
    )


def test_table_has_float_and_every_recipe_with_scope_bits_and_leak():
    metrics = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.7, 'coco/segm_mAP': 0.4}
    rows = [
        summary(
            'a_w4a4',
            dict(metrics=metrics, seconds=2.0, backend='integer'),
            dict(metrics=metrics, seconds=1.0),
        ),
        summary('b_w4a4'),
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(rows, title='demo'))
    text = console.export_text()
    for part in (
        'demo',
        'scope backbone',
        '32 images',
        'leak',
        'float',
        'a_w4a4',
        'b_w4a4',
        '4/4/3',
        'integer',
        'coco/bbox_mAP',
        'coco/segm_mAP',
        '2.50',
    ):
        assert part in text
    assert 'bbox_mAP_50' not in text


def test_a_metric_that_has_no_value_is_none_and_a_dash_in_the_table():
    result = result_of({'mIoU': float('nan'), 'aAcc': 61.25}, 1.5).to_dict()
    assert result == dict(metrics={'mIoU': None, 'aAcc': 61.25}, seconds=1.5)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table([summary('a_w4a4', result | {'backend': 'simulated'})]))
    row = next(line for line in console.export_text().splitlines() if 'a_w4a4' in line)
    assert [cell.strip() for cell in row.split('│')[1:6]] == [
        'a_w4a4',
        '4/4/3',
        'simulated',
        '-',
        '61.25',
    ]
