"""The worker's process: it ends with its input, and what fails in a run does not end it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest

from simdetr.app.jobs import LoadedOnce
from simdetr.app.run_files import RunFiles
from simdetr.app.worker import GONE, NICE, Worker, do_one


def test_a_process_whose_app_is_gone_ends():
    process = subprocess.Popen([sys.executable, "-m", "simdetr.app.worker"], stdin=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(60) == GONE


def test_an_error_is_told_and_the_next_run_can_begin(tmp_path):
    files = RunFiles(tmp_path)
    files.job.write_text(json.dumps({"kind": "detect", "parameters": {}, "model": str(tmp_path), "device": "cpu"}))
    do_one(files, LoadedOnce())
    ended = files.ended()
    assert ended["ok"] is False and "images.parquet" in ended["error"]
    assert "Traceback" in files.log.read_text() and "Traceback" not in ended["error"]


def test_a_process_is_started_when_it_is_needed_and_stopped(tmp_path):
    worker = Worker(tmp_path / "worker.log")
    assert not worker.is_alive() and worker.pid is None
    worker.stop()
    worker.begin(tmp_path / "nothing")
    assert worker.is_alive() and worker.pid
    worker.stop()
    assert not worker.is_alive()
    start = time.monotonic()
    worker.stop()
    assert time.monotonic() - start < 1


@pytest.mark.skipif(sys.platform == "win32", reason="priorities are other numbers there")
def test_the_process_gives_way_to_what_people_wait_for(tmp_path):
    worker = Worker(tmp_path / "worker.log")
    worker.begin(tmp_path / "nothing")
    try:
        until = time.monotonic() + 30
        wanted = max(psutil.Process().nice(), NICE)
        while psutil.Process(worker.pid).nice() != wanted and time.monotonic() < until:
            time.sleep(0.05)
        assert psutil.Process(worker.pid).nice() == wanted
    finally:
        worker.stop()
