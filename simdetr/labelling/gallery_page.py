"""A run of autolabel in; a page out on which a person sees what became a label, what did not and why, shots beside it.

The page is one HTML file that needs nothing else, as the report's. It shows a choice, by rank and evenly, so that a
million candidates make no larger page than a hundred, and the same run always makes the same one.

Letters: M candidates, n shots, negative shots and background together, in this order.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from simdetr.boxes import pairwise_iou
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource
from simdetr.data.labels import Labels
from simdetr.data.storage import atomic_path
from simdetr.labelling.assembly import classes_without_labels, collapsed_classes
from simdetr.labelling.candidates import KEPT, REASONS, RIGHT_IOU, Candidates, quality
from simdetr.labelling.crop_features import crop_boxes
from simdetr.labelling.shots import background_boxes
from simdetr.labelling.verification import ABSTAINED, NEGATIVE
from simdetr.mining.preview import evenly
from simdetr.reports.charts import INK, LINE_COLOURS, new_figure, style_panel, to_svg
from simdetr.reports.drawing import Colour, draw_boxes, readable
from simdetr.reports.page import page_template

SHOTS_SHOWN, CLASSES_SHOWN = 12, 24
UNSURE_SHOWN, SURE_SHOWN = 18, 6
MOVED_SHOWN = 6
REJECTS_SHOWN, FEW_SHOWN = 6, 3
NEAREST_SHOWN = 3
ROWS_SHOWN = 40
"""Classes in the table of labels per class."""
SHOT_PX, CANDIDATE_PX, MOVED_PX = 64, 128, 220
LABEL: Colour = (255, 120, 20)
BEFORE: Colour = (70, 130, 230)
STAGES = {"source": "sure enough", "verify": "compared with the shots", "correct": "corrected"}
BY_VOTES = ("other_class", "negative", "tie", "unsure", "no_direction")
TELLING = (*BY_VOTES, "not_seen_again", "low_score")
"""Reasons that may be wrong, and of which more is shown."""
NO_CROP = ("too_small", "outside", "unreadable")
BINS = 40
_PAD_PX = 8.0  # around a box at least
_Key = tuple[str, int]


class _Run(Protocol):
    """What the page reads of an ``AutolabelRun``, whose module calls this one."""

    @property
    def path(self) -> Path: ...
    @property
    def labels(self) -> Path: ...
    @property
    def detector(self) -> Path: ...
    @property
    def report(self) -> Path: ...
    @property
    def stages(self) -> Path: ...


class _Inputs(Protocol):
    """What it reads of ``LabellingInputs``."""

    @property
    def images(self) -> ImageSource: ...
    @property
    def pool(self) -> tuple[str, ...]: ...
    @property
    def shots(self) -> Labels: ...
    @property
    def negatives(self) -> Labels | None: ...
    @property
    def truth(self) -> Labels | None: ...


class _Settings(Protocol):
    """What it reads of ``AutolabelSettings``; all of them are shown."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def background_shots(self) -> int: ...
    @property
    def max_ratio(self) -> float: ...


@dataclass(frozen=True)
class Shot:
    """A shot beside a candidate: its class, how similar it is, whether it is of the vote's class, and its crop."""

    name: str
    similarity: float
    voted: bool
    picture: Image.Image


@dataclass(frozen=True)
class Card:
    """A candidate: what the detector took it for, what else is known, its crop, and the nearest shots."""

    name: str
    facts: list[str]
    image_id: str
    picture: Image.Image | None
    nearest: list[Shot] = field(default_factory=list)


