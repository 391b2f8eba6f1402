"""Images, and labels if there are any, in; a report of what is wrong with them out, before a long run meets it.

Only what would stop a run is fatal: no readable image, too many unreadable ones, labels that cannot be used. Labels are
read and checked by the functions that the commands call.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from simdetr.data.annotations import LabelError
from simdetr.data.images import (
    ImageRecord,
    ImageSource,
    UnreadableImageError,
    darkness,
    open_images,
    page_count,
    read_image,
)
from simdetr.data.label_checks import complaints
from simdetr.data.label_files import read_with_report
from simdetr.data.label_report import LabelReport
from simdetr.data.labels import Labels
from simdetr.data.machine import in_order
from simdetr.data.quarantine import OF_MINING
from simdetr.data.storage import read_lists

TINY_SIDE_PX = 32
EXTREME_ASPECT = 8.0
HUGE_PIXELS = 50_000_000
CONSTANT_RANGE = 2  # largest difference, of 255, between pixels of an image that counts as one colour
_EXAMPLES_PER_KIND = 5
_READ_AHEAD_PER_THREAD = 4


@dataclass(frozen=True)
class Finding:
    """Something odd about one image: its kind, such as ``"duplicate"``, the image and the detail."""

    kind: str
    image_id: str
    detail: str


@dataclass(frozen=True)
class DoctorReport:
    """What `examine` found.

    Attributes:
        path: what was examined.
        total: number of images listed.
        readable: number of images that can be decoded.
        findings: unreadable, duplicate and suspicious images, and images whose labels do not fit them.
        suffixes: number of images by file suffix.
        sizes_hw: (height, width) in pixels of every readable image, in the order of the source.
        fatal_reasons: what would stop a run.
        labels: the labels, where they could be read.
        label_problems: what is wrong inside the label file, and what comes out otherwise than it stands there.
    """

    path: Path
    total: int
    readable: int
    findings: tuple[Finding, ...] = ()
    suffixes: dict[str, int] = field(default_factory=dict)
    sizes_hw: tuple[tuple[int, int], ...] = ()
    fatal_reasons: tuple[str, ...] = ()
    labels: Labels | None = None
    label_problems: LabelReport | None = None

    @property
    def fatal(self) -> bool:
        """Whether a run on these images and labels would stop."""
        return bool(self.fatal_reasons)

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by kind."""
        return dict(Counter(finding.kind for finding in self.findings))


