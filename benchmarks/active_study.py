"""What an order of images, proposals to inspect and the heads of the labelling apparatus are worth on a real set.

    OMP_NUM_THREADS=1 python -m benchmarks.active_study --runs runs/real_sets --out runs/active

Takes the pretraining of benchmarks/real_sets.py (``--runs``), with a stage of which every training starts.
People are simulated from the truth of the training images: 1.6 s to verify a box, 3.7 to 5.9 s to draw one. A box that
is accepted stays as it was proposed, and is accepted from an overlap of .7 on, so that no truth comes for free.

    by-hand   every training image, every box drawn
    loop      rounds of inspection by an order, an audit in each, a training after each; `final` is one more training on
              the last labels, as long as that of by-hand
    first     the first images of every order, drawn by hand: what an order is worth before anything is known
    head      the images of `first` by random, one of the heads beside the plain detector; both in batches of 4

The seed draws orders, audits, the person's times, the trainings' order and new weights, so that the arms of a seed are
paired. Rows are written as soon as they are there, all of them to benchmarks/results/active.json; the same command goes
on, and two processes share the work.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout

from benchmarks.environment import DATA, environment, write_result
from benchmarks.real_sets import FINETUNE_CONFIGS, ImageSet
from simdetr import evaluate, finetune, open_images, read_labels
from simdetr.data.coco import write_coco
from simdetr.data.labels import Labels
from simdetr.data.storage import write_json
from simdetr.labelling.annotator import SimulatedAnnotator
from simdetr.labelling.crop_features import crop_encoder
from simdetr.labelling.image_selection import Pool, SelectionSettings, order_images
from simdetr.labelling.loop import LEAST_SCORE, LoopSettings, by_hand, pool_of, simulate_labelling
from simdetr.pipeline import SEEDS
from simdetr.training.inference import predict

STRATEGIES = ("random", "interleave", "box_size", "cluster", "cluster_size", "entropy", "k_center", "mixed")
LOOPS = ("queue", "random")
"""``queue`` is the default: clusters by turns, then the unsure and unlike ones."""
HEADS: dict[str, dict[str, Any]] = {
    "location": {"class_path": "simdetr.heads.LocationPrior"},
    "ranking": {"class_path": "simdetr.heads.LocationPrior", "init_args": {"use": "rank"}},
    "pyramid": {"class_path": "simdetr.heads.SpatialPyramidNeck", "init_args": {"pools": [5, 9, 13]}},
    "reversal": {"class_path": "simdetr.heads.DomainAdversary", "init_args": {"highest_scale": 0.1}},
}
SIZES = ("--data.short_sides=[176,192,208]", "--data.max_side=256")
"""Of the trainings' images, smaller than the pretraining's of bccd: a study of many trainings."""
SMALL_BATCHES = ("--data.batch_size=4",)
SCORES = ("AP", "AP50", "AP75", "AR@100")


class Study:
    """One set's part of the study."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.own = ImageSet(name, arguments.data, arguments.out, arguments)
        self.own.folder.mkdir(parents=True, exist_ok=True)
        self.arguments = arguments
        self.start = arguments.runs / name / "pretrain" / f"stage{arguments.stage}" / "detector"
        self.config = self.own.configs(FINETUNE_CONFIGS)
        self.images = open_images(self.own.images / "train")
        self.truth = read_labels(self.own.images / "instances_train.json").select(self.images.ids)

    def person(self, seed: int) -> SimulatedAnnotator:
        """Accepts what overlaps by .7, and leaves it as it was proposed."""
        return SimulatedAnnotator(seed=seed, accept_iou=0.7, keeps_boxes=True)

    def options(self, seed: int, steps: int) -> tuple[str, ...]:
        """Of a training."""
        return (*(f"--{name}={seed}" for name in SEEDS), *SIZES, f"--trainer.max_steps={steps}")

    def scored(self, detector: Path) -> dict[str, float]:
        """Scores on the validation images."""
        scores = evaluate(self.own.images / "val", self.own.val_labels(), detector)
        return {name: scores[name] for name in SCORES}

    def trained(
        self,
        labels: Labels,
        folder: Path,
        seed: int,
        steps: int,
        *,
        config: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
    ) -> dict[str, float]:
        """Train on labels and score."""
        folder.mkdir(parents=True, exist_ok=True)
        write_coco(labels, folder / "labels.json")
        configs = (*self.config, *config)
        options = (*self.options(seed, steps), *more)
        images = self.own.images / "train"
        return self.scored(finetune(images, folder / "labels.json", folder, configs, init=self.start, options=options))

    @cached_property
    def pool(self) -> Pool:
        """What orders are made of before anything is labelled."""
        found = predict(self.images, self.start, min_score=LEAST_SCORE, one_class=True)
        encoder = crop_encoder(self.arguments.encoder)
        with FileLock(self.own.folder / "pool.lock"):
            cache = self.own.folder / "features"
            return pool_of(self.images, found, encoder, frozenset(), cache=cache, device="cpu")

    def first(self, strategy: str, seed: int) -> Labels:
        """The first images of an order, with all their boxes."""
        choice = SelectionSettings(budget=self.arguments.first_images, seed=seed)
        order = order_images(self.pool, strategy, choice)
        return self.truth.select(order.image_ids[: self.arguments.first_images])

    def by_hand(self, seed: int) -> dict[str, Any]:
        """Every box drawn."""
        folder = self.own.folder / f"by-hand-seed{seed}"
        seconds = by_hand(self.truth, self.person(seed))
        row = {"images": len(self.truth), "boxes": int((~self.truth.crowd).sum()), "seconds": seconds}
        return row | self.trained(self.truth, folder, seed, self.arguments.final_steps)

    def loop(self, order: str, seed: int) -> dict[str, Any]:
        """Rounds of inspection, and a last training."""
        arguments, folder = self.arguments, self.own.folder / f"loop-{order}-seed{seed}"
        settings = LoopSettings(
            strategy=None if order == "queue" else order,
            rounds=arguments.rounds,
            images_per_round=arguments.images_per_round,
            audited_per_round=arguments.audited_per_round,
            seed=seed,
        )
        rounds = simulate_labelling(
            self.own.images / "train",
            self.own.images / "instances_train.json",
            self.own.images / "val",
            self.own.val_labels(),
            folder,
            self.config,
            init=self.start,
            encoder=arguments.encoder,
            options=(*SIZES, f"--trainer.max_steps={arguments.steps}"),
            settings=settings,
            annotator=self.person(seed),
        )
        last = read_labels(folder / f"round{len(rounds) - 1}" / "labels.parquet")
        final = self.trained(last, folder / "final", seed, arguments.final_steps)
        person = {name: rounds[-1][name] for name in ("images", "boxes", "seconds")}
        return {"rounds": rounds, **person, **final}

    def drawn(self, strategy: str, seed: int) -> dict[str, Any]:
        """The first images of an order, drawn."""
        labels = self.first(strategy, seed)
        row = {"images": len(labels), "boxes": int((~labels.crowd).sum())}
        row["seconds"] = by_hand(labels, self.person(seed))
        present = np.bincount(labels.classes, minlength=labels.num_classes)
        row["classes"] = {category.name: int(n) for category, n in zip(labels.categories, present, strict=True)}
        folder = self.own.folder / f"first-{strategy}-seed{seed}"
        return row | self.trained(labels, folder, seed, self.arguments.first_steps, more=SMALL_BATCHES)

    def headed(self, head: str, seed: int) -> dict[str, Any]:
        """Random first images and a head."""
        labels, folder = self.first("random", seed), self.own.folder / f"head-{head}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        stack = {"class_path": "simdetr.heads.HeadStack", "init_args": {"heads": [HEADS[head]]}}
        detector = {"class_path": "simdetr.heads.HeadedDetector", "init_args": {"head": stack}}
        (folder / "head.yaml").write_text(yaml.safe_dump({"model": {"detector": detector}}), encoding="utf-8")
        more = (f"--data.unlabelled={self.own.images / 'train'}",) if head == "reversal" else ()
        config = (str(folder / "head.yaml"),)
        more = (*more, *SMALL_BATCHES)
        return self.trained(labels, folder, seed, self.arguments.first_steps, config=config, more=more)


