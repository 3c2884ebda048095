"""One definition of what a summary holds: written as it is read, and files of earlier
versions still read.
"""

import json

import pytest
from pydantic import ValidationError

from mmptq import QuantizationError
from mmptq.analysis.summary import About, LayerSummary, Result, Summary
from mmptq.apis import load_recipe
from mmptq.backbones.reasons import FloatReason
from mmptq.checkpoints.about import checked_about

from ..conftest import about

QUANTIZED = dict(
    name='backbone.fc',
    kind='linear',
    site='query',
    bits=dict(input=4, weight=4),
    effective_bits=dict(input=3.585, weight=4.0),
    quantizer=dict(input='UniformQuantizer', weight='UniformQuantizer'),
    uniform=dict(input=True, weight=True),
    sqnr_db=20.5,
    reason=None,
)


def left_float(reason, kind='Conv2d'):
    nothing = dict.fromkeys(
        ['site', 'bits', 'effective_bits', 'quantizer', 'uniform', 'sqnr_db']
    )
    return dict(name='neck.conv', kind=kind, reason=reason, **nothing)


def content(*layers, **changes):
    """What a file without a schema number says, as the version before the number wrote
    it.
    """
    return {**about(load_recipe('minmax_w4a4')), 'layers': list(layers), **changes}


def test_a_file_without_a_number_is_read_and_written_with_one():
    first = content(QUANTIZED, left_float('outside of scope backbone'))
    found = About.read(first)
    word = dict(left_float('outside_of_scope'))
    assert found.to_dict() == {**first, 'layers': [QUANTIZED, word], 'schema': 2}
    assert About.read(found.to_dict()) == found
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize(
    ('sentence', 'word'),
    [
        ('its BackboneSpec names no site for it', 'no_site'),
        ('MultiheadAttention has no quantized form', 'no_quantized_form'),
        ('runs in training only', 'training_only'),
        ('outside of scope backbone', 'outside_of_scope'),
        ('received nothing in calibration', 'idle'),
    ],
)
def test_sentences_of_earlier_files_are_the_reasons_of_today(sentence, word):
    row = LayerSummary.model_validate(left_float(sentence, 'MultiheadAttention'))
    assert row.to_dict()['reason'] == word and row.reason.sentence(row.kind) == sentence
    assert LayerSummary.model_validate(left_float(word)).reason is row.reason


@pytest.mark.parametrize(
    'reason', ['', 'because', 'it runs in training only', 'idle ', 3, True]
)
def test_a_reason_is_one_that_we_know(reason):
    with pytest.raises(ValidationError):
        LayerSummary.model_validate(left_float(reason))


def test_a_path_and_a_backend_are_there_if_they_were_said():
    row = LayerSummary.model_validate(QUANTIZED)
    assert 'path' not in row.to_dict()
    assert row.model_copy(update=dict(path='int8')).to_dict() == {
        **QUANTIZED,
        'path': 'int8',
    }
    assert Result(metrics=dict(mIoU=None), seconds=1.0).to_dict() == dict(
        metrics=dict(mIoU=None), seconds=1.0
    )


def test_a_summary_is_what_its_file_says_and_a_result():
    found = About.read(content(left_float('idle'), QUANTIZED))
    summary = Summary.of(found)
    assert summary.to_dict() == {**found.to_dict(), 'quantized': None}
    assert summary.about() == found.to_dict() and summary.idle_layers() == ['neck.conv']
    assert (
        Summary.read({**content(), 'quantized': None}).schema_number == 2
    )  # of summary.json
    with pytest.raises(ValidationError, match='quantized'):
        Summary.read(content())


def test_a_summary_is_not_changed():
    with pytest.raises(ValidationError, match='frozen'):
        About.read(content()).scope = 'model'


@pytest.mark.parametrize(
    'changes',
    [
        dict(schema=3),
        dict(schema='2'),
        dict(schema=True),
        dict(schema=None),
        dict(quantized=None),
    ],
)
def test_files_of_a_later_version_or_with_other_keys_are_refused(changes):
    with pytest.raises(QuantizationError, match=r'a\.pth .*another version of mmptq'):
        checked_about(content(**changes), 'a.pth')


def test_every_reason_has_a_sentence_of_its_own():
    sentences = {reason.sentence('Conv2d') for reason in FloatReason}
    assert (
        len(sentences) == len(FloatReason)
        and 'Conv2d has no quantized form' in sentences
    )
