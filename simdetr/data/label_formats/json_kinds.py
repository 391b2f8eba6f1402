"""Which tool a JSON file is of, told by its content and without reading more of a large one than that takes."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, Literal

from simdetr.data.label_formats.reading import shown

JsonKind = Literal["coco", "label-studio", "results", "other"]
_HEAD_BYTES = 1 << 20
_TASK_KEYS = ("annotations", "completions", "predictions")
_LISTED_KEYS = 8


def json_kind(path: Path) -> JsonKind:
    """``"coco"`` annotations, tasks of ``"label-studio"``, a list of COCO ``"results"``, or ``"other"``."""
    head = _head(path)
    if head.startswith("{"):
        return "coco" if _names_lists(path) else "other"
    if not head.startswith("["):
        return "other"
    first = _first(path, head)
    if not isinstance(first, dict):
        return "other"
    if "image_id" in first and "category_id" in first:
        return "results"
    is_task = "data" in first and any(isinstance(first.get(key), list) for key in _TASK_KEYS)
    is_plain_task = "annotation_id" in first or ("annotator" in first and "lead_time" in first)
    return "label-studio" if is_task or is_plain_task else "other"


def described(path: Path) -> str:
    """What a JSON file is, in a few words."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read as JSON: {shown(str(error))}"
    entry, kind = (content[0], "a list of objects") if isinstance(content, list) and content else (content, "an object")
    if isinstance(entry, dict):
        return f"is JSON, {kind} with the keys {', '.join(shown(key) for key in list(entry)[:_LISTED_KEYS]) or 'none'}"
    return "is JSON, an empty list" if content == [] else f"is JSON, {shown(entry)}"


def _head(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD_BYTES).decode("utf-8-sig", errors="ignore").lstrip()
    except OSError:
        return ""


def _first(path: Path, head: str) -> Any:  # noqa: ANN401
    """The first entry of a list, read alone where it lies within the head."""
    try:
        return json.JSONDecoder().raw_decode(head[1:].lstrip())[0]
    except (ValueError, RecursionError):
        pass
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return content[0] if isinstance(content, list) and content else None


def _names_lists(path: Path) -> bool:
    """Whether the names of COCO's lists stand in the file; a search of bytes, since the file may be large."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b'"images"') >= 0 and (
                content.find(b'"annotations"') >= 0 or content.find(b'"categories"') >= 0
            )
    except (OSError, ValueError):
        return False
