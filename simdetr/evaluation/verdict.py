"""Is pretraining worth it? Rows, differences and what else is known in; an answer in words with its reasons out.

The answer rests on AP and on the interval over seeds and images. It is *pays* where the whole interval is above 0,
*does not pay* where none of it is above what a user would notice, and *cannot tell yet* otherwise: an answer too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from simdetr.evaluation.compare import (
    WITHOUT_PRETRAINING,
    Difference,
    Draws,
    budget_text,
    comparison_table,
    difference_table,
)
from simdetr.evaluation.early_warning import MiningFigures, warnings_of
from simdetr.evaluation.intervals import CONFIDENCE, Interval, image_interval

Answer = Literal["pays", "does not pay", "cannot tell yet"]
WORTH = 0.5
"""AP points that a user would notice; a gain that is surely smaller is none."""
LEARNED = 1.0
"""AP in percent below which an arm has learned hardly anything."""
SATURATED = 0.9
"""Part of its AP with all labels measured that a baseline has with fewer, for it to have little left to gain."""
LIKELY_SEEDS = 50
FOUND = "AR@100"
"""What tells whether objects are found, whatever their class."""


@dataclass(frozen=True)
class LabelsSaved:
    """How many labels the baseline needs for what an arm reaches with fewer.

    Attributes:
        label_budget: Of the arm.
        initialisation: The arm.
        labels: Boxes that the arm was trained on, mean over seeds.
        needed: Boxes that the baseline needs for the same AP, by interpolation; the most or fewest measured where
            ``bound`` says that it is only a bound.
        bound: ``at least``, ``at most`` or empty.
        images: Interval of ``needed`` / ``labels`` on validation images drawn again; None where it is a bound.
    """

    label_budget: str
    initialisation: str
    labels: float
    needed: float
    bound: Literal["", "at least", "at most"]
    images: Interval | None = None

    @property
    def times(self) -> float:
        """How many times as many labels."""
        return self.needed / self.labels

    def __str__(self) -> str:
        if self.bound == "at least" and self.times <= 1:
            return "more than were measured"
        bound = f"{self.bound} " if self.bound else ""
        interval = "" if self.images is None else f" ({self.images.low:.1f} to {self.images.high:.1f}, images)"
        return f"{bound}{self.times:.1f} times as many{interval}"


@dataclass(frozen=True)
class Evidence:
    """What is known beside the scores.

    Attributes:
        figures: Of the mined boxes; None where there is no run.
        stage_recall: Share of the labelled objects that each stage's boxes cover (IoU 0.5), mined ones first.
        stage_quality: Class-agnostic AP50 of the same boxes.
    """

    figures: MiningFigures | None = None
    stage_recall: tuple[float, ...] = ()
    stage_quality: tuple[float, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The answer for one arm against one baseline.

    Attributes:
        answer: In a word or three.
        sentence: The answer with its numbers.
        reasons: Why, as far as it is known, and what to do.
        by_budget: The answer for each number of labels.
    """

    answer: Answer
    sentence: str
    reasons: tuple[str, ...] = ()
    by_budget: Mapping[str, Answer] = field(default_factory=dict)


def labels_saved(rows: Sequence[Mapping[str, Any]], baseline: str, draws: Draws | None = None) -> list[LabelsSaved]:
    """For each other arm and budget: the labels that the baseline needs, log-linear between those measured.

    Arms that have learned hardly anything are left out.
    """
    counts, scores = _by_budget(rows, "labels"), _by_budget(rows, "AP")
    known = [budget for budget, arm in scores if arm == baseline and (budget, arm) in counts]
    curve = sorted((counts[budget, baseline], budget) for budget in known)
    if not curve:
        return []
    labels = np.array([count for count, _ in curve])
    drawn = _drawn_means(draws or {})
    found = []
    for budget, arm in scores:
        if arm == baseline or budget not in known or 100 * scores[budget, arm] < LEARNED:
            continue
        own = counts[budget, arm]
        needed, bound = _needed(labels, [scores[one, baseline] for _, one in curve], scores[budget, arm])
        interval = None
        keys = [(budget, arm), *((one, baseline) for _, one in curve)]
        if not bound and all(key in drawn for key in keys):
            per_draw = zip(drawn[keys[0]], np.stack([drawn[key] for key in keys[1:]], axis=1), strict=True)
            interval = image_interval([_needed(labels, on_baseline, ap)[0] / own for ap, on_baseline in per_draw])
        found.append(LabelsSaved(budget, arm, own, needed, bound, interval))
    return found


