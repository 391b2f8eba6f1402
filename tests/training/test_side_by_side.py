"""Tasks that processes share: each is done once, also after one of them is killed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from filelock import FileLock

from simdetr.training import side_by_side
from simdetr.training.side_by_side import Task, Told, default_processes, in_processes, turns

WORK = """
import json, time
from pathlib import Path
from simdetr.training.side_by_side import Task, told, turns
order = told()
folder = Path(order["folder"])
for task in turns([Task(name, folder / f"{name}.json") for name in order["names"]], wait_s=0.05):
    time.sleep(0.05)
    if task.name == order.get("wrong"):
        raise SystemExit("this one cannot be done")
    with (folder / "log").open("a") as log:
        log.write(task.name + "\\n")
    task.done.write_text("{}")
"""


def tasks_of(folder, names):
    return [Task(name, folder / f"{name}.json") for name in names]


def test_tasks_come_in_order_and_what_needs_another_waits(tmp_path):
    first, last = Task("first", tmp_path / "a" / "first.json"), Task("last", tmp_path / "last.json")
    waiting = Task("waiting", tmp_path / "waiting.json", needs=last.done)
    seen = []
    for task in turns([first, waiting, last]):
        seen.append(task.name)
        task.done.write_text("{}")
    assert seen == ["first", "last", "waiting"]
    assert list(turns([first, waiting, last])) == []


def test_what_another_process_holds_is_left_to_it_until_it_is_free(tmp_path, monkeypatch):
    held, free = tasks_of(tmp_path, ("held", "free"))
    lock = FileLock(tmp_path / "held.lock", thread_local=False)
    lock.acquire()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        lock.release()  # the other process has died

    monkeypatch.setattr(side_by_side.time, "sleep", sleep)
    seen = []
    for task in turns([held, free]):
        seen.append(task.name)
        task.done.write_text("{}")
    assert seen == ["free", "held"] and waits == [2.0]


def test_a_task_is_free_again_after_an_error(tmp_path):
    (task,) = tasks_of(tmp_path, ("task",))
    with pytest.raises(KeyboardInterrupt):
        for _ in turns([task]):
            raise KeyboardInterrupt
    assert [one.name for one in turns_once(task)] == ["task"]


def turns_once(task):
    for one in turns([task]):
        one.done.write_text("{}")
        yield one


def test_processes_share_the_tasks_and_each_is_done_once(tmp_path, caplog):
    names = [f"task{number}" for number in range(6)]
    tasks = tasks_of(tmp_path, names)
    with caplog.at_level("INFO"):
        in_processes(WORK, {"folder": str(tmp_path), "names": names}, 2, tmp_path / "said", Told(tasks))
    assert sorted((tmp_path / "log").read_text().split()) == names
    said = [record.message for record in caplog.records if " done: task" in record.message]
    assert len(said) == 6 and said[-1].startswith("6 of 6 done: ") and said[-1].endswith("about 0 min left")


def test_the_last_words_of_a_process_that_fails_are_told(tmp_path):
    order = {"folder": str(tmp_path), "names": ["good", "bad"], "wrong": "bad"}
    with pytest.raises(RuntimeError, match=r"this one cannot be done \(all of it is in .*process\d.log\)"):
        in_processes(WORK, order, 1, tmp_path / "said", lambda: None)
    assert (tmp_path / "good.json").is_file() and not (tmp_path / "bad.json").is_file()


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    order = {"folder": str(tmp_path), "names": ["never"]}
    lock = FileLock(tmp_path / "never.lock")
    with lock:  # so that it waits
        process = subprocess.Popen([sys.executable, "-c", WORK], stdin=subprocess.PIPE, text=True)
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.close()
        assert process.wait(timeout=120) == 1


def test_side_by_side_by_default_only_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(side_by_side, "cores", lambda: 16)
    assert default_processes(9, 1) == 4 and default_processes(3, 1) == 3
    assert default_processes(1, 1) == 1 and default_processes(9, 2) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert default_processes(9, 1) == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(side_by_side, "default_device", lambda: "cuda")
    assert default_processes(9, 1) == 1
