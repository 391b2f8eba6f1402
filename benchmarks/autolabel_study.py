"""What label, verify, correct is worth on real sets at a few shots: labels of every stage, and detectors from them.

    OMP_NUM_THREADS=1 python -m benchmarks.autolabel_study --runs runs/real_sets --out runs/autolabel

Takes the pretraining of benchmarks/real_sets.py (``--runs``), whose second stage is where every training starts. For
each set and seed, from the same shots and with the same settings:

    few-shot    fine-tuned on the shots
    longer      the same with as many steps as the others take in both of their trainings
    sourced     few-shot, then trained on the shots and its detections above the threshold, on each object the surest
    verified    the same, after the votes of the nearest shots
    full        the same, after correction of the boxes

Rows are written as soon as they are there, all of them to benchmarks/results/autolabel.json; the same command goes on.
Started twice, two processes share the work: a training belongs to the process that holds its lock.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from benchmarks.environment import DATA, environment, write_result
from benchmarks.real_sets import FINETUNE_CONFIGS, ImageSet, spread
from simdetr import evaluate, finetune, open_images, split
from simdetr.data.storage import write_json
from simdetr.labelling.assembly import assemble, without_duplicates
from simdetr.labelling.autolabel import (
    AutolabelRun,
    AutolabelSettings,
    few_shot_detector,
    label,
    retrain,
)
from simdetr.labelling.candidates import CORRECTED, KEPT, REASONS, SOURCED, stage_rows
from simdetr.labelling.crop_features import crop_encoder
from simdetr.labelling.shots import LabellingInputs
from simdetr.pipeline import SEEDS

ARMS = ("few-shot", "full", "longer", "verified", "sourced")
SCORES = ("AP", "AP50", "AP75", "AR@10")
VOTES = set(REASONS) - {KEPT, *SOURCED, *CORRECTED}


def row_of(own: ImageSet, arm: str, shots: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train an arm and score it."""
    folder = own.folder / f"{shots}-shot-seed{seed}"
    config = own.configs(FINETUNE_CONFIGS)
    options = tuple(f"--{name}={seed}" for name in SEEDS)
    few = split(own.images / "instances_train.json", folder / "splits", "shots", amounts=[shots], seeds=[seed])[0]
    start = arguments.runs / own.name / "pretrain" / "stage2" / "detector"
    row: dict[str, Any] = {"set": own.name, "shots": shots, "seed": seed, "arm": arm}
    if arm == "longer":
        more = (*options, f"--trainer.max_steps={2 * arguments.steps}")
        detector = finetune(own.images / "train", few, folder / arm, config, init=start, options=more)
    else:
        ids = spread(list(open_images(own.images / "train").ids), arguments.pool)
        pool = open_images(own.images / "train").subset(ids)
        inputs = LabellingInputs.read(pool, few, own.images / "train", truth=own.images / "instances_train.json")
        options = (*options, f"--trainer.max_steps={arguments.steps}")
        detector = few_shot_detector(AutolabelRun(folder), inputs, start, config, options)
    if arm not in ("few-shot", "longer"):
        settings = AutolabelSettings(corrector=arguments.corrector if arm == "full" else "none")
        run = AutolabelRun(folder / arm)
        encoder = crop_encoder(arguments.encoder)
        run.path.mkdir(parents=True, exist_ok=True)
        (folder / "features").mkdir(exist_ok=True)
        if not (run.path / "features").exists():
            (run.path / "features").symlink_to((folder / "features").resolve(), target_is_directory=True)
        found, boxes = label(run, inputs, detector, encoder, settings, "cpu", lambda: (np.zeros(0), np.zeros(0)))
        if arm == "sourced":
            found = without_duplicates(found.before({*VOTES, *CORRECTED}), boxes)
        row["stages"] = stage_rows(found, inputs.truth)
        made = assemble(found, boxes, inputs.shots, ignore_above=settings.ignore_above)
        row |= {"images": len(made), "boxes": int((~made.crowd).sum()), "ignored": int(made.crowd.sum())}
        detector = retrain(run, inputs, made, detector, config, options)
    scores = evaluate(own.images / "val", own.val_labels(), detector)
    return row | {name: scores[name] for name in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=["fod", "aquarium"])
    parser.add_argument("--shots", nargs="+", type=int, default=[10])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--pool", type=int, default=1500, help="images to label, spread over the training images")
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--subset", type=int, default=300, help="validation images")
    parser.add_argument("--corrector", default="views")
    parser.add_argument("--encoder", default="efficientnet-lite0")
    arguments = parser.parse_args()
    arguments.images, arguments.options = None, []
    rows_folder = arguments.out / "rows"
    for seed in arguments.seeds:
        for arm in arguments.arms:
            for name in arguments.sets:
                for shots in arguments.shots:
                    path = rows_folder / f"{name}-{shots}-shot-{arm}-seed{seed}.json"
                    own = ImageSet(name, arguments.data, arguments.out, arguments)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        with FileLock(path.with_suffix(".lock"), timeout=0):
                            if not path.is_file():
                                write_json(path, row_of(own, arm, shots, seed, arguments))
                    except Timeout:
                        continue  # another process has it
                    rows = [json.loads(file.read_text()) for file in sorted(rows_folder.glob("*.json"))]
                    facts = {"pool": arguments.pool, "steps": arguments.steps, "corrector": arguments.corrector}
                    write_result(
                        "autolabel",
                        {
                            "environment": environment(("torch", "torchvision", "timm", "pytorch-lightning")),
                            **facts,
                            "rows": rows,
                        },
                    )


if __name__ == "__main__":
    main()
