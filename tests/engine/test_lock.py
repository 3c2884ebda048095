"""Two runs do not write into one directory."""

import subprocess
import sys

import pytest

from mmptq import QuantizationError
from mmptq.engine.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from mmptq.engine.lock import locked
with locked(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_at_once_and_may_go_on_after_the_first(tmp_path):
    with locked(tmp_path):
        with (
            pytest.raises(
                QuantizationError, match=rf'another run writes to work_dir {tmp_path}'
            ),
            locked(tmp_path),
        ):
            pytest.fail('it is held')
        with locked(tmp_path.parent):
            pass  # another directory
    with locked(tmp_path):
        pass


def test_the_lock_ends_with_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


def test_the_lock_of_another_process_ends_with_its_death(tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(QuantizationError, match='another run'), locked(tmp_path):
            pytest.fail('it is held')
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with locked(tmp_path):
        pass


def test_of_several_processes_the_first_one_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with locked(tmp_path), locked(tmp_path, 'pytorch'), locked(tmp_path, 'pytorch'):
        pass
    monkeypatch.setenv('RANK', '0')
    with (
        locked(tmp_path, 'pytorch'),
        pytest.raises(QuantizationError, match='another run'),
        locked(tmp_path, 'pytorch'),
    ):
        pytest.fail('it is held')
