"""JSON Schema of ``summary.json`` and of the options: ``python -m mmptq.engine.schema
docs/schema``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..analysis.summary import Summary
from .options import FLAGS, HOOK_NAMES, Options, extra


def schemas() -> dict[str, str]:
    """The text of each schema by the name of its file."""
    found = {
        'summary.json': Summary.model_json_schema(),
        'options.json': options_schema(),
    }
    return {name: json.dumps(schema, indent=2) + '\n' for name, schema in found.items()}


def options_schema() -> dict[str, Any]:
    """The options of :func:`mmptq.apis.quantize`, with their names on the command line
    and in PTQHook.
    """
    schema = Options.model_json_schema()
    for name, about in schema['properties'].items():
        for key in extra(name):
            del about[key]
        if extra(name)['told']:
            about['flag'] = FLAGS[name]
        if name in HOOK_NAMES:
            about['hook'] = HOOK_NAMES[name]
    return schema


def main(folder: str) -> None:
    """Writes the schemas to a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        Path(folder, name).write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main(sys.argv[1])
