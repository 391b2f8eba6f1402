"""A process beside the server for questions that need torch: a function and its arguments in, what it returns out.

The server loads no torch, so that it starts in a moment and answers while that is being loaded elsewhere. This process
is started when it is first asked, answers one question after the other, and ends by itself: when nothing was asked for
a while, and when the app is gone.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar, cast

from simdetr.app.refusals import Refusal
from simdetr.data.machine import prepare_openmp

LOG = logging.getLogger(__name__)
IDLE_S = 600.0
"""After so long without a question the process ends, and its memory is free."""
_TRIES = 2
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


class Aside:
    """The process, as the server sees it.

    Args:
        log: File for what it says beside its answers.
        idle_s: Seconds without a question after which it ends.
    """

    def __init__(self, log: Path, idle_s: float = IDLE_S) -> None:
        self.log, self.idle_s = log, idle_s
        self._process: subprocess.Popen[bytes] | None = None
        self._turn, self._stopped = threading.Lock(), False

    @property
    def pid(self) -> int | None:
        """Number of the process, None where there is none."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def ask(self, function: Callable[Given, Answer], *args: Given.args, **options: Given.kwargs) -> Answer:
        """What a function of the package returns, called there; questions wait for each other.

        Raises:
            Refusal: the one that the function raises; 409 for any other error, or if the process ends meanwhile.
        """
        question = pickle.dumps((function, args, options))
        with self._turn:
            for _ in range(_TRIES):  # one that had nothing to do may end at this very moment
                if self._stopped:
                    raise Refusal(409, "the app is being stopped")
                process = self._started()
                assert process.stdin is not None and process.stdout is not None
                try:
                    process.stdin.write(question)
                    process.stdin.flush()
                    ok, answer = pickle.load(process.stdout)
                    break
                except (EOFError, OSError, pickle.UnpicklingError):
                    status = process.wait()
                    self._end()
            else:
                raise Refusal(409, f"the process that was asked has ended (status {status}); see {self.log.name}")
        if not ok:
            raise Refusal(*answer)
        return cast(Answer, answer)

    def stop(self) -> None:
        """End the process, in the middle of an answer if need be; nothing can be asked from now on."""
        self._stopped = True
        self._kill()
        with self._turn:
            self._kill()  # one that a question has started meanwhile
            self._end()

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()  # it writes nothing
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "simdetr.app.aside", str(self.idle_s)]
            with self.log.open("ab") as file:
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        for stream in () if process is None else (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass


def main() -> None:
    """Answer until nobody asks."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    prepare_openmp()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    questions: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    while True:
        try:
            function, args, options = questions.get(timeout=float(sys.argv[1]))
        except Empty:
            return
        pickle.dump(_answered(function, args, options), answers)
        answers.flush()


def _listen(questions: SimpleQueue[Any]) -> None:
    """Questions of the input; when it ends so does this process, also in the middle of an answer."""
    while True:
        try:
            questions.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)


def _answered(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> tuple[bool, Any]:
    try:
        return True, function(*args, **options)
    except Refusal as refusal:
        return False, (refusal.status, refusal.detail)
    except Exception as error:
        LOG.exception("%s", function.__qualname__)
        return False, (409, " ".join(str(error).split()) or type(error).__name__)


if __name__ == "__main__":
    main()