def tasks(study: Study, arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, Callable[[], dict[str, Any]]]]:
    """Part, arm, seed and work, seed by seed, so that pairs are complete early."""
    for seed in arguments.seeds:
        for part in arguments.parts:
            if part == "by-hand":
                yield part, "by-hand", seed, lambda seed=seed: study.by_hand(seed)
            elif part == "loop":
                for order in arguments.loops:
                    yield part, order, seed, lambda order=order, seed=seed: study.loop(order, seed)
            elif part == "first":
                for name in STRATEGIES:
                    yield part, name, seed, lambda name=name, seed=seed: study.drawn(name, seed)
            else:
                for name in HEADS:
                    yield part, name, seed, lambda name=name, seed=seed: study.headed(name, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=["bccd"])
    parser.add_argument("--parts", nargs="+", default=["by-hand", "loop", "first", "head"])
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of the trainings of a loop")
    parser.add_argument("--first_steps", type=int, default=60, help="of those of `first` and `head`")
    parser.add_argument("--final_steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images_per_round", type=int, default=50)
    parser.add_argument("--audited_per_round", type=int, default=25)
    parser.add_argument("--first_images", type=int, default=30)
    parser.add_argument("--stage", type=int, default=1, help="of the pretraining")
    parser.add_argument("--encoder", default="efficientnet-lite0")
    arguments = parser.parse_args()
    arguments.images, arguments.options, arguments.subset = None, [], None
    rows_folder = arguments.out / "rows"
    rows_folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        study = Study(name, arguments)
        for part, arm, seed, work in tasks(study, arguments):
            path = rows_folder / f"{name}-{part}-{arm}-seed{seed}.json"
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    if not path.is_file():
                        write_json(path, {"set": name, "part": part, "arm": arm, "seed": seed, **work()})
            except Timeout:
                continue  # another process has it
            settings = (
                "stage",
                "steps",
                "final_steps",
                "rounds",
                "images_per_round",
                "audited_per_round",
                "first_images",
                "first_steps",
            )
            record = {
                "environment": environment(("torch", "torchvision", "timm", "pytorch-lightning")),
                "settings": {name: getattr(arguments, name) for name in settings},
                "rows": [json.loads(file.read_text()) for file in sorted(rows_folder.glob("*.json"))],
            }
            write_result("active", record)


if __name__ == "__main__":
    main()
