"""How often the interval of the errors left covers them, and how often a bound on them stops too early.

Each loop draws a set of images that differ (a gamma distribution of this shape multiplies an image's rates of errors;
``inf``: all alike), two fifths of the errors missed objects, the others wrong detections, the more likely the lower the
score or whatever the score. A round gives a batch of images of the lowest scores to the person, draws an audit from the
others, and estimates the errors on the rest, which the loop knows. Coverage is that of the last round of a loop.

python -m benchmarks.stopping --loops 200     a quicker look
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.environment import RESULTS, environment, write_result
from simdetr.data.annotations import Category
from simdetr.data.labels import Labels
from simdetr.labelling.stopping import Audit, ErrorBound, ErrorEstimate, Round, draw_audit, errors_left

MISSED_SHARE = 0.4
IDS = tuple(f"{i:05d}" for i in range(6000))


@dataclass(frozen=True)
class Setting:
    """One kind of loop; ``rates`` are errors per detection, one per round."""

    images: int = 500
    audited: int = 20
    rates: tuple[float, ...] = (0.1,)
    shape: float = math.inf
    informative: bool = True
    objects: float = 5.0
    batch: int = 20


@dataclass(frozen=True)
class Detections:
    """Of one round's detector on the images left, by column; images are numbered from 0."""

    counts: np.ndarray
    scores: np.ndarray
    wrong: np.ndarray
    missed: np.ndarray

    def of(self, images: np.ndarray) -> Detections:
        """Those on some of the images, renumbered."""
        starts = np.cumsum(self.counts) - self.counts
        counts = self.counts[images]
        rows = np.repeat(starts[images] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return Detections(counts, self.scores[rows], self.wrong[rows], self.missed[images])

    def labels(self) -> Labels:
        """Without what is wrong."""
        images, rows = len(self.counts), len(self.scores)
        return Labels(
            image_ids=IDS[:images],
            sizes_hw=np.full((images, 2), 100),
            offsets=np.concatenate([[0], np.cumsum(self.counts)]),
            boxes_xyxy=np.tile(np.array([0, 0, 9, 9], np.float32), (rows, 1)),
            classes=np.zeros(rows, np.int64),
            scores=self.scores,
            categories=(Category(1, "object"),),
            areas=np.full(rows, 81.0),
            crowd=np.zeros(rows, bool),
        )

    def audit(self) -> Audit:
        """With what a person who makes no mistakes finds."""
        return Audit(np.repeat(np.arange(len(self.counts)), self.counts), self.scores, self.wrong, self.missed)


def detect(rng: np.random.Generator, setting: Setting, counts: np.ndarray, hard: np.ndarray, rate: float) -> Detections:
    """A detector with this rate of errors on images of so many objects and of this difficulty."""
    scores = rng.beta(3, 1.5, counts.sum()).astype(np.float32)
    share = (1 - scores) ** 2 * 33 / 5 if setting.informative else np.ones(len(scores))  # of mean 1
    chance = np.minimum(rate * (1 - MISSED_SHARE) * share * np.repeat(hard, counts), 0.95)
    missed = rng.poisson(rate * MISSED_SHARE * setting.objects * hard)
    return Detections(counts, scores, rng.random(len(scores)) < chance, missed)


def loop(rng: np.random.Generator, setting: Setting) -> Iterator[tuple[ErrorEstimate, int]]:
    """Estimate and true number of the errors left after each round of one loop."""
    hard = np.ones(setting.images)
    if math.isfinite(setting.shape):
        hard = rng.gamma(setting.shape, 1 / setting.shape, setting.images)
    counts = rng.poisson(setting.objects * rng.gamma(3, 1 / 3, setting.images))
    for number, rate in enumerate(setting.rates):
        found = detect(rng, setting, counts, hard, rate)
        sums = np.bincount(np.repeat(np.arange(len(counts)), counts), found.scores, minlength=len(counts))
        unseen = np.sort(np.argsort(sums / np.maximum(counts, 1), kind="stable")[setting.batch :])
        seed = int(rng.integers(1 << 31)) + number
        audited = np.array([int(i) for i in draw_audit([IDS[i] for i in unseen], setting.audited, seed)])
        rest = np.setdiff1d(unseen, audited)
        left = found.of(rest)
        yield errors_left(found.of(audited).audit(), left.labels()), int(left.wrong.sum() + left.missed.sum())
        counts, hard = counts[rest], hard[rest]


def coverage(setting: Setting, loops: int, seed: int = 0) -> dict[str, object]:
    """How often the last interval of a loop covers, is too high or too low, and how wide it is."""
    rng = np.random.default_rng(seed)
    last = [list(loop(rng, setting))[-1] for _ in range(loops)]
    low, high, total, truth = (
        np.array(values) for values in zip(*((e.low, e.high, e.total, t) for e, t in last), strict=True)
    )
    covers = (low <= truth) & (truth <= high)
    return {
        **{name: value if value != math.inf else "inf" for name, value in asdict(setting).items()},
        "coverage": round(float(covers.mean()), 4),
        "too_high": round(float((truth < low).mean()), 4),
        "too_low": round(float((truth > high).mean()), 4),
        "no_errors_seen": round(float((total == 0).mean()), 4),
        "errors_left": round(float(truth.mean()), 1),
        "estimated": round(float(total.mean()), 1),
        "median_width": round(float(np.median(high - low)), 1),
        "met": bool(0.92 <= covers.mean() <= 0.98),
    }


def early_stops(setting: Setting, loops: int, share: float, seed: int = 0) -> list[dict[str, object]]:
    """How often a loop that stops by its upper bound has more errors left than the target, by rounds in a row."""
    rng = np.random.default_rng(seed)
    histories = [list(loop(rng, setting)) for _ in range(loops)]
    rows = []
    for rounds in (1, 2, 3):
        rule, stopped, wrong = ErrorBound(share=share, rounds=rounds), 0, 0
        for history in histories:
            seen = [Round(images=setting.batch, seconds=0.0, estimate=estimate) for estimate, _ in history]
            for index, (estimate, truth) in enumerate(history):
                if rule.stop(seen[: index + 1]).stop:
                    stopped += 1
                    wrong += truth > share * estimate.detections
                    break
        rows.append({"rounds": rounds, "stopped": stopped / loops, "target_missed": wrong / loops})
    return rows


def settings() -> Iterator[Setting]:
    for images, audited in ((500, 20), (500, 60), (2000, 50), (5000, 200)):
        for rate in (0.005, 0.03, 0.1, 0.3):
            for shape in (math.inf, 0.5, 0.2):
                yield Setting(images, audited, (rate,), shape)
    for rate in (0.005, 0.03, 0.1, 0.3):
        yield Setting(2000, 50, (rate,), 0.5, informative=False)
    for objects in (1.0, 20.0):
        for rate in (0.03, 0.3):
            yield Setting(1000, 50, (rate,), 0.5, objects=objects)
    yield Setting(1000, 50, (0.2, 0.1, 0.05), 0.5)


FALLING = (0.14, 0.11, 0.09, 0.075, 0.06, 0.05, 0.04, 0.03)
"""Errors per detection of detectors that learn."""
LEVEL = (0.11,) * 8
"""Those of one that stays a little above the target of 10 %, so that every stop is a mistake."""


def main() -> None:
    """Measure, print and write ``results/stopping.json``; parts that are not asked for are kept from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", default=["coverage", "stops"])
    parser.add_argument("--name", default="stopping", help="of the result file")
    arguments = parser.parse_args()
    result: dict[str, object] = {"what": "95 % intervals of the errors left, and stops by their upper ends"}
    before = RESULTS / f"{arguments.name}.json"
    result |= json.loads(before.read_text()) if before.is_file() else {}
    result |= {"loops": arguments.loops, "bar": [0.92, 0.98]}
    if "coverage" in arguments.parts:
        result["coverage"] = rows = []
        for setting in settings():
            rows.append(row := coverage(setting, arguments.loops))
            print(
                f"{setting.images:5d} images, {setting.audited:3d} audited, rates {setting.rates}, "
                f"shape {setting.shape}, scores {'tell' if setting.informative else 'tell nothing'}, "
                f"{setting.objects:g} objects: {row['coverage']:.1%} (above {row['too_high']:.1%}, "
                f"below {row['too_low']:.1%}), {row['errors_left']} left, width {row['median_width']}",
                flush=True,
            )
        result["met"] = f"{sum(bool(row['met']) for row in rows)} of {len(rows)}"
        print(result["met"])
    if "stops" in arguments.parts:
        result["stops_at_10_percent"] = {
            name: early_stops(Setting(1500, 50, rates, 0.5), arguments.loops, 0.10)
            for name, rates in (("falling", FALLING), ("level", LEVEL))
        }
        print(json.dumps(result["stops_at_10_percent"], indent=2))
    result["environment"] = environment(("numpy", "scipy"))
    write_result(arguments.name, result)


if __name__ == "__main__":
    main()