def examine(
    path: str | Path,
    labels: str | Path | None = None,
    *,
    root: str | Path | None = None,
    max_unreadable: float = 0.05,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> DoctorReport:
    """Decode every image once and check it, then check the labels against the images.

    Args:
        path: whatever `open_images` takes.
        labels: any label file or folder; a COCO ``path`` with annotations is its own labels.
        root: folder that listed images are relative to.
        max_unreadable: share of unreadable images past which a run stops.
        threads: images decoded at the same time; a few are in memory at once, whatever the size of the set.
        progress: called with the number of images done and the total.
    """
    path = Path(path)
    if labels is None and path.suffix.lower() == ".json" and _has_annotations(path):
        labels = path
    try:
        source = open_images(path, root)
    except (OSError, ValueError) as error:
        return DoctorReport(path, total=0, readable=0, fatal_reasons=(str(error),))
    findings: list[Finding] = []
    sizes: dict[str, tuple[int, int]] = {}
    first_with: dict[str, str] = {}
    for done, checked in enumerate(in_order(_check, source, threads, _READ_AHEAD_PER_THREAD * threads), start=1):
        findings += checked.findings
        if checked.size_hw is not None:
            sizes[checked.image_id] = checked.size_hw
            first = first_with.setdefault(checked.digest, checked.image_id)
            if first != checked.image_id:
                findings.append(Finding("duplicate", checked.image_id, f"same content as {first}"))
        if progress is not None:
            progress(done, len(source))
    fatal: list[str] = []
    unreadable = len(source) - len(sizes)
    if not sizes:
        fatal.append(f"none of the {len(source)} images can be read")
    elif unreadable > max_unreadable * len(source):
        fatal.append(
            f"{unreadable} of {len(source)} images cannot be read, more than {max_unreadable:.0%}; mining and "
            f"training stop there, unless {OF_MINING} allows more"
        )
    truth: Labels | None = None
    problems: LabelReport | None = None
    if labels is not None:
        try:
            truth, problems = read_with_report(labels, images=source)
            findings += _label_findings(truth, source, sizes)
            fatal += complaints(truth, source, labels, problems)
        except LabelError as error:
            fatal.append(str(error))
    return DoctorReport(
        path=path,
        total=len(source),
        readable=len(sizes),
        findings=tuple(findings),
        suffixes=dict(Counter(Path(image_id).suffix.lower() for image_id in source.ids)),
        sizes_hw=tuple(sizes.values()),
        fatal_reasons=tuple(fatal),
        labels=truth,
        label_problems=problems,
    )


def summary(report: DoctorReport) -> str:
    """The report as lines of text: counts, sizes, findings with examples, labels, and the verdict."""
    lines = [f"{report.path}: {report.total} images, {report.readable} readable"]
    if report.suffixes:
        lines.append("formats: " + ", ".join(f"{count} {suffix}" for suffix, count in sorted(report.suffixes.items())))
    if report.sizes_hw:
        sides = np.array(report.sizes_hw)
        for name, values in (("height", sides[:, 0]), ("width", sides[:, 1])):
            lines.append(f"{name}: {values.min()} to {values.max()} px, median {np.median(values):.0f}")
    for kind, count in sorted(report.counts.items()):
        examples = [finding for finding in report.findings if finding.kind == kind][:_EXAMPLES_PER_KIND]
        lines.append(f"{kind}: {count}")
        lines += [f"  {finding.image_id}: {finding.detail}" for finding in examples]
        lines += [f"  and {count - len(examples)} more"] if count > len(examples) else []
    lines += _label_lines(report)
    lines += [f"FATAL: {reason}" for reason in report.fatal_reasons]
    lines.append("a run would stop here" if report.fatal else "nothing here would stop a run")
    return "\n".join(lines)


def _has_annotations(path: Path) -> bool:
    """Whether a JSON is more than a list of images."""
    try:
        return bool(read_lists(path, "COCO file", "images").get("annotations"))
    except LabelError:  # `open_images` says what is wrong
        return False


@dataclass(frozen=True)
class _Checked:
    image_id: str
    size_hw: tuple[int, int] | None  # None: unreadable
    digest: str
    findings: tuple[Finding, ...]


def _check(record: ImageRecord) -> _Checked:
    try:
        pixels = read_image(record)
        with record.open() as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()
    except (UnreadableImageError, OSError) as error:
        reason = error.reason if isinstance(error, UnreadableImageError) else str(error)
        return _Checked(record.id, None, "", (Finding("unreadable", record.id, reason),))
    height, width = pixels.shape[-2:]
    short, long = min(height, width), max(height, width)
    spread = int((pixels.amax(dim=(1, 2)).int() - pixels.amin(dim=(1, 2)).int()).max())
    size = f"{width}×{height} px"
    odd = {
        "tiny": (short < TINY_SIDE_PX, size),
        "extreme aspect": (long > EXTREME_ASPECT * short, size),
        "huge": (height * width > HUGE_PIXELS, size),
        "one colour": (spread <= CONSTANT_RANGE, f"pixels differ by at most {spread} of 255"),
    }
    found = [Finding(kind, record.id, detail) for kind, (is_odd, detail) in odd.items() if is_odd]
    if (dark := darkness(record, pixels)) and spread > CONSTANT_RANGE:
        found.append(Finding("dark", record.id, dark))
    if (pages := page_count(record)) > 1:
        found.append(Finding("more pages", record.id, f"{pages} pages or frames, the first is read"))
    return _Checked(record.id, (height, width), digest, tuple(found))


def _label_findings(labels: Labels, source: ImageSource, sizes: dict[str, tuple[int, int]]) -> Iterator[Finding]:
    for image_id, (height, width) in zip(labels.image_ids, labels.sizes_hw.tolist(), strict=True):
        actual = sizes.get(image_id)
        if image_id not in source:
            yield Finding("labelled image missing", image_id, f"not in {source.root}")
        elif actual is not None and actual != (height, width):
            detail = f"labels say {width}×{height} px, the upright image has {actual[1]}×{actual[0]}"
            yield Finding("label size differs", image_id, detail)


def _label_lines(report: DoctorReport) -> list[str]:
    labels = report.labels
    if labels is None:
        return []
    boxes_per_image = np.diff(labels.offsets)
    per_class = np.bincount(labels.classes, minlength=labels.num_classes)
    without = [category.name for category, count in zip(labels.categories, per_class, strict=True) if count == 0]
    counts = f"{len(labels.boxes_xyxy)} boxes of {labels.num_classes} categories on {len(labels)} images"
    empty, crowds = int((boxes_per_image == 0).sum()), int(labels.crowd.sum())
    lines = [f"labels: {counts}, {empty} images without boxes, {crowds} crowds"]
    if len(per_class):
        lines.append(f"boxes per category: {per_class.min()} to {per_class.max()}, median {np.median(per_class):.0f}")
    if without:
        lines.append(f"categories without boxes: {', '.join(without[:_EXAMPLES_PER_KIND])} ({len(without)})")
    if report.label_problems is not None:
        lines += [f"label problem: {line}" for line in report.label_problems.lines()]
        lines += [f"label note: {line}" for line in report.label_problems.note_lines()]
    return lines