def write_gallery_page(
    run: _Run, inputs: _Inputs, candidates: Candidates, boxes_xyxy: NDArray[np.float32], settings: _Settings
) -> Path:
    """Write the page of a run, whole or not at all.

    Args:
        run: Where the records of its stages are, and where the page goes: ``run.report``.
        inputs: Images, shots, negative shots and truth.
        candidates: M of them, after all stages.
        boxes_xyxy: Their boxes [M, 4] after correction.
        settings: How they were made.

    Returns:
        The page's place.
    """
    page = render_gallery_page(run, inputs, candidates, boxes_xyxy, settings)
    with atomic_path(run.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run.report


def render_gallery_page(
    run: _Run, inputs: _Inputs, candidates: Candidates, boxes_xyxy: NDArray[np.float32], settings: _Settings
) -> str:
    """The page as HTML text; arguments as of `write_gallery_page`."""
    background = background_boxes(inputs.shots, candidates.labels, settings.background_shots)
    shots, chosen = _Shots.of(inputs, background), _choose(candidates)
    nearest = {row: _nearest(candidates, row, shots) for row in chosen.carded}
    in_gallery = shots.by_class()
    shown_classes = evenly(list(in_gallery), CLASSES_SHOWN)
    wanted: list[_Key] = [("shot", row) for own in shown_classes for row in in_gallery[own]]
    wanted += [("shot", row) for rows in nearest.values() for row, _ in rows]
    wanted += [("candidate", row) for row in chosen.carded] + [("moved", row) for row in chosen.moved]
    pictures, lost = _pictures(inputs, shots, candidates, boxes_xyxy, wanted)

    def cards(rows: Sequence[int]) -> list[Card]:
        made = [_card(candidates, boxes_xyxy, row, nearest[row], shots, pictures, inputs.truth) for row in rows]
        return [
            card
            for card, row in zip(made, rows, strict=True)
            if card.picture is not None or candidates.reason[row] in NO_CROP
        ]

    collapsed = collapsed_classes(candidates, settings.max_ratio)
    codes = candidates.reason.astype(str)
    names = inputs.shots.categories
    return page_template("autolabel.html.jinja").render(
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        folder=str(run.path),
        facts=_facts(inputs, candidates),
        warnings=_warnings(inputs, candidates, shots, collapsed),
        stages=_stages(run),
        measured=inputs.truth is not None,
        gallery=[
            (_name(own, names), int((shots.classes == own).sum()), [pictures.get(("shot", r)) for r in in_gallery[own]])
            for own in shown_classes
        ],
        more_classes=len(in_gallery) - len(shown_classes),
        unsure=cards(chosen.unsure),
        sure=cards(chosen.sure),
        moves=_moves(candidates, chosen, pictures),
        corrected=_corrected(candidates, boxes_xyxy, inputs.truth),
        rejects=[
            (REASONS[code], code in BY_VOTES, int((codes == code).sum()), cards(rows))
            for code, rows in chosen.rejected.items()
        ],
        charts=_charts(candidates),
        classes=_class_rows(inputs, candidates, collapsed),
        lost=lost,
        labels=str(run.labels),
        detector=str(run.detector),
        commands=_commands(run, inputs),
        settings=json.dumps(asdict(settings), indent=1),
        colours={"label": LABEL, "before": BEFORE},
    )


# ----------------------------------------------------------------------------------------------------------------------
# What is shown.


@dataclass(frozen=True)
class _Shots:
    """Shots, negative ones and background, n rows as the votes count them; both others are of class ``NEGATIVE``."""

    image_ids: list[str]
    boxes_xyxy: NDArray[np.float32]
    classes: NDArray[np.int64]

    @classmethod
    def of(cls, inputs: _Inputs, background: Labels) -> _Shots:
        negatives = [background] if inputs.negatives is None else [inputs.negatives, background]
        parts = [(inputs.shots, inputs.shots.classes)]
        parts += [(own, np.full_like(own.classes, NEGATIVE)) for own in negatives]
        return cls(
            [own.image_ids[image] for own, _ in parts for image in own.owners],
            np.concatenate([own.boxes_xyxy for own, _ in parts]),
            np.concatenate([classes for _, classes in parts]),
        )

    def by_class(self) -> dict[int, list[int]]:
        """Some rows of every class in their order, the negative ones last."""
        classes = sorted(np.unique(self.classes).tolist(), key=lambda own: (own == NEGATIVE, own))
        return {own: evenly(np.flatnonzero(self.classes == own).tolist(), SHOTS_SHOWN) for own in classes}


@dataclass(frozen=True)
class _Choice:
    """Rows of the candidates that are shown."""

    unsure: list[int]
    sure: list[int]
    most_moved: list[int]
    typical: list[int]
    rejected: dict[str, list[int]]

    @property
    def carded(self) -> list[int]:
        return [*self.unsure, *self.sure, *(row for rows in self.rejected.values() for row in rows)]

    @property
    def moved(self) -> list[int]:
        return [*self.most_moved, *self.typical]


def _choose(candidates: Candidates) -> _Choice:
    """The least sure and the surest labels, those that moved most, and of every reason the surest rejects."""
    kept, scores, classes = candidates.kept, candidates.labels.scores, candidates.labels.classes
    margin = _column(candidates, "margin", np.inf)
    rising = kept[np.lexsort((scores[kept], np.nan_to_num(margin[kept], nan=np.inf, posinf=np.inf)))]
    unsure = _varied(rising, classes, UNSURE_SHOWN)
    sure = _varied(rising[~np.isin(rising, unsure)][::-1], classes, SURE_SHOWN)

    shift = _column(candidates, "shift", 1.0)
    moved = kept[shift[kept] < 1]
    moved = moved[np.argsort(shift[moved], kind="stable")]
    most, rest = moved[:MOVED_SHOWN].tolist(), moved[MOVED_SHOWN:]
    middle = rest[len(rest) // 4 : max(len(rest) - len(rest) // 4, 0)]

    rejected = {}
    for code in (*BY_VOTES, *(code for code in REASONS if code not in (KEPT, *BY_VOTES))):
        rows = np.flatnonzero(candidates.reason == code)
        if len(rows):
            falling = rows[np.argsort(-scores[rows], kind="stable")]
            rejected[code] = _varied(falling, classes, REJECTS_SHOWN if code in TELLING else FEW_SHOWN)
    return _Choice(unsure, sure, most, evenly(middle.tolist(), MOVED_SHOWN), rejected)


def _varied(rows: NDArray[np.int64], classes: NDArray[np.int64], count: int) -> list[int]:
    """The first so many rows, of one class no more than a third while there are others."""
    seen: dict[int, int] = {}
    turns = []
    for own in classes[rows].tolist():
        turns.append(seen.get(own, 0) // max(1, count // 3))
        seen[own] = seen.get(own, 0) + 1
    chosen: list[int] = rows[np.sort(np.argsort(turns, kind="stable")[:count])].tolist()
    return chosen


def _column(candidates: Candidates, name: str, missing: float) -> NDArray[np.floating]:
    """A column of the evidence, or one value for all where a run has none."""
    found = candidates.evidence.get(name)
    return np.full(len(candidates.reason), missing) if found is None else found


def _nearest(candidates: Candidates, row: int, shots: _Shots) -> list[tuple[int, float]]:
    """Rows of the shots nearest to a candidate and their similarities; of one that was outvoted the voters first."""
    found: list[tuple[int, float]] = []
    while f"nearest_{len(found)}" in candidates.evidence:
        place = len(found)
        shot, similarity = (candidates.evidence[f"{name}_{place}"][row] for name in ("nearest", "similarity"))
        if shot < 0:
            break
        found.append((int(shot), float(similarity)))
    vote = _column(candidates, "vote", ABSTAINED)[row]
    if vote not in (ABSTAINED, candidates.labels.classes[row]):
        found.sort(key=lambda pair: shots.classes[pair[0]] != vote)  # stable, so the nearest come first
    return found[:NEAREST_SHOWN]


def _card(
    candidates: Candidates,
    boxes_xyxy: NDArray[np.float32],
    row: int,
    nearest: Sequence[tuple[int, float]],
    shots: _Shots,
    pictures: Mapping[_Key, Image.Image],
    truth: Labels | None,
) -> Card:
    """A candidate with what is known of it; with truth also what is really there."""
    labels, names = candidates.labels, candidates.labels.categories
    vote = int(_column(candidates, "vote", ABSTAINED)[row])
    margin = float(_column(candidates, "margin", np.nan)[row])
    score = f"score {labels.scores[row]:.2f}"
    facts = [f"{score} · margin {margin:.3f}" if np.isfinite(margin) else score]
    if nearest and vote != labels.classes[row]:
        facts.append(f"votes: {'nobody wins' if vote == ABSTAINED else _name(vote, names)}")
    image_id = labels.image_ids[labels.owners[row]]
    if truth is not None and image_id in truth:
        facts.append(f"truth: {_true_name(boxes_xyxy[row], truth.of(image_id), names)}")
    beside = [
        Shot(_name(own := int(shots.classes[shot]), names), similarity, own == vote, pictures["shot", shot])
        for shot, similarity in nearest
        if ("shot", shot) in pictures
    ]
    return Card(names[labels.classes[row]].name, facts, image_id, pictures.get(("candidate", row)), beside)


def _true_name(box_xyxy: NDArray[np.float32], truth: ImageLabels, names: Sequence[Category]) -> str:
    """The class of the object that a box covers by `RIGHT_IOU`, or that there is none."""
    overlaps = pairwise_iou(torch.tensor(box_xyxy)[None], torch.tensor(truth.boxes_xyxy))[0].numpy()
    overlaps = np.where(truth.crowd, 0.0, overlaps)
    if not len(overlaps) or overlaps.max() < RIGHT_IOU:
        return "no object"
    return str(names[int(truth.classes[overlaps.argmax()])].name)


def _name(own: int, names: Sequence[Category]) -> str:
    return "none of the classes" if own == NEGATIVE else names[own].name


def _moves(
    candidates: Candidates, chosen: _Choice, pictures: Mapping[_Key, Image.Image]
) -> list[tuple[str, list[Card]]]:
    """Cards of corrected labels: those that moved most, and those in the middle."""
    labels, shift = candidates.labels, _column(candidates, "shift", 1.0)

    def cards(rows: Sequence[int]) -> list[Card]:
        return [
            Card(
                labels.categories[labels.classes[row]].name,
                [f"IoU {shift[row]:.2f} · score {labels.scores[row]:.2f}"],
                labels.image_ids[labels.owners[row]],
                pictures["moved", row],
            )
            for row in rows
            if ("moved", row) in pictures
        ]

    groups = [("Moved most", cards(chosen.most_moved)), ("Typical", cards(chosen.typical))]
    return [group for group in groups if group[1]]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers.


def _facts(inputs: _Inputs, candidates: Candidates) -> list[tuple[str, str, str]]:
    """(Name, number, remark) of the whole."""
    reasons, kept = candidates.reason, candidates.kept
    counts = np.bincount(inputs.shots.classes[~inputs.shots.crowd], minlength=inputs.shots.num_classes)
    some = counts[counts > 0]
    per_class = (
        "–" if not len(some) else f"{some.min()}" if some.min() == some.max() else f"{some.min()} – {some.max()}"
    )
    images = len(np.unique(candidates.labels.owners[kept]))
    facts = [
        ("images", f"{len(inputs.pool):,}", "to be labelled"),
        ("shots per class", per_class, f"{counts.sum():,} shots of {len(some):,} classes"),
        ("labels", f"{len(kept):,}", f"on {images:,} images"),
        ("rejected", _share(len(reasons) - len(kept), len(reasons)), f"of {len(reasons):,} detections"),
    ]
    outvoted = int(np.isin(reasons.astype(str), BY_VOTES).sum())
    judged = outvoted + int(np.isin(reasons.astype(str), (KEPT, "duplicate")).sum())
    facts.append(("rejected by the shots", _share(outvoted, judged), f"of {judged:,} with enough score"))
    if len(kept):
        facts.append(("lowest score", f"{candidates.labels.scores[kept].min():.2f}", "of a label"))
    return facts


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _warnings(inputs: _Inputs, candidates: Candidates, shots: _Shots, collapsed: Mapping[str, int]) -> list[str]:
    """What a person should know first, a sentence each."""
    found = []
    if not len(candidates.kept):
        codes, counts = np.unique(candidates.reason.astype(str), return_counts=True)
        why = f" Most often: {REASONS[codes[counts.argmax()]]}." if len(codes) else " The detector found nothing."
        found.append(f"No candidate became a label, so there is nothing new to learn.{why} Give more shots.")
    for name, count in collapsed.items():
        found.append(
            f"{name} has {count:,} labels, far more than the other classes. Often such a class has swallowed others or "
            "the background: look at its labels before all others."
        )
    if len(np.unique(shots.classes)) == 1:
        found.append("All shots are of one class, so no shot could speak against a candidate. Give negative shots.")
    empty = classes_without_labels(candidates, inputs.shots)
    if len(candidates.kept) and empty:
        more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
        found.append(f"Classes without a single new label: {', '.join(empty[:8])}{more}.")
    return found


def _stages(run: _Run) -> list[dict[str, Any]]:
    """A row per stage: how many are left, how many it rejected for which reason, and quality where there is truth."""
    rows, before = [], dict[str, int]()
    for record in json.loads(run.stages.read_text(encoding="utf-8")):
        counts: dict[str, int] = record["counts"]
        fresh = {REASONS[code]: counts[code] - before.get(code, 0) for code in REASONS if code in counts and code}
        rejected = {text: count for text, count in fresh.items() if count > 0}
        row = {"title": STAGES[record["stage"]], "left": counts.get("kept", 0), "rejected": rejected}
        rows.append(row | {"quality": record.get("quality")})
        before = counts
    return rows


def _corrected(candidates: Candidates, boxes_xyxy: NDArray[np.float32], truth: Labels | None) -> dict[str, Any] | None:
    """How far labels moved, and with truth their mean IoU before and after; None if none moved."""
    shift = _column(candidates, "shift", 1.0)[candidates.kept]
    if not (shift < 1).any():
        return None
    found = {"moved": int((shift < 1).sum()), "labels": len(shift), "median": float(np.median(shift))}
    if truth is None:
        return found
    ious = [quality(candidates, boxes, truth)["mean_iou"] for boxes in (candidates.labels.boxes_xyxy, boxes_xyxy)]
    return found | {"before": ious[0], "after": ious[1]}


def _class_rows(inputs: _Inputs, candidates: Candidates, collapsed: Mapping[str, int]) -> dict[str, Any]:
    """Rows of the table of labels per class, the most labels first; of many classes the first and the last."""
    labels, codes = candidates.labels, candidates.reason.astype(str)
    size = labels.num_classes
    shots = np.bincount(inputs.shots.classes[~inputs.shots.crowd], minlength=size)
    outvoted = np.bincount(labels.classes[np.isin(codes, BY_VOTES)], minlength=size)
    kept = np.bincount(labels.classes[codes == KEPT], minlength=size)
    order = np.lexsort((np.arange(size), -kept)).tolist()
    rows = [
        {
            "name": (name := labels.categories[own].name),
            "shots": int(shots[own]),
            "outvoted": int(outvoted[own]),
            "kept": int(kept[own]),
            "share": kept[own] / max(1, kept.max()),
            "collapsed": name in collapsed,
        }
        for own in order
    ]
    left_out = max(0, len(rows) - ROWS_SHOWN)
    last = ROWS_SHOWN // 4
    return {"first": rows[: ROWS_SHOWN - last] if left_out else rows, "left_out": left_out, "last": rows[-last:]}


def _charts(candidates: Candidates) -> list[tuple[str, str, str]]:
    """(Title, caption, SVG) of scores, and of how often the votes agree with the detector at a score."""
    scores, kept = candidates.labels.scores, candidates.reason == KEPT
    if not len(scores):
        return []
    figure = new_figure(1)
    axes = figure.subplots()
    edges = np.linspace(0, 1, BINS + 1)
    for rows, name, colour in ((~kept, "rejected", LINE_COLOURS[0]), (kept, "labels", LINE_COLOURS[1])):
        counts = np.histogram(scores[rows], edges)[0]
        axes.stairs(counts, edges, label=name, color=colour, fill=name == "labels", linewidth=1.6, alpha=0.85)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    style_panel(axes, "candidates", "score of the detector")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    caption = "Counts are on a logarithmic axis. Labels should lie to the right of most rejects."
    charts = [("Scores of labels and rejects", caption, to_svg(figure, "scores"))]

    vote = _column(candidates, "vote", ABSTAINED)
    asked = np.flatnonzero(_column(candidates, "nearest_0", -1) >= 0)
    if not len(asked):
        return charts
    asked = asked[np.argsort(-scores[asked], kind="stable")]
    agrees, sorted_scores = (vote == candidates.labels.classes)[asked], scores[asked]
    parts = np.array_split(np.arange(len(asked)), max(1, min(15, len(asked) // 20)))
    figure = new_figure(1)
    axes = figure.subplots()
    above = np.cumsum(agrees) / np.arange(1, len(agrees) + 1)
    lines = (
        ("around this score", [agrees[part].mean() for part in parts], [sorted_scores[part].mean() for part in parts]),
        ("at it and above", [above[part[-1]] for part in parts], [sorted_scores[part[-1]] for part in parts]),
    )
    for (name, shares, at), colour in zip(lines, LINE_COLOURS, strict=False):
        axes.plot(at, shares, color=colour, label=name, linewidth=1.6, marker="o", markersize=3.5)
    if kept.any():
        axes.axvline(float(scores[kept].min()), color=INK, alpha=0.5, linewidth=1, linestyle="--")
    style_panel(axes, "share of the candidates", "score of the detector")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    caption = (
        "How often the nearest shots name the class that the detector named. It should rise with the score; where it "
        "is low, one of the two is guessing. Dashed: the lowest score of a label."
    )
    return [*charts, ("Agreement of the shots with the detector", caption, to_svg(figure, "agreement"))]


def _commands(run: _Run, inputs: _Inputs) -> list[tuple[str, str]]:
    """(What for, command line)."""
    detector, root, labels = (shlex.quote(str(place)) for place in (run.detector, inputs.images.root, run.labels))
    return [
        (
            "Measure the detector on images that people labelled",
            f"simdetr evaluate --images val/ --labels val.json --checkpoint {detector}",
        ),
        (
            "Look at what it finds",
            f"simdetr predict --images {root} --checkpoint {detector} --out found.json --pictures drawn/",
        ),
        (
            "Train on the labels once more, after you mended them or with other settings",
            f"simdetr finetune --init {detector} --images {root} --labels {labels} --out runs/next",
        ),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures.


def _pictures(
    inputs: _Inputs, shots: _Shots, candidates: Candidates, boxes_xyxy: NDArray[np.float32], wanted: Sequence[_Key]
) -> tuple[dict[_Key, Image.Image], list[str]]:
    """The pictures that can be made, each image decoded once, and the ids of the images that cannot be read."""
    labels = candidates.labels
    by_image: dict[str, list[_Key]] = {}
    for key in dict.fromkeys(wanted):
        kind, row = key
        image_id = shots.image_ids[row] if kind == "shot" else labels.image_ids[labels.owners[row]]
        by_image.setdefault(image_id, []).append(key)
    ids, made, read = list(by_image), dict[_Key, Image.Image](), set[str]()
    for place, image in readable(inputs.images, ids):
        read.add(ids[place])
        for kind, row in by_image[ids[place]]:
            if kind == "shot":
                picture = _crop(image, shots.boxes_xyxy[row])
            elif kind == "candidate":
                own = boxes_xyxy if candidates.reason[row] == KEPT else labels.boxes_xyxy
                picture = _framed(image, own[row : row + 1], [LABEL], 0.2, CANDIDATE_PX)
            else:
                both = np.stack([labels.boxes_xyxy[row], boxes_xyxy[row]])
                picture = _framed(image, both, [BEFORE, LABEL], 0.4, MOVED_PX)
            if picture is not None:
                made[kind, row] = picture
    return made, [image_id for image_id in ids if image_id not in read]


def _crop(image: Tensor, box_xyxy: NDArray[np.float32]) -> Image.Image | None:
    """A shot as the encoder sees it; None where its box shows nothing of the image."""
    if not _meets(image, box_xyxy):
        return None
    crop = crop_boxes(image, torch.tensor(box_xyxy)[None], SHOT_PX)
    return to_pil_image(crop[0])  # type: ignore[no-any-return]


def _framed(
    image: Tensor, boxes_xyxy: NDArray[np.float32], colours: list[Colour], pad: float, side_px: int
) -> Image.Image | None:
    """The square around some boxes with these drawn on it; None where the image shows nothing of them."""
    low, high = boxes_xyxy[:, :2].min(axis=0), boxes_xyxy[:, 2:].max(axis=0)
    if not _meets(image, np.concatenate([low, high])):
        return None
    side = float((high - low).max())
    reach = side / 2 + max(pad * side, _PAD_PX)
    left, top = np.floor((low + high) / 2 - reach).astype(int)
    right, bottom = np.ceil((low + high) / 2 + reach).astype(int)
    height, width = image.shape[1:]
    left, top = max(0, min(left, width - 1)), max(0, min(top, height - 1))
    part = image[:, top : max(top + 1, bottom), left : max(left + 1, right)]
    moved = boxes_xyxy - np.array([left, top, left, top], np.float32)
    return draw_boxes(part, moved, colours=colours, min_side_px=side_px, max_side_px=side_px)


def _meets(image: Tensor, box_xyxy: NDArray[np.float32]) -> bool:
    """Whether some of a box lies within the image."""
    height, width = image.shape[1:]
    return bool((np.minimum(box_xyxy[2:], (width, height)) > np.maximum(box_xyxy[:2], 0)).all())
