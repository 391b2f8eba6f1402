"""A process beside the server for questions that need torch: a function and its arguments in, what it returns out.

They speak in lines of JSON, which pydantic reads by the types of the function's arguments and of what it returns. The
server loads no torch, so that it starts in a moment and answers while that is being loaded elsewhere. This process is
started when it is first asked, answers one question after the other, and ends by itself: when nothing was asked for a
while, and when the app is gone.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from types import GenericAlias
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, validate_call
from pydantic_core import to_json

from simdetr.app.refusals import Refusal
from simdetr.data.machine import prepare_openmp

LOG = logging.getLogger(__name__)
IDLE_S = 600.0
"""After so long without a question the process ends, and its memory is free."""
_TRIES = 2
_BYTES = ConfigDict(val_json_bytes="base64")
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
        """What a function returns, called there; questions wait for each other.

        Args:
            function: of a module's top level, typed: numbers, texts, paths, bytes, dataclasses of these.
            *args: its arguments.
            **options: its arguments by name.

        Raises:
            Refusal: the one that the function raises; 409 for any other error, or if the process ends meanwhile.
        """
        question = to_json([function.__module__, function.__qualname__, args, options], bytes_mode="base64")
        with self._turn:
            for _ in range(_TRIES):  # one that had nothing to do may end at this very moment
                if self._stopped:
                    raise Refusal(409, "the app is being stopped")
                process = self._started()
                assert process.stdin is not None and process.stdout is not None
                try:
                    process.stdin.write(question + b"\n")
                    process.stdin.flush()
                    said = process.stdout.readline()
                except OSError:
                    said = b""
                if said.endswith(b"\n"):
                    break
                status = process.wait()
                self._end()
            else:
                raise Refusal(409, f"the process that was asked has ended (status {status}); see {self.log.name}")
        refused, _, answer = said.partition(b" ")
        if int(refused):
            raise Refusal(int(refused), *json.loads(answer))
        one: Any = GenericAlias(tuple, (get_type_hints(function)["return"],))  # a dataclass alone takes no config
        returned: Answer = TypeAdapter(one, config=_BYTES).validate_json(answer)[0]
        return returned

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
    questions: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    while True:
        try:
            question = questions.get(timeout=float(sys.argv[1]))
        except Empty:
            return
        refused, answer = _answered(*json.loads(question))
        answers.write(b"%d %b\n" % (refused, to_json([answer], bytes_mode="base64")))
        answers.flush()


def _listen(questions: SimpleQueue[bytes]) -> None:
    """Questions of the input; when it ends so does this process, also in the middle of an answer."""
    for line in sys.stdin.buffer:
        questions.put(line)
    os._exit(0)


def _answered(module: str, name: str, args: list[Any], options: dict[str, Any]) -> tuple[int, Any]:
    """0 and what the function returns, or the status of a refusal and its sentence."""
    try:
        return 0, validate_call(config=_BYTES)(getattr(import_module(module), name))(*args, **options)
    except Refusal as refusal:
        return refusal.status, refusal.detail
    except Exception as error:
        LOG.exception("%s", name)
        return 409, " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
