"""The app's interface from Python: a path and values in, the answer out; with nothing but the standard library."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen


class AnswerError(RuntimeError):
    """The app did not do what was asked; ``status`` and ``answer`` are what it said."""

    def __init__(self, status: int, answer: Any) -> None:  # noqa: ANN401
        detail = answer.get("detail", answer) if isinstance(answer, dict) else answer
        super().__init__(f"{status}: {detail}")
        self.status, self.answer = status, answer


class AppClient:
    """Speaks to an app.

    Args:
        address: Where it is, such as ``http://127.0.0.1:8000``.
        token: What it printed, if it did.
        author: Who labels.
        timeout_s: Longest wait for an answer.
    """

    def __init__(self, address: str, token: str | None = None, author: str = "script", timeout_s: float = 60.0) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"address: expected one such as http://127.0.0.1:8000, got {address!r}")
        self.address, self.timeout_s = address.rstrip("/"), timeout_s
        self._headers = {"X-Author": quote(author)} | ({} if token is None else {"Authorization": f"Bearer {token}"})

    def ask(self, method: str, path: str, body: Any = None, **query: Any) -> Any:  # noqa: ANN401
        """The answer to a request: JSON as Python values, anything else as bytes.

        Args:
            method: Such as ``GET``.
            path: Below ``/api``, such as ``/projects/1/images``.
            body: Sent as JSON.
            query: Values of the address; a list comes several times.

        Raises:
            AnswerError: The app refuses.
        """
        address = f"{self.address}/api{path}" + (f"?{urlencode(query, doseq=True)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        try:
            with urlopen(Request(address, data, headers, method=method), timeout=self.timeout_s) as answer:
                return _read(answer.headers.get_content_type(), answer.read())
        except HTTPError as error:
            raise AnswerError(error.code, _read(error.headers.get_content_type(), error.read())) from None

    def pages(self, path: str, name: str, **query: Any) -> list[Any]:  # noqa: ANN401
        """All entries of a list that comes in pages; ``name`` is the list in the answer."""
        found, after = [], None
        while True:
            page = self.ask("GET", path, **query, **({} if after is None else {"after": after}))
            found += page[name]
            after = page["next"]
            if after is None:
                return found

    def run(self, project_id: int, kind: str, poll_s: float = 1.0, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
        """Start a run and wait for its end; a RuntimeError if it is not done then."""
        run = self.ask("POST", f"/projects/{project_id}/runs", {"kind": kind, "parameters": parameters})
        while run["state"] in ("queued", "running"):
            time.sleep(poll_s)
            run = self.ask("GET", f"/runs/{run['id']}")["run"]
        if run["state"] != "done":
            raise RuntimeError(f"run {run['id']} is {run['state']}: {run['error'] or run['message']}")
        found: dict[str, Any] = run
        return found


def _read(kind: str, content: bytes) -> Any:  # noqa: ANN401
    return json.loads(content) if kind == "application/json" and content else content
