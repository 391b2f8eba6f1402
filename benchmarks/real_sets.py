"""What pretraining is worth on real sets: FOD-A, Aquarium and NEU-DET, from a handful of labels.

    OMP_NUM_THREADS=1 python -m benchmarks.real_sets --out runs/real_sets

For each set: two stages of pretraining on the training images without labels; class-agnostic quality of the labels of
every stage on validation images that no stage saw; then fine-tunings from equal labels with equal steps, on the first
budget and on 10 %, that start from

    random     nothing: the same detector from random weights, batch norm and stem trained, one rate for all
    backbone   the ImageNet backbone and a new transformer: what a user has today
    stage1     the detector of the first stage
    stage2     the detector of the second stage

The seed of a fine-tuning draws its labels (as `simdetr split` does), its order and its new weights, so the arms of a
seed are paired. Everything is written as soon as it is there: rows below ``--out``, all of them together in
benchmarks/results/real_sets.json. Killed and started again, the same command goes on. Started twice, two processes
share the work: a training belongs to the process that holds its lock. Trainings of one thread side by side are the best
use of two cores.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from benchmarks.environment import DATA, environment, write_result
from benchmarks.label_curves import spread
from benchmarks.real_set_tables import paired_differences
from benchmarks.stages import detected, mined, relabelled
from simdetr import evaluate, finetune, open_images, pretrain, read_labels, split
from simdetr.data.coco import write_coco
from simdetr.data.storage import atomic_path, json_ready
from simdetr.evaluation.coco_metric import match_boxes
from simdetr.recipe import Recipe
from simdetr.training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
CONFIGS = (ROOT / "benchmarks/real_sets.yaml",)
FINETUNE_CONFIGS = (ROOT / "benchmarks/real_sets_finetune.yaml",)
FEW = ("10-shot", "10 %")
BUDGETS = {"fod": ("1 %", "10 %"), "aquarium": FEW, "neu_det": FEW, "bccd": FEW}
STAGES = (1, 2)
DETECTOR = "--model.detector.init_args."
ARMS = {
    "random": (
        f"{DETECTOR}pretrained_backbone=false",
        f"{DETECTOR}frozen_batch_norm=false",
        f"{DETECTOR}freeze_stem=false",
    ),
    "backbone": (f"{DETECTOR}pretrained_backbone=true",),
    "stage1": (),
    "stage2": (),
}
"""What an arm changes in the options of the fine-tuning."""
SCORES = ("AP", "AP50", "AP75", "AR100", "AR@1", "AR@10", "AR@100")
WAIT_S = 20.0


@dataclass(frozen=True)
class ImageSet:
    """One data set, and where its part of the study lies.

    Attributes:
        name: Folder below ``data``.
        data: Folder of the sets.
        out: Folder of the study.
        arguments: The command's.
    """

    name: str
    data: Path
    out: Path
    arguments: argparse.Namespace

    @property
    def folder(self) -> Path:
        """Folder of this set's part of the study."""
        return self.out / self.name

    @property
    def run(self) -> RunFolder:
        """Run folder of the pretraining."""
        return RunFolder(self.folder / "pretrain")

    @property
    def images(self) -> Path:
        """Folder of the set."""
        return self.data / self.name

    @property
    def options(self) -> tuple[str, ...]:
        """Options over the pretraining's config."""
        return tuple(f"--{option}" for option in self.arguments.options)

    def configs(self, files: tuple[Path, ...]) -> tuple[str, ...]:
        """The configs of every set, and over them that of this one where there is one."""
        own = ROOT / f"benchmarks/real_sets_{self.name}.yaml"
        return tuple(map(str, (*files, *([own] if own.is_file() else []))))

    def claim(self) -> None:
        """Keep the settings that the rows of this set depend on, or refuse others: their rows would be mixed."""
        settings = {name: getattr(self.arguments, name) for name in ("images", "subset", "options", "finetune_options")}
        files = map(Path, (*self.configs(CONFIGS), *self.configs(FINETUNE_CONFIGS)))
        texts = {path.relative_to(ROOT).as_posix(): yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
        RunFolder(self.folder).claim(yaml.safe_dump(settings | texts))

    def unlabelled(self) -> Path:
        """The training images, or ``--images`` copies spread evenly over them."""
        folder, count = self.images / "train", self.arguments.images
        if count is None:
            return folder
        out = self.folder / "unlabelled"
        out.mkdir(parents=True, exist_ok=True)
        for name in spread(open_images(folder).ids, count):
            if not (out / name).is_file():
                shutil.copyfile(folder / name, out / name)
        return out

    def val_labels(self) -> Path:
        """Truth of the validation images, or of ``--subset`` of them spread evenly."""
        path, count = self.images / "instances_val.json", self.arguments.subset
        if count is None:
            return path
        truth = read_labels(path)
        chosen = self.folder / f"val_{count}.json"
        write_coco(truth.select(spread(sorted(truth.image_ids), count)), chosen)
        return chosen

    def train_labels(self, budget: str, seed: int) -> Path:
        """The labels of a budget such as ``1 %`` or ``10-shot``."""
        train, out = self.images / "instances_train.json", self.folder / "splits"
        amount, percent = budget.removesuffix(" %").removesuffix("-shot"), budget.endswith("%")
        protocol, amounts = ("fractions", [float(amount) / 100]) if percent else ("shots", [int(amount)])
        return split(train, out, protocol, amounts=amounts, seeds=[seed])[0]


@dataclass(frozen=True)
class Task:
    """A part of the study that gives rows, and the file that they are kept in.

    Attributes:
        rows: JSON file; the task is done when it is there.
        ready: Whether what it needs is done.
        work: Gives the rows.
    """

    rows: Path
    ready: Callable[[], bool]
    work: Callable[[], list[dict[str, Any]]]


def tasks(sets: list[ImageSet], arguments: argparse.Namespace) -> Iterator[Task]:
    """All parts, pretraining first, then seed by seed, so that pairs are complete early."""
    if "pretrain" in arguments.parts:
        for own in sets:
            yield Task(own.folder / "rows/pretrain.json", lambda: True, lambda own=own: pretraining(own))
    if "labels" in arguments.parts:
        for own in sets:
            for stage in (0, *STAGES):
                yield Task(
                    own.folder / f"rows/labels-stage{stage}.json",
                    lambda own=own, stage=stage: own.run.labels(stage).is_file(),
                    lambda own=own, stage=stage: label_quality(own, stage),
                )
    if "finetune" in arguments.parts:
        for seed in arguments.seeds:
            for own in sets:
                for budget in arguments.budgets or BUDGETS[own.name]:
                    for arm in arguments.arms:
                        yield finetuning_task(own, arm, budget, seed)


def finetuning_task(own: ImageSet, arm: str, budget: str, seed: int) -> Task:
    stage = int(arm.removeprefix("stage")) if arm.startswith("stage") else 0
    name = f"{arm}-{budget.replace(' %', 'pct')}-seed{seed}"
    return Task(
        own.folder / f"rows/{name}.json",
        lambda: stage == 0 or own.run.has_detector(stage),
        lambda: [finetuned(own, arm, budget, seed, own.folder / name)],
    )


def pretraining(own: ImageSet) -> list[dict[str, Any]]:
    """Pretrain, and tell how long its steps took."""
    images = own.unlabelled()
    run = pretrain(images, own.run.path, own.configs(CONFIGS), options=own.options)
    steps = [json.loads(line) for line in run.steps.read_text(encoding="utf-8").splitlines()]
    return [{"part": "pretrain", "set": own.name, "images": len(open_images(images)), "steps": steps}]


def label_quality(own: ImageSet, stage: int) -> list[dict[str, Any]]:
    """Class-agnostic AP and recall on validation images: of the labels of a stage, and of its detector alone."""
    truth = read_labels(own.val_labels()).class_agnostic()
    recipe = Recipe(own.configs(CONFIGS), (f"--data.images={own.images / 'val'}", *own.options))
    sections, source = recipe.sections(), open_images(own.images / "val").subset(truth.image_ids)
    kept, found = sections.self_training, {"labels": mined(sections, source, own.folder / "val")}
    for own_stage in range(1, stage + 1):
        alone = detected(own.run, kept, source, own_stage)
        found = {"detector alone": alone, "labels": relabelled(found["labels"], alone, kept)}
    rows = []
    for what, labels in found.items():
        scores = match_boxes(truth, labels, class_agnostic=True, max_boxes=(1, 10, 100))
        row = {"part": "labels", "set": own.name, "stage": stage, "what": what, "val_images": len(truth)}
        row["boxes_per_image"] = len(labels.boxes_xyxy) / len(truth)
        row |= {f"AR@{boxes}": scores.average_recall(boxes) for boxes in (1, 10, 100)}
        rows.append(row | {"AP50": scores.average_precision(iou=50), "AP": scores.average_precision()})
    return rows


def finetuned(own: ImageSet, arm: str, budget: str, seed: int, folder: Path) -> dict[str, Any]:
    """Fine-tune one arm and score it."""
    started = time.perf_counter()
    labels = own.train_labels(budget, seed)
    recipe = Recipe(own.configs(FINETUNE_CONFIGS))
    if arm.startswith("stage"):
        recipe = recipe.starting_from(own.run.detector(int(arm.removeprefix("stage"))), folder)
    else:
        recipe = Recipe((*recipe.configs, str(described(own, folder))))
    seeds = (f"--{name}={seed}" for name in ("seed_everything", "data.seed", "model.seed"))
    options = (*(f"--{option}" for option in own.arguments.finetune_options), *ARMS[arm], *seeds)
    if arm == "random":  # nothing in its backbone is worth a lower rate
        resolved = Recipe(recipe.configs, (f"--data.images={own.images / 'train'}", *options)).resolved()[0]
        options = (*options, f"--model.backbone_lr={resolved.model.lr}")
    trained = finetune(own.images / "train", labels, folder, recipe.configs, options=options)
    seconds = time.perf_counter() - started
    scores = json_ready(evaluate(own.images / "val", own.val_labels(), trained))
    drawn = read_labels(labels)
    return {
        "part": "finetune",
        "set": own.name,
        "arm": arm,
        "budget": budget,
        "seed": seed,
        "train_images": len(drawn),
        "train_boxes": len(drawn.boxes_xyxy),
        "seconds": round(seconds),
        **{name: scores[name] for name in SCORES},
    }


def described(own: ImageSet, folder: Path) -> Path:
    """A config with the detector of the pretraining alone: arms without a stage need none to be trained."""
    recipe = Recipe(own.configs(CONFIGS), (f"--data.images={own.images / 'train'}", *own.options))
    detector = recipe.resolved()[0].model.detector.as_dict()
    for linked in ("num_classes", "num_queries"):  # follow from the labels
        detector["init_args"].pop(linked, None)
    path = folder / "detector.yaml"
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump({"model": {"detector": detector}}), encoding="utf-8")
    return path


