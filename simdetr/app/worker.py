"""A process of its own that does the runs, one after the other: folders of runs on its standard input.

It ends when its input does, so that nothing is left at work when the app is gone, however that went.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import psutil

from simdetr.app.run_files import RunFiles
from simdetr.data.machine import prepare_openmp

LOG = logging.getLogger("simdetr.app.worker")
GONE = 3
"""Exit status where the app is gone."""
NICE = 5
"""Of the worker on POSIX: on cores that are all at work it gets a third of what the server and the browser get."""
_GRACE_S = 5.0


class Worker:
    """The process, as the app sees it; started when it is first needed, and again after it was stopped.

    Args:
        log: File for what it says outside of its runs.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, folder: Path) -> None:
        """Give it a run to do."""
        if self._process is None or self._process.poll() is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "simdetr.app.worker"], stdin=subprocess.PIPE, stdout=file, stderr=file
                )
        stream = self._process.stdin
        assert stream is not None
        stream.write(f"{folder}\n".encode())
        stream.flush()

    @property
    def pid(self) -> int | None:
        """Number of the process, None where there is none."""
        return self._process.pid if self.is_alive() and self._process is not None else None

    def is_alive(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.poll() is None

    def status(self) -> int | None:
        """Exit status of a process that has ended."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """End the process, in the middle of its work if need be."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        self._process = None


def main() -> None:
    """Do runs until the input ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    _give_way()
    prepare_openmp()
    folders = _listen(sys.stdin)  # first: the app may be gone before all is imported
    from simdetr.app.jobs import LoadedOnce  # here: the app imports this module and needs no torch for it

    loaded = LoadedOnce()
    while True:
        do_one(RunFiles(Path(folders.get())), loaded)


def _give_way() -> None:
    """Let what people wait for go first: pages, saving, their browser."""
    own = psutil.Process()
    if sys.platform == "win32":
        own.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
    else:
        own.nice(max(own.nice(), NICE))


def _listen(stream: IO[str]) -> SimpleQueue[str]:
    """Lines of the input; when it ends so does this process, also while a run is at work."""
    queue: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in stream:
            queue.put(line.rstrip("\n"))
        os._exit(GONE)

    threading.Thread(target=listen, daemon=True).start()
    return queue


def do_one(files: RunFiles, loaded: object) -> None:
    """Do a run and say how it ended; what goes wrong is told, and leaves the process able to do the next."""
    from simdetr.app.jobs import LoadedOnce, carry_out

    assert isinstance(loaded, LoadedOnce)
    handler = logging.FileHandler(files.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        facts = carry_out(files, loaded)
    except SystemExit:  # Lightning's way out on SIGTERM: the app has asked for it
        raise
    except Exception as error:
        LOG.exception("the run has failed")
        files.end(ok=False, error=" ".join(str(error).split()) or type(error).__name__)
    else:
        files.end(ok=True, **facts)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


if __name__ == "__main__":
    main()