def _needed(
    labels: NDArray[np.float64], scores: Sequence[float] | NDArray[np.float64], wanted: float
) -> tuple[float, Literal["", "at least", "at most"]]:
    """Labels at which a curve reaches a score, and whether that is only a bound; a curve never falls here."""
    risen = np.maximum.accumulate(np.asarray(scores, np.float64))
    if wanted > risen[-1]:
        return float(labels[-1]), "at least"
    if wanted < risen[0]:
        return float(labels[0]), "at most"
    after = int(np.searchsorted(risen, wanted))
    if after == 0 or risen[after] == risen[after - 1]:
        return float(labels[after]), ""
    part = (wanted - risen[after - 1]) / (risen[after] - risen[after - 1])
    return float(np.exp((1 - part) * np.log(labels[after - 1]) + part * np.log(labels[after]))), ""


def _by_budget(rows: Sequence[Mapping[str, Any]], key: str) -> dict[tuple[str, str], float]:
    """Means over seeds of what rows have, by (budget, arm), in the order of the rows."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = row.get(key)
        if value is not None and not math.isnan(value):
            values.setdefault((budget_text(row["label_budget"]), str(row["initialisation"])), []).append(float(value))
    return {place: float(np.mean(those)) for place, those in values.items()}


def _drawn_means(draws: Draws) -> dict[tuple[str, str], NDArray[np.float64]]:
    """AP on the draws, means over seeds."""
    values: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for (budget, arm, _), metrics in draws.items():
        values.setdefault((budget, arm), []).append(metrics["AP"])
    return {place: np.mean(those, axis=0) for place, those in values.items()}


def verdict(
    rows: Sequence[Mapping[str, Any]],
    differences: Sequence[Difference],
    subject: str,
    baseline: str,
    evidence: Evidence | None = None,
) -> Verdict:
    """Whether an arm is worth more than another, from AP alone, with reasons from all that is known."""
    own = [one for one in differences if (one.initialisation, one.baseline, one.metric) == (subject, baseline, "AP")]
    if not own:
        return Verdict("cannot tell yet", f"Cannot tell yet: no budget has both {subject} and {baseline}.")
    pretrained = subject not in WITHOUT_PRETRAINING
    known = (evidence if pretrained else None) or Evidence()
    what = "Pretraining" if pretrained else f"Starting from {subject}"
    scores = _by_budget(rows, "AP")
    budgets = [one.label_budget for one in own]
    weak = [
        budget
        for budget in budgets
        if 100 * max(scores.get((budget, arm), 0.0) for arm in (subject, baseline)) < LEARNED
    ]
    by_budget = {one.label_budget: "cannot tell yet" if one.label_budget in weak else _answer(one) for one in own}
    answers = set(by_budget.values())
    said = "; ".join(f"{one.label_budget}: {_numbers(one)}" for one in own)
    answer: Answer = "cannot tell yet"
    if answers == {"pays"}:
        answer, sentence = "pays", f"{what} pays: {subject} beats {baseline} ({said})."
    elif "pays" in answers:
        paying = [budget for budget, one in by_budget.items() if one == "pays"]
        others = [f"{budget}: {one}" for budget, one in by_budget.items() if one != "pays"]
        answer = "pays"
        sentence = f"{what} pays with {_listed(paying)} of the labels ({'; '.join(others)}): {said}."
    elif answers == {"does not pay"}:
        answer, sentence = "does not pay", f"{what} does not pay here: {subject} against {baseline}, {said}."
    else:
        sentence = f"Cannot tell yet whether {what[0].lower()}{what[1:]} pays here: {said}."
    because = _reasons(rows, own, baseline, known, answer, weak)
    if answer == "does not pay":
        why = f", because {because[0]}" if because else "; nothing in the labels, the boxes or the scores says why"
        sentence = f"{sentence[:-1]}{why}."
    if answer != "pays":
        because += _finds_more(differences, subject, baseline, budgets)
    return Verdict(answer, sentence, tuple(because), by_budget)


def _answer(one: Difference) -> Answer:
    interval = one.both or (one.seeds if one.images is None else None)
    if interval is None:
        return "cannot tell yet"
    if interval.low > 0:
        return "pays"
    return "does not pay" if interval.high < WORTH else "cannot tell yet"


def _numbers(one: Difference) -> str:
    interval = one.both or one.seeds or one.images
    covered = "one seed, no interval" if interval is None else f"{interval}, {interval.covers}"
    return f"{one.mean:+.1f} AP ({covered})"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def _reasons(
    rows: Sequence[Mapping[str, Any]],
    own: Sequence[Difference],
    baseline: str,
    known: Evidence,
    answer: Answer,
    weak: Sequence[str],
) -> list[str]:
    """What the evidence says about the answer, weightiest first; ``weak`` budgets teach hardly anything."""
    found, scores = [], _by_budget(rows, "AP")
    if weak:
        found.append(
            f"with {_listed(weak)} of the labels neither arm learns much (AP below {LEARNED:g}): give more labels or "
            "longer fine-tuning (--trainer.max_steps) before you judge"
        )
    if answer != "pays":
        curve = sorted(
            (count, budget) for (budget, arm), count in _by_budget(rows, "labels").items() if arm == baseline
        )
        reached = [scores[budget, baseline] for _, budget in curve if (budget, baseline) in scores]
        if len(reached) > 1 and reached[0] >= SATURATED * reached[-1] > 0.01 * LEARNED:
            found.append(
                f"{baseline} has {100 * reached[0]:.1f} AP with the fewest labels and {100 * reached[-1]:.1f} with the "
                "most: it is saturated, and leaves little to gain"
            )
        if known.figures is not None:
            found += warnings_of(known.figures)
        found += _stages(known, worse_only=True)
    else:
        found += _stages(known, worse_only=False)
    if answer == "cannot tell yet":
        found += [_more_seeds(one) for one in own if one.label_budget not in weak]
    return found


def _finds_more(differences: Sequence[Difference], subject: str, baseline: str, budgets: Sequence[str]) -> list[str]:
    """Where objects are surely found better and their classes are not told better, which AP alone hides."""
    own = {one.label_budget: one for one in differences if (one.initialisation, one.metric) == (subject, FOUND)}
    better = [one for budget in budgets if (one := own.get(budget)) and one.seeds and one.seeds.low > 0]
    return [
        f"{one.label_budget}: {subject} finds more of the objects whatever their class ({FOUND} {one.mean:+.1f}, "
        f"{one.seeds} over seeds) than {baseline}, but does not tell the classes better: more labels per class or a "
        "longer fine-tuning may"
        for one in better
    ]


def _stages(known: Evidence, *, worse_only: bool) -> list[str]:
    """Whether self-training made the labels better than mining did."""
    if len(known.stage_quality) < 2 or not all(map(math.isfinite, (*known.stage_quality, *known.stage_recall))):
        return []
    first, last = known.stage_quality[0], known.stage_quality[-1]
    text = (
        f"the boxes of the last stage cover {known.stage_recall[-1]:.0%} of the labelled objects (AP50 whatever the "
        f"class {100 * last:.1f}), the mined ones {known.stage_recall[0]:.0%} ({100 * first:.1f})"
    )
    if last < first:
        return [f"self-training made the labels worse: {text}"]
    return [] if worse_only else [f"self-training made the labels better: {text}"]


def _more_seeds(one: Difference) -> str:
    """How many seeds are likely to tell, if seeds are what is missing."""
    values = np.array(list(one.by_seed.values()))
    if len(values) < 2:
        return f"{one.label_budget}: one seed cannot tell a gain from chance; take at least three (--seeds '[0, 1, 2]')"
    aim, spread = max(abs(one.mean), WORTH), values.std(ddof=1)
    of_images = 0.0 if one.images is None else (one.images.high - one.images.low) / 2
    for count in range(len(values) + 1, LIKELY_SEEDS + 1):
        of_seeds = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2) * spread / math.sqrt(count)
        half = math.hypot(of_seeds, of_images)
        if half < aim:
            return f"{one.label_budget}: the difference is within the noise; about {count} seeds are likely to tell"
    return (
        f"{one.label_budget}: the difference is too small for this noise; more validation images would help, or "
        "take it for none"
    )


@dataclass(frozen=True)
class Cost:
    """What an arm costs: seconds on one device, and the labels that it is fine-tuned on.

    Attributes:
        pretraining_s: Mining, clustering, training and relabelling up to its detector; None where it is not known, 0
            where there is none.
        finetuning_s: One fine-tuning, mean over budgets and seeds.
        device: What they ran on.
    """

    initialisation: str
    pretraining_s: float | None
    finetuning_s: float
    device: str


@dataclass(frozen=True)
class Comparison:
    """Everything that `simdetr compare` found.

    Attributes:
        rows: One per training, as in ``comparison.json``.
        starts: What each arm starts from, in words.
        baseline: What a user has without pretraining.
        subject: The arm that stands for the pretraining.
        differences: Every arm against the baseline.
        saved: What labels each arm spares.
        verdicts: Of every arm but the baseline.
        costs: Of every arm.
        warnings: What speaks against pretraining before any training.
        figures: What was mined, in a line; empty where nothing is known of it.
        commands: What repeats it, by what it does.
        num_images: Validation images.
        page: Where all of it is shown; empty where it was not written.
    """

    rows: list[dict[str, Any]]
    starts: dict[str, str]
    baseline: str
    subject: str
    differences: list[Difference]
    saved: list[LabelsSaved]
    verdicts: dict[str, Verdict]
    costs: list[Cost]
    warnings: list[str] = field(default_factory=list)
    figures: str = ""
    commands: dict[str, str] = field(default_factory=dict)
    num_images: int = 0
    page: str = ""

    @property
    def verdict(self) -> Verdict:
        """Of the pretraining."""
        return self.verdicts[self.subject]

    def text(self) -> str:
        """For a terminal, as Markdown: the answer first, then what it rests on."""
        parts = [f"**{self.verdict.sentence}**", ""]
        parts += [f"- {reason[0].upper()}{reason[1:]}" for reason in self.verdict.reasons]
        parts += [f"- Warning: {warning}" for warning in self.warnings if warning not in self.verdict.reasons]
        scores = comparison_table(self.rows, baseline="–")  # gains have a table of their own
        parts += ["", scores, difference_table(self.differences), COVERED]
        if self.saved:
            lines = [f"- {one.initialisation}, {one.label_budget}: {one}" for one in self.saved]
            parts += ["", f"Labels that {self.baseline} needs for the same AP:", "", *lines]
        parts += ["", "Cost:", "", *(f"- {cost_in_words(cost)}" for cost in self.costs)]
        return "\n".join(parts) + "\n"


COVERED = (
    "Intervals hold 95 %. *Seeds*: other labels, order and new weights, Student's t over paired differences. *Images*: "
    "other validation images, a bootstrap with the same draws for all trainings. None covers another pretraining."
)


def cost_in_words(cost: Cost) -> str:
    """One arm's cost."""
    before = (
        "pretraining of unknown cost" if cost.pretraining_s is None else f"{cost.pretraining_s:,.0f} s of pretraining"
    )
    if cost.pretraining_s == 0:
        before = "no pretraining"
    return f"{cost.initialisation}: {before}, {cost.finetuning_s:,.0f} s per fine-tuning ({cost.device})"


def costs_of(rows: Sequence[Mapping[str, Any]], pretraining_s: Mapping[str, float | None]) -> list[Cost]:
    """Every arm's cost, in the order of the rows; ``pretraining_s`` by arm, 0 where there was none."""
    found = []
    for arm in dict.fromkeys(str(row["initialisation"]) for row in rows):
        own = [row for row in rows if row["initialisation"] == arm and row.get("seconds") is not None]
        seconds = float(np.mean([row["seconds"] for row in own])) if own else math.nan
        devices = sorted({str(row.get("device", "")) for row in own})
        found.append(Cost(arm, pretraining_s.get(arm, 0.0), seconds, ", ".join(devices)))
    return found
