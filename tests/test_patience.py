"""Waiting for processes: those at work are waited for, those that stand still are not."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import patience

pytestmark = pytest.mark.processes

READY = "import sys; sys.stdout.write('ready\\n'); sys.stdout.flush(); "


def start(code: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", READY + code], text=True, **pipes)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_process_that_stands_still_is_given_up_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "IDLE_SECONDS", 0.2)
    process = start("import time; time.sleep(1000)")
    with pytest.raises(AssertionError, match="have done nothing"):
        patience.wait_for(lambda: False, [process.pid])
    with pytest.raises(AssertionError, match="have done nothing"):
        patience.finish(process)
    assert process.wait() != 0


def test_a_process_at_work_is_waited_for_and_one_without_end_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "IDLE_CPU", 0.01)
    with start("\nwhile True: pass") as process:
        began = patience.Patience([process.pid])
        monkeypatch.setattr(patience, "IDLE_SECONDS", 60.0)
        while began._cpu() < 0.1:
            began.check()
            time.sleep(0.01)
        monkeypatch.setattr(patience, "MOST_CPU", 0.05)
        with pytest.raises(AssertionError, match="are not done"):
            began.check()
        process.kill()


def test_what_a_command_prints_is_kept_with_its_exit_code() -> None:
    done = patience.run([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)
