"""The schemas in docs/ are those of the code, and say what a summary holds."""

import json
import subprocess
import sys
from pathlib import Path

from mmptq.analysis.summary import About
from mmptq.engine.options import Options
from mmptq.engine.schema import schemas

DOCS = Path(__file__).parents[2] / 'docs' / 'schema'


def test_committed_schemas_are_what_the_command_writes(tmp_path):
    command = [sys.executable, '-m', 'mmptq.engine.schema', str(tmp_path / 'new')]
    subprocess.run(command, check=True, cwd=DOCS.parents[1])
    assert {path.name for path in (tmp_path / 'new').iterdir()} == set(schemas())
    for path in (tmp_path / 'new').iterdir():
        assert path.read_text() == (DOCS / path.name).read_text(), (
            'run python -m mmptq.engine.schema docs/schema'
        )


def test_the_schema_of_a_summary_names_its_keys_as_the_file_does():
    schema = json.loads((DOCS / 'summary.json').read_text())
    assert {'schema', 'float', 'quantized', 'layers'} <= set(schema['properties'])
    assert set(schema['required']) >= {
        'version',
        'recipe',
        'bits',
        'float',
        'quantized',
        'layers',
    }
    assert len(schema['properties']) == len(About.model_fields) + 1
    assert schema['$defs']['FloatReason']['enum'][-1] == 'kept'
    assert schema['additionalProperties'] is False


def test_the_schema_of_the_options_says_how_they_are_written():
    properties = json.loads((DOCS / 'options.json').read_text())['properties']
    assert set(properties) == set(Options.model_fields)
    assert properties['evaluate']['flag'] == '--no-eval'
    assert properties['calib_images']['flag'] == '--calib-images'
    assert properties['calib_images']['hook'] == 'images'
    assert 'flag' not in properties['shuffle'] and 'hook' not in properties['work_dir']
    assert properties['backend']['enum'] == ['simulated', 'integer']
