"""What does each part of the method give? One pretraining a row, one thing changed; fine-tuned from few labels.

    OMP_NUM_THREADS=1 python -m benchmarks.ablations --out runs/ablations

The rows are in ablations.yaml. Of each: AP after fine-tunings that have the same labels, steps and seeds; the recall of
its own detector on validation images, whatever the class; pseudo-class accuracy; boxes per image. What is done is kept
below ``--out`` and in benchmarks/results/ablations.json, and not made again. Started twice, two processes share the
work, which is the best use of two cores.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from benchmarks.environment import DATA, RESULTS, environment, write_result
from benchmarks.label_curves import RIVAL_BOXES, spread
from benchmarks.stages import detected
from simdetr import evaluate, finetune, open_images, pretrain, read_labels, split
from simdetr.data.coco import write_coco
from simdetr.data.storage import write_json
from simdetr.evaluation.recall import proposal_recall
from simdetr.recipe import SelfTrainingConfig
from simdetr.reports.rival_recall import mine_rivals
from simdetr.training.run_folder import RunFolder
from simdetr.training.side_by_side import Task, turns

PLAN = Path(__file__).with_suffix(".yaml")
NAME = "ablations"
CHOSEN = "chosen"
SCORES = ("AP", "AP50", "AP75", "AR@100")
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row or more of the study.

    Attributes:
        name: Of its folder.
        title: For people.
        table: Of the document that it belongs to.
        stages: That are fine-tuned.
        options: Over those of every row.
        mines: Mines boxes of its own instead of taking those of the chosen row.
        encoder: That mines.
        rival: Whose boxes are taken.
    """

    name: str
    title: str
    table: int | None = None
    stages: tuple[int, ...] = (1,)
    options: tuple[str, ...] = ()
    mines: bool = False
    encoder: str | None = None
    rival: str | None = None


@dataclass(frozen=True)
class Study:
    """The plan, and where its parts lie."""

    plan: Mapping[str, Any]
    data: Path
    out: Path
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def train(self) -> Path:
        """Training images."""
        return self.data / self.plan["set"] / "train"

    def run(self, name: str) -> RunFolder:
        """Pretraining of a variant."""
        return RunFolder(self.out / name)

    def unlabelled(self) -> Path:
        """List of the images without labels."""
        chosen = self.out / "images.txt"
        if not chosen.is_file():
            names = spread(open_images(self.train).ids, self.plan["images"])
            chosen.write_text("".join(f"{self.train / name}\n" for name in names), encoding="utf-8")
        return chosen

    def val_labels(self) -> Path:
        """Truth of some validation images."""
        chosen = self.out / "val.json"
        if not chosen.is_file():
            truth = read_labels(self.data / self.plan["set"] / "instances_val.json")
            write_coco(truth.select(spread(sorted(truth.image_ids), self.plan["val_images"])), chosen)
        return chosen

    def few_labels(self, seed: int) -> Path:
        """What is fine-tuned on."""
        truth, amount = self.data / self.plan["set"] / "instances_train.json", self.plan["fraction"]
        return split(truth, self.out / "splits", "fractions", amounts=[amount], seeds=[seed])[0]

    def pretrained(self, variant: Variant) -> Row:
        """Make the pretraining of a variant."""
        stages = (f"--self_training.stages={max(variant.stages)}",)
        options = (*self.plan["pretrain"], *stages, *variant.options)
        proposals = None if variant.mines or variant.name == CHOSEN else self.run(CHOSEN).proposals
        if variant.rival is not None:
            mine_rivals(self.unlabelled(), self.run(CHOSEN).path, methods=[variant.rival], max_boxes=RIVAL_BOXES)
            proposals = self.run(CHOSEN).path / "rivals" / variant.rival
        run = self.run(variant.name).path
        pretrain(self.unlabelled(), run, options=options, encoder=variant.encoder, proposals=proposals)
        return {"variant": variant.name}

    def finetuned(self, variant: Variant, stage: int, seed: int, out: Path) -> Row:
        """Fine-tune and score one."""
        seeds = tuple(f"--{name}={seed}" for name in ("seed_everything", "data.seed", "model.seed"))
        options = (*self.plan["finetune"], *seeds)
        start = self.run(variant.name).detector(stage) if stage else None
        trained = finetune(self.train, self.few_labels(seed), out, init=start, options=options)
        scores = evaluate(self.data / self.plan["set"] / "val", self.val_labels(), trained)
        return {"variant": variant.name, "stage": stage, "seed": seed} | {name: scores[name] for name in SCORES}

    def looked_at(self, variant: Variant, stage: int) -> Row:
        """What the detector of a stage finds on validation images, and what it was trained on."""
        truth, run = read_labels(self.val_labels()).class_agnostic(), self.run(variant.name)
        source = open_images(self.data / self.plan["set"] / "val").subset(truth.image_ids)
        recall = proposal_recall(truth, detected(run, SelfTrainingConfig(), source, stage))
        agreement = json.loads((run.stage(stage) / "agreement.json").read_text(encoding="utf-8"))
        kept = {name: recall[name] for name in ("AR@1", "AR@10", "AR@25", "AR@100")}
        return {"variant": variant.name, "stage": stage, "agreement": agreement} | kept


