"""XML files of unknown origin in, their elements out: without entities, without document types, of bounded size."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from simdetr.data.annotations import LabelError
from simdetr.data.label_formats.reading import number, shown

MAX_BYTES = 1 << 30
_HEAD_BYTES = 65536
_FORBIDDEN = re.compile(rb"<!\s*(DOCTYPE|ENTITY)", re.IGNORECASE)
_ROOT = re.compile(r"<([A-Za-z_][\w.:-]*)[\s/>]")


def read_xml(path: Path) -> Element:
    """The root of an XML file.

    Raises:
        LabelError: no XML, larger than ``MAX_BYTES``, or with a document type or entities, which can be made to grow
            without limit.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LabelError(f"{path} has more than {MAX_BYTES >> 20} MiB; split it")
        content = path.read_bytes()
    except OSError as error:
        raise LabelError(f"{path} cannot be read ({error.strerror})") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:_HEAD_BYTES]:
        raise LabelError(f"{path}: expected XML in UTF-8, got another encoding; save it as UTF-8")
    if _FORBIDDEN.search(content):
        raise LabelError(f"{path} has a document type or entities, which label files need not; remove them")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise LabelError(f"{path} cannot be read as XML: {shown(str(error))}") from error


def root_tag(path: Path) -> str | None:
    """The name of the root element, from the first bytes; None if this is no XML."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES).decode("utf-8-sig", errors="replace").lstrip()
    except OSError:
        return None
    if not head.startswith("<"):
        return None
    head = re.sub(r"<\?.*?\?>|<!--.*?-->|<![^>]*>", "", head, flags=re.DOTALL)
    found = _ROOT.match(head.lstrip())
    return found[1] if found else None


def text_at(element: Element, path: str) -> str:
    """The text of an element below, without space around it; empty where there is none."""
    return (element.findtext(path) or "").strip()


def number_at(element: Element, path: str) -> float:
    """The number in an element below; nan where there is none."""
    return number(element.findtext(path))
