"""The labelling app's bars: results/labelling_app.json in, the table of docs/results.md out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Part = Mapping[str, Any]
POINTER_MS, NEXT_MS, PAGE_MS, SERVER_MB, SAVE_MS, DETECT_S = 16.0, 200.0, 1000.0, 300.0, 150.0, 1.0
BESIDE = {"alone": "", "training": ", a training beside it"}


def labelling_app(result: Part) -> str:
    """One table: what was measured, its bar, and whether it was met."""
    parts = result["parts"]
    lines = [
        (
            "**The labelling app** (`simdetr label`, drawn scenes of 640 × 480 px; the recipe for a machine without a "
            "GPU is what trains and detects; other work on the machine disturbs the times, its load is named below):"
        ),
        "",
        "| | measured | bar | met |",
        "|---|--:|--:|---|",
    ]
    for name, rows in ROWS.items():
        if name in parts:
            lines += [
                f"| {what} | {found} | {bar} | {'yes' if met else 'no'} |"
                for what, found, bar, met in rows(parts[name])
            ]
    lines += ["", *(_source(name, parts[name]) for name in ROWS if name in parts)]
    return "\n".join(lines)


Row = tuple[str, str, str, bool]


def _editor(part: Part) -> list[Row]:
    rows: list[Row] = []
    for name, beside in BESIDE.items():
        lags = [one["edge_ms"]["median"] for one in part[name]["pointer"]]
        most = max(one["boxes"] for one in part[name]["pointer"])
        found = f"{min(lags):.1f} to {max(lags):.1f} ms"
        rows.append(
            (
                f"a box follows the pointer, up to {most} boxes{beside} (medians)",
                found,
                f"{POINTER_MS:.0f} ms",
                max(lags) < POINTER_MS,
            )
        )
    for name, beside in BESIDE.items():
        times = [part[name][f"{how}_ms"]["median"] for how in ("enter", "skip", "click")]
        found = " / ".join(f"{time:.0f}" for time in times) + " ms"
        what = f"next image and its {part['boxes_next']} boxes there, by Enter / skip / click{beside} (medians)"
        rows.append((what, found, f"{NEXT_MS:.0f} ms", max(times) < NEXT_MS))
    return rows


def _queue(part: Part) -> list[Row]:
    slowest, times = max(part["median_ms"].items(), key=lambda pair: pair[1]), part["median_ms"]
    page = f"{times['first page of the list']:.0f} ms; {slowest[1]:.0f} ms ({slowest[0]})"
    images = f"{part['images']:,} images"
    beyond = part["server_mb"] - part["bare_torch_mb"]
    memory = f"{part['server_mb']:,.0f} MB; `import torch` alone: {part['bare_torch_mb']:,.0f} MB"
    return [
        (f"{images}: first page; slowest request", page, f"{PAGE_MS:.0f} ms", slowest[1] < PAGE_MS),
        (
            f"{images}: the server, which loads no torch",
            memory,
            f"{SERVER_MB:.0f} MB beyond",
            max(beyond, part["server_mb"]) < SERVER_MB,
        ),
    ]


def _edits(part: Part) -> list[Row]:
    rows: list[Row] = []
    who = f"{part['people']} people × {part['edits_per_second']:.0f} edits/s for {part['seconds']:.0f} s"
    for name, beside in BESIDE.items():
        found = part[name]
        faults = f"{found['lost']} / {found['doubled']} of {found['edits']:,}"
        rows.append((f"{who}{beside}: edits lost / doubled", faults, "none", not (found["lost"] or found["doubled"])))
        times = f"{found['p95_ms']:.0f} ms (median {found['median_ms']:.0f})"
        rows.append(("the same: an edit is answered in (95 %)", times, f"{SAVE_MS:.0f} ms", found["p95_ms"] < SAVE_MS))
    return rows


def _detect(part: Part) -> list[Row]:
    what = f"detect on one image, the worker warm ({part['parameters'] / 1e6:.1f} M parameters)"
    return [
        (
            what,
            f"{part['median_s']:.2f} s (first {part['first_s']:.1f})",
            f"{DETECT_S:.0f} s",
            part["median_s"] < DETECT_S,
        )
    ]


def _kills(part: Part) -> list[Row]:
    number = sum(part["kills"].values())
    kept = f"{part['lost']} / {part['doubled']} of {part['edits']:,}"
    run = f"{part['resumed']} times resumed, {part['run']} at {part['steps']} steps"
    return [
        (
            f"{number} kills of server, worker or both: edits lost / doubled",
            kept,
            "none",
            not (part["lost"] or part["doubled"]),
        ),
        (f"{number} kills: the training", run, "goes on", part["run"] == "done"),
    ]


def _source(name: str, part: Part) -> str:
    own, note = part["environment"], f" ({part['note']})" if "note" in part else ""
    return (
        f"<sub>{name}{note}: {own['processor']}, {own['cores']} cores, load {own['load_at_start']:.1f} before and "
        f"{own['load_at_end']:.1f} after, torch {own['versions']['torch']}, {own['date']}: `{own['command']}`</sub>\n"
    )


ROWS: dict[str, Callable[[Part], list[Row]]] = {
    "editor": _editor,
    "queue": _queue,
    "edits": _edits,
    "detect": _detect,
    "kills": _kills,
}