def tasks(study: Study) -> Iterator[tuple[Task, Callable[[], Row]]]:
    """Everything there is to do, variant by variant, and what does it; a row is kept in the file of its task."""
    rows = study.out / "rows"
    missing = [one for one in study.variants.values() if not all(map(Path.is_file, pretrained_rows(study, one)))]
    borrowed = any(not one.mines for one in missing)
    for variant in study.variants.values():
        made, own = study.run(variant.name).path / "pretrained.json", variant.mines or variant.name == CHOSEN
        if variant in missing or (borrowed and variant.name == CHOSEN):
            needs = None if own else study.run(CHOSEN).path / "pretrained.json"
            yield Task(f"{variant.name}: pretraining", made, needs), partial(study.pretrained, variant)
        for stage in variant.stages:
            task = Task(f"{variant.name}: recall of stage {stage}", rows / f"{variant.name}-{stage}.json", made)
            yield task, partial(study.looked_at, variant, stage)
        for stage in variant.stages or (0,):
            for seed in study.plan["seeds"]:
                name = f"{variant.name}-{stage}-seed{seed}"
                task = Task(name, rows / f"{name}.json", made if stage else None)
                yield task, partial(study.finetuned, variant, stage, seed, study.out / "finetuned" / name)


def pretrained_rows(study: Study, variant: Variant) -> list[Path]:
    """Files of the rows that need the pretraining of a variant."""
    finetuned = [f"{variant.name}-{stage}-seed{seed}" for stage in variant.stages for seed in study.plan["seeds"]]
    names = [*finetuned, *(f"{variant.name}-{stage}" for stage in variant.stages)]
    return [study.out / "rows" / f"{name}.json" for name in names]


def main() -> None:
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=plan["variants"], default=list(plan["variants"]))
    arguments = parser.parse_args()
    variants = {
        name: Variant(
            name, **{key: tuple(v) if isinstance(v, list) else v for key, v in plan["variants"][name].items()}
        )
        for name in plan["variants"]
        if name in (CHOSEN, *arguments.variants)
    }
    study = Study(plan, arguments.data, arguments.out, variants)
    study.out.mkdir(parents=True, exist_ok=True)
    restore(study.out / "rows")
    todo = list(tasks(study))
    work = {task.done: do for task, do in todo}
    for task in turns([task for task, _ in todo]):
        print(task.name, flush=True)
        write_json(task.done, work[task.done]())
        collect(study)


def collect(study: Study) -> None:
    """Write all rows that there are as the result."""
    with FileLock(study.out / "result.lock"):
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((study.out / "rows").glob("*.json"))]
        record = environment(("torch", "torchvision", "timm", "pytorch-lightning"))
        write_result(NAME, {"environment": record, "plan": dict(study.plan), "rows": rows})


def restore(rows: Path) -> None:
    """Rows of an earlier run of the study, maybe on another machine, so that they are not made again."""
    for row in results():
        path = rows / f"{file_name(row)}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, row)


def file_name(row: Mapping[str, Any]) -> str:
    """Where a row is kept."""
    seed = f"-seed{row['seed']}" if "seed" in row else ""
    return f"{row['variant']}-{row['stage']}{seed}"


def results() -> list[Row]:
    """The rows that there are."""
    path = RESULTS / f"{NAME}.json"
    known: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return known


if __name__ == "__main__":
    main()
