"""A thousand broken files, made at random from good ones: each is read or refused by name, soon and in little memory.

Run as a program this file reads every file of a folder as images or as labels, and prints one JSON line per file; so
the tests see a hang, a crash and the memory of the whole.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.doctor import examine, summary
from simdetr.data.images import UnreadableImageError, open_images, read_image
from simdetr.data.label_files import FORMATS, read_with_report
from simdetr.data.label_formats.conversion import fitting
from simdetr.data.labels import Labels

MODES = {"jpg": ("RGB", "L", "CMYK"), "png": ("RGB", "L", "RGBA", "P", "I;16", "1"), "gif": ("P", "L"), "bmp": ("RGB",)}
MODES |= {"tif": ("RGB", "L", "I;16", "F", "CMYK"), "webp": ("RGB", "RGBA"), "ppm": ("RGB",), "pgm": ("L",)}
VALUES = (
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    2**70,
    "",
    "x" * 3000,
    "1",
    [],
    [[]],
    {},
    {"a": None},
    [1, 2],
    [None] * 4,
)


def good_image(kind: str, mode: str, rng: random.Random) -> bytes:
    """A small picture of noise in a file format and a mode of Pillow's."""
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    if mode == "I;16":
        picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    elif mode == "F":
        picture = Image.fromarray(noise[..., 0].astype(np.float32))
    else:
        picture = picture.convert(mode)
    stream = BytesIO()
    name = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(kind, kind.upper())
    picture.save(stream, name)
    return stream.getvalue()


def huge(kind: str, rng: random.Random) -> bytes:
    """A header that declares a picture far larger than the bytes that follow."""
    side = rng.choice((12_000, 60_000, 2**30))
    if kind in ("ppm", "pgm"):
        return f"P{6 if kind == 'ppm' else 5} {side} {side} 255\n".encode() + b"\0" * 100
    content = bytearray(good_image(kind, MODES[kind][0], rng))
    place = {"png": (16, ">II"), "bmp": (18, "<ii"), "gif": (6, "<HH")}.get(kind)
    if place is None:
        return bytes(content[:60]) + b"\xff" * 8 + bytes(content[60:])
    small = min(side, 65_535 if kind == "gif" else side)
    struct.pack_into(place[1], content, place[0], small, small)
    return bytes(content)


def broken_bytes(content: bytes, rng: random.Random) -> bytes:
    """The same file cut short, with bytes changed, zeroed, doubled or left out."""
    length = len(content)
    start, stop = sorted(rng.randrange(length + 1) for _ in range(2))
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: content[:start],
        lambda: content[:start] + b"\0" * (stop - start) + content[stop:],
        lambda: content[:start] + rng.randbytes(min(stop - start, 40)) + content[min(stop, start + 40) :],
        lambda: content[:start] + content[stop:],
        lambda: content[:stop] + content[start:],
        lambda: b"\0" * length,
        lambda: b"",
        lambda: rng.randbytes(200),
    )
    return rng.choice(changes)()


def broken_json(content: object, rng: random.Random) -> object:
    """The same content with a value of a wrong type, or none, at a random place."""
    content = json.loads(json.dumps(content))
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))  # type: ignore[arg-type, call-overload]
        if not keys:
            return rng.choice(VALUES)
        key = rng.choice(keys)
        inner = node[key]  # type: ignore[index]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.25:
            if rng.random() < 0.15:
                del node[key]  # type: ignore[attr-defined]
            else:
                node[key] = rng.choice(VALUES)  # type: ignore[index]
            return content
        node = inner


def images(count: int, folder: Path, seed: int = 0) -> int:
    """Write broken images of all formats and modes; returns how many."""
    rng = random.Random(seed)
    kinds = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
    folder.mkdir(parents=True)
    for number in range(count):
        kind, mode = kinds[number % len(kinds)]
        content = huge(kind, rng) if rng.random() < 0.15 else broken_bytes(good_image(kind, mode, rng), rng)
        suffix = rng.choice(sorted(MODES)) if rng.random() < 0.1 else kind
        (folder / f"{number:04d}.{suffix}").write_bytes(content)
    return count


def label_sets(good: Path, count: int, folder: Path, seed: int = 0) -> int:
    """Copies of good label files and folders, each with one file of it broken; returns how many."""
    rng = random.Random(seed)
    kinds = sorted(good.iterdir())
    folder.mkdir(parents=True)
    for number in range(count):
        original = kinds[number % len(kinds)]
        target = folder / f"{number:04d}_{original.name}"
        if original.is_dir():
            shutil.copytree(original, target)
        else:
            shutil.copy(original, target)
        files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
        victim = rng.choice(files)
        if victim.suffix == ".json" and rng.random() < 0.8:
            content: object = json.loads(victim.read_text(encoding="utf-8"))
            for _ in range(rng.choice((1, 1, 3))):
                if isinstance(content, dict | list) and content:
                    content = broken_json(content, rng)
            victim.write_text(json.dumps(content), encoding="utf-8")
        else:
            victim.write_bytes(broken_bytes(victim.read_bytes(), rng))
    return count


