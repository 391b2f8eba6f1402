"""What is pretraining worth, with how many labels, on which kind of images? Five real sets, as a user would ask.

    python -m benchmarks.label_curves --out runs/worth

For each set: `simdetr pretrain` on its training images, without a config; boxes of Selective Search by
`simdetr rivals`; then, round by round of label_curves.yaml, `simdetr compare` from few labels to all of them, on
validation images that no stage saw. What is done is kept below ``--out`` and, row by row, in
benchmarks/results/label_curves.json, with the commands that repeat it; rows that are there are not made again, also on
another machine.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environment import DATA, RESULTS, environment, write_result
from simdetr import compare, open_images, pretrain, read_labels
from simdetr.data.coco import write_coco
from simdetr.evaluation.compare import budget_text
from simdetr.reports.comparison_page import SUMMARY
from simdetr.reports.rival_recall import mine_rivals
from simdetr.training.run_folder import RunFolder

PLAN = Path(__file__).with_suffix(".yaml")
NAME = "label_curves"
RIVALS = {"selective-search": "selective_search"}
"""Arms that take the boxes of a rival, and its method."""
RIVAL_BOXES = 30
"""Per image, as the document takes (Table 8)."""
Row = dict[str, Any]
KEYS = {"rows": ("initialisation", "label_budget", "seed"), "differences": ("initialisation", "label_budget", "metric")}
KEYS["saved"] = KEYS["differences"][:2]
"""Lists of a comparison's summary that are kept, and what tells their entries apart."""


@dataclass(frozen=True)
class ImageSet:
    """One set of the plan, and where its part of the study lies."""

    name: str
    data: Path
    out: Path
    budgets: tuple[float | str, ...]
    val_images: int | None = None

    @property
    def run(self) -> RunFolder:
        """Its pretraining."""
        return RunFolder(self.out / self.name)

    @property
    def train(self) -> Path:
        """Its training images."""
        return self.data / self.name / "train"

    def val_labels(self) -> Path:
        """Truth of the validation images, or of some of them spread evenly."""
        path = self.data / self.name / "instances_val.json"
        if self.val_images is None:
            return path
        chosen = self.out / f"{self.name}-val-{self.val_images}.json"
        if not chosen.is_file():
            truth = read_labels(path)
            write_coco(truth.select(spread(sorted(truth.image_ids), self.val_images)), chosen)
        return chosen

    def pretrained(self) -> RunFolder:
        """The pretraining, made as far as it is not there."""
        return pretrain(self.train, self.run.path)

    def compared(self, arms: Sequence[str], budgets: Sequence[float | str], seeds: Sequence[int]) -> dict[str, Any]:
        """The summary of one comparison; pretrains what its arms start from."""
        self.pretrained()
        if methods := [RIVALS[arm] for arm in arms if arm in RIVALS]:
            mine_rivals(self.train, self.run.path, methods=methods, max_boxes=RIVAL_BOXES)
        out = self.out / f"{self.name}-compared"
        found = compare(
            self.train,
            self.data / self.name / "instances_train.json",
            self.run.path,
            out,
            val_images=self.data / self.name / "val",
            val_labels=self.val_labels(),
            arms=arms,
            fractions=[budget for budget in budgets if not isinstance(budget, str)],
            shots=[int(budget.removesuffix("-shot")) for budget in budgets if isinstance(budget, str)],
            seeds=seeds,
        )
        print(found.text())
        summary: dict[str, Any] = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        return summary


def spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` names at equal distances, all if there are fewer."""
    step = max(1.0, len(names) / count)
    return [names[int(place * step)] for place in range(min(count, len(names)))]


def rounds(plan: Mapping[str, Any], sets: Sequence[ImageSet]) -> Iterator[tuple[ImageSet, list[str], list[Any]]]:
    """Set, arms and budgets of every comparison, in the order in which they are made."""
    for one in plan["rounds"]:
        for own in sets:
            yield own, one["arms"], list(own.budgets[: one["budgets"]])


def is_known(known: Mapping[str, Any], arms: Sequence[str], budgets: Sequence[Any], seeds: Sequence[int]) -> bool:
    """Whether all rows of a comparison are there."""
    there = {(row["initialisation"], budget_text(row["label_budget"]), row["seed"]) for row in known.get("rows", [])}
    return all((arm, budget_text(budget), seed) in there for arm in arms for budget in budgets for seed in seeds)


def merged(known: Mapping[str, Any], summary: Mapping[str, Any], own: ImageSet) -> dict[str, Any]:
    """What is known of a set after one more comparison; what was found anew goes over what was there."""
    lists = {
        name: list(
            {tuple(str(one[key]) for key in keys): one for one in (*known.get(name, ()), *summary[name])}.values()
        )
        for name, keys in KEYS.items()
    }
    steps = [json.loads(line) for line in own.run.steps.read_text(encoding="utf-8").splitlines()]
    given = {name: summary[name] for name in ("starts", "commands", "num_images", "figures", "warnings")}
    for name in ("starts", "commands"):
        given[name] = known.get(name, {}) | given[name]
    given["commands"]["the pretraining"] = f"simdetr pretrain --images {own.train} --out {own.run.path}"
    return lists | given | {"pretraining": steps, "images": len(open_images(own.train))}


def main() -> None:
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=plan["sets"], default=list(plan["sets"]))
    parser.add_argument("--rounds", type=int, nargs="+", help="of the plan, from 1; all by default")
    arguments = parser.parse_args()
    if arguments.rounds:
        plan["rounds"] = [plan["rounds"][number - 1] for number in arguments.rounds]
    sets = [ImageSet(name, arguments.data, arguments.out, **plan["sets"][name]) for name in arguments.sets]
    for own, arms, budgets in rounds(plan, sets):
        if is_known(results().get(own.name, {}), arms, budgets, plan["seeds"]):
            continue
        found = own.compared(arms, budgets, plan["seeds"])
        together = results()
        together[own.name] = merged(together.get(own.name, {}), found, own)
        versions = ("torch", "torchvision", "timm", "pytorch-lightning")
        write_result(NAME, {"environment": environment(versions), "sets": together})


def results() -> dict[str, Any]:
    """What is known of every set so far."""
    path = RESULTS / f"{NAME}.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["sets"] if path.is_file() else {}
    return known


if __name__ == "__main__":
    main()