def work_off(todo: list[Task], tell: Callable[[], None]) -> None:
    """Do every task that no other process does; wait for those that need what others are doing."""
    waits = False
    while left := [task for task in todo if not task.rows.is_file()]:
        if not any(done_now(task) for task in left):
            if not waits:
                print(
                    f"waiting for other processes, or for a pretraining: {', '.join(task.rows.stem for task in left)}"
                )
            waits = True
            time.sleep(WAIT_S)
            continue
        tell()


def done_now(task: Task) -> bool:
    """Do a task if it is ready and nobody else does it."""
    if task.rows.is_file() or not task.ready():
        return False
    task.rows.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(task.rows.with_suffix(".lock"), blocking=False):
            if task.rows.is_file():
                return False
            rows = task.work()
            with atomic_path(task.rows) as temporary:
                temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    except Timeout:
        return False
    for row in rows:
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items() if name != "steps"})
    return True


def collect(out: Path, name: str, record: dict[str, Any]) -> None:
    """Write all rows that there are as one result."""
    with FileLock(out / "result.lock"):
        rows = [row for path in sorted(out.glob("*/rows/*.json")) for row in json.loads(path.read_text())]
        write_result(name, record | {"paired": paired_differences(rows), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--images", type=int, help="training images without labels, evenly spaced; all by default")
    parser.add_argument("--subset", type=int, help="validation images, evenly spaced; all by default")
    parser.add_argument("--parts", nargs="+", choices=("pretrain", "labels", "finetune"), default=None)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--budgets", nargs="+", help="such as '1 %%' or 10-shot, for every set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--options", nargs="*", default=[], help="over the pretraining's config: trainer.max_steps=…")
    parser.add_argument("--finetune_options", nargs="*", default=[], help="over the fine-tuning's")
    parser.add_argument("--name", default="real_sets", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or ["pretrain", "labels", "finetune"]
    sets = [ImageSet(name, arguments.data.resolve(), arguments.out, arguments) for name in arguments.sets]
    for own in sets:
        own.claim()
    record = {"environment": environment(("torch", "torchvision", "timm", "pytorch-lightning"))}
    work_off(list(tasks(sets, arguments)), lambda: collect(arguments.out, arguments.name, record))
    collect(arguments.out, arguments.name, record)


if __name__ == "__main__":
    main()
