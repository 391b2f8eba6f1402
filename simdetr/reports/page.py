"""What a run found, as data -> one HTML file that needs nothing else: pictures inside, no scripts, no network.

`simdetr.reports.report.collect_run` fills the data from a run's folder; anything else may fill it as well. A part
without data is shown with the reason, never left out silently. The preview of a mining has the same layout and filters.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from simdetr.data.storage import atomic_path
from simdetr.evaluation.compare import format_mean, summarise_seeds
from simdetr.reports.charts import MAX_POINTS, Curve, draw_clustering, draw_curve
from simdetr.reports.drawing import Colour

JPEG_QUALITY = 80
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
NOT_GIVEN = {
    "steps": "no step has been recorded.",
    "samples": "no sample images were given.",
    "origins": "nothing is known of where the boxes come from.",
    "montages": "no pseudo-classes were given.",
    "clustering": "no clustering was given.",
    "recall": "there is no ground truth to compare the boxes with.",
    "curves": "no training run has logged its metrics.",
    "comparison": "no comparison of initialisations has been run.",
    "config": "no configuration was given.",
}
SIZES = {"small": "below 32² px²", "medium": "from 32² to 96² px²", "large": "above 96² px²"}


def _recall_columns(limits: Sequence[int], judged: int, at_half: str) -> dict[str, tuple[str, str]]:
    """Key of a recall row -> (heading, explanation); sizes and IoU 0.5 at ``judged`` boxes per image."""
    columns = {f"AR@{limit}": (f"AR@{limit}", f"average recall, {limit} boxes per image") for limit in limits}
    columns["AR@1"] = ("AR@1", "average recall over IoU 0.50 to 0.95, best box of each image")
    covered = f"share of objects that one of {judged} boxes covers with IoU of at least 0.5"
    sizes = {f"AR@{judged}{size[0]}": (size, f"AR@{judged} of objects {area}") for size, area in SIZES.items()}
    return columns | {f"recall50@{judged}": (at_half, covered)} | sizes


RECALL_COLUMNS = _recall_columns((1, 10, 25, 100), 100, "recall at IoU 0.5")
RIVAL_COLUMNS = _recall_columns((1, 10, 25, 30, 100), 25, "IoU 0.5")  # ours are no more than 25


@dataclass(frozen=True)
class StepRow:
    """One finished step of the flow: what it made ("812 proposals"), how long it took, and a remark."""

    name: str
    count: str
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One image as every stage sees it: (caption, picture with boxes) in the order of the stages."""

    image_id: str
    pictures: list[tuple[str, Image.Image]]


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows."""

    title: str  # heading of the page
    created: str  # date and time, as text
    command: str = ""  # the command line that made the run; empty if unknown
    steps: list[StepRow] = field(default_factory=list)  # the flow in order
    samples: list[Sample] = field(default_factory=list)  # images with their boxes per stage
    births: list[tuple[str, Colour]] = field(default_factory=list)
    """What the colours of these boxes say, (title, RGB); empty if a colour is a class."""
    origins: list[dict[str, Any]] = field(default_factory=list)  # per stage, of `simdetr.reports.report.origin_rows`
    montages: list[tuple[str, Image.Image]] = field(default_factory=list)  # (title, sheet of crops) per pseudo-class
    agreement: list[dict[str, Any]] = field(default_factory=list)
    """Per stage what its detector says of its pseudo-classes; the page has this table only if there are any."""
    clustering: Mapping[str, Any] | None = None  # `simdetr.mining.kmeans.clustering_record` of the pseudo-classes
    recall: list[dict[str, Any]] = field(default_factory=list)  # a `recall_row` per stage
    rivals: list[dict[str, Any]] = field(default_factory=list)
    """One per method, ours first, as ``recall``; the page has this part only if there are any."""
    rival_samples: list[Sample] = field(default_factory=list)  # images with the boxes of every method
    scores: Mapping[str, str] = field(default_factory=dict)
    """Name and text of the scores of a trained head; the page has this part only if there are any."""
    predictions: list[Sample] = field(default_factory=list)  # images with what the head found on them
    curves: list[Curve] = field(default_factory=list)  # learning curves
    comparison: list[dict[str, Any]] | None = None  # one row per fine-tuning, as `simdetr.evaluation.compare` has it
    config: str = ""  # the resolved configuration as text
    missing: Mapping[str, str] = field(default_factory=dict)
    """Reason per part (attribute name) that is empty; a general one is shown where none is given."""


def render_report(data: ReportData) -> str:
    """The page as HTML text; ValueError for a curve with nothing to draw, or comparison rows that lack a key."""
    comparison = summarise_seeds(data.comparison or [])
    seconds = [step.seconds for step in data.steps if step.seconds is not None]
    return page_template("report.html.jinja").render(
        data=data,
        reasons={**NOT_GIVEN, **data.missing},
        total_seconds=sum(seconds) if seconds else None,
        origin_columns=list(dict.fromkeys(title for row in data.origins for title in row["shares"])),
        recall_columns=columns_of(data.recall, RECALL_COLUMNS),
        rival_columns=columns_of(data.rivals, RIVAL_COLUMNS),
        drawn_clustering=draw_clustering(data.clustering) if data.clustering else "",
        drawn_curves=[(curve.name, draw_curve(curve)) for curve in data.curves],
        max_points=MAX_POINTS,
        comparison=comparison,
        comparison_metrics=list(comparison[0].mean) if comparison else [],
        comparison_top=max((s.mean["AP"] for s in comparison if s.mean["AP"] > 0), default=0.0),
    )


def write_report(data: ReportData, folder: Path) -> Path:
    """Write `render_report` as ``index.html`` in ``folder``, whole or not at all; returns its path."""
    page, path = render_report(data), folder / "index.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def columns_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The columns that any row has."""
    return {key: column for key, column in columns.items() if any(key in row for row in rows)}


@functools.cache
def page_template(name: str) -> Template:
    """A template of this folder; the pages extend ``page.html.jinja``."""
    environment = Environment(
        loader=PackageLoader("simdetr.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "data_uri": data_uri,
        "duration": format_duration,
        "mean_std": format_mean,
        "percent": _percent,
    }
    return environment.get_template(name)


def data_uri(image: Image.Image) -> str:
    """The picture as a JPEG inside a ``data:`` address."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def format_duration(seconds: float | None) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(count: float | None) -> str:
    """``950 B``, ``1.3 kB``, ``14 MB``; a dash for None."""
    if count is None:
        return "–"
    power = 0
    while count >= 999.5 and power < len(BYTE_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.1f} {BYTE_UNITS[power]}" if power and count < 9.95 else f"{count:.0f} {BYTE_UNITS[power]}"


def _percent(fraction: float) -> str:
    return "–" if math.isnan(fraction) else f"{100 * fraction:.1f}"