def read_all(what: str, folder: Path) -> Iterator[dict[str, object]]:
    """Read every file of a folder; how each ended: ``read``, the error that the package promises, or another one."""
    source = open_images(folder.parent / "pictures") if what == "labels" else None
    for path in sorted(folder.iterdir()):
        began = time.monotonic()
        try:
            if source is None:
                read_image(path)
            else:
                read_with_report(path, images=source, masks=True)
            ended = "read"
        except (UnreadableImageError, LabelError) as error:
            ended = (
                "refused" if str(path) in str(error) and len(str(error)) < 2000 else f"says too little or much: {error}"
            )
        except Exception as error:  # whatever comes out is what the test looks for
            ended = f"{type(error).__name__}: {error}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        yield {"file": path.name, "ended": ended, "seconds": time.monotonic() - began, "peak_bytes": peak}


CVAT_VIDEO = """<?xml version="1.0"?><annotations><meta><task><size>3</size><original_size><width>60</width>
<height>40</height></original_size></task></meta><track id="0" label="cat"><box frame="0" outside="0" occluded="0"
keyframe="1" xtl="1.5" ytl="2" xbr="30" ybr="20" rotation="20"/><mask frame="1" outside="0" occluded="0" keyframe="1"
rle="2, 3, 1" left="4" top="5" width="3" height="2"/><polygon frame="2" outside="0" occluded="0" keyframe="1"
points="1,1;20,1;20,30"/></track></annotations>"""
LABEL_STUDIO = [
    {
        "id": 1,
        "data": {"image": "/data/upload/1/1a2b3c4d-a.png"},
        "annotations": [
            {
                "id": 4,
                "was_cancelled": False,
                "result": [
                    {
                        "type": kind,
                        "original_width": 60,
                        "original_height": 40,
                        "value": {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 20, kind: ["cat"], **more},
                    }
                    for kind, more in (
                        ("rectanglelabels", {}),
                        ("ellipselabels", {"radiusX": 5, "radiusY": 9}),
                        ("polygonlabels", {"points": [[1, 1], [40, 1], [40, 30]]}),
                        ("brushlabels", {"format": "rle", "rle": [0, 0, 1]}),
                    )
                ],
            }
        ],
    },
    {"id": 2, "data": {"image": "b.png"}, "annotations": []},
]


def good_labels(folder: Path) -> Path:
    """Label files and folders of every format beside the images that they are of."""
    images = [
        ImageLabels.build("a.png", (40, 60), [[1, 2, 30, 20], [3, 3, 9, 9]], [0, 1], crowd=[False, True]),
        ImageLabels.build("sub/b.png", (33, 7), [[0, 0, 7, 33]], [1]),
        ImageLabels.build("empty.png", (17, 31), [], []),
    ]
    masked = [replace(image, masks=masks.of_boxes(image.boxes_xyxy, image.size_hw)) for image in images]
    labels = Labels.from_images(masked, [Category(3, "cat"), Category(7, "dog")])
    for image in images:
        path = folder / "pictures" / image.image_id
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", image.size_hw[::-1]).save(path)
    good = folder / "good"
    good.mkdir()
    for kind in FORMATS:
        out = good / kind.name if kind.is_folder else good / f"{kind.name}{kind.suffixes[0]}"
        kind.write(fitting(labels, kind)[0], out, None)
    (good / "video.xml").write_text(CVAT_VIDEO, encoding="utf-8")
    (good / "tasks.json").write_text(json.dumps(LABEL_STUDIO), encoding="utf-8")
    return good


def read_in_a_process(what: str, folder: Path) -> list[dict[str, object]]:
    """The rows of `read_all`; a hang fails the test."""
    command = [sys.executable, __file__, what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict[str, object]], count: int) -> None:
    assert len(rows) == count
    assert [row for row in rows if row["ended"] not in ("read", "refused")] == []
    assert max(row["seconds"] for row in rows) < 20
    assert rows[-1]["peak_bytes"] - rows[0]["peak_bytes"] < 2**30
    assert sum(row["ended"] == "refused" for row in rows) > count / 5  # the files are broken indeed


def test_broken_images_are_read_or_refused_by_name(tmp_path):
    count = images(500, tmp_path / "images")
    check(read_in_a_process("images", tmp_path / "images"), count)


def test_broken_labels_of_every_format_are_read_or_refused_by_name(tmp_path):
    count = label_sets(good_labels(tmp_path), 500, tmp_path / "labels")
    check(read_in_a_process("labels", tmp_path / "labels"), count)


def test_doctor_lists_every_broken_image(tmp_path):
    images(120, tmp_path / "images", seed=1)
    rows = read_in_a_process("images", tmp_path / "images")
    report = examine(tmp_path / "images")
    refused = {row["file"] for row in rows if row["ended"] == "refused"}
    assert {finding.image_id for finding in report.findings if finding.kind == "unreadable"} == refused
    assert f"unreadable: {len(refused)}" in summary(report)


if __name__ == "__main__":
    for row in read_all(sys.argv[1], Path(sys.argv[2])):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
