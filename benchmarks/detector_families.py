"""One pipeline, several detectors: pretrain, relabel, fine-tune and evaluate each on coco256; only the YAML changes.

    python -m benchmarks.detector_families --data ../shared/data/coco256 --out runs/families

Writes benchmarks/results/detector_families.json: time per training step, class-agnostic recall of each stage's detector
on validation images, and AP after a short fine-tuning. The trainings are far too short to rank the detectors: the rows
show that every family goes through all steps. Resumes like every run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, write_result
from simdetr import evaluate, finetune, predict, pretrain, read_labels
from simdetr.evaluation.recall import proposal_recall
from simdetr.exchange.weights import load_detector
from simdetr.training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "Deformable DETR, ResNet-18": "tiny",
    "ViDT+, Swin": "vidt_tiny",
    "RT-DETRv2 of transformers": "rt_detr_v2_tiny",
    "LW-DETR of transformers": "lw_detr_tiny",
    "RF-DETR of transformers": "rf_detr_tiny",
    "Faster R-CNN of torchvision": "faster_rcnn_tiny",
}
MAX_BOXES = (25, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4, help="per stage")
    parser.add_argument("--finetune_steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES.values()))
    arguments = parser.parse_args()
    rows = []
    for name, config in FAMILIES.items():
        if config in arguments.only:
            rows.append({"detector": name, "config": f"configs/{config}.yaml"} | one_family(config, arguments))
            print({key: value for key, value in rows[-1].items() if key != "steps"}, flush=True)
    result = {
        "environment": environment(("torch", "torchvision", "timm", "transformers", "pytorch-lightning")),
        "epochs_per_stage": arguments.epochs,
        "finetune_steps": arguments.finetune_steps,
        "train_images": 128,
        "val_images": 128,
        "rows": rows,
    }
    write_result("detector_families", result)


def one_family(config: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the pipeline does, with one config."""
    data, out, configs = arguments.data.resolve(), arguments.out / config, [ROOT / f"configs/{config}.yaml"]
    epochs = f"--trainer.max_epochs={arguments.epochs}"
    run = pretrain(data / "train", out / "run", configs, truth=data / "instances_train.json", options=(epochs,))
    truth = read_labels(data / "instances_val.json").class_agnostic()
    recall = {
        f"stage{stage}": proposal_recall(
            truth,
            predict(data / "val", run.detector(stage), iou_threshold=0.55, one_class=True).class_agnostic(),
            max_boxes=MAX_BOXES,
        )
        for stage in run.stages()
        if stage > 0
    }
    tuned = finetune(
        data / "train",
        data / "instances_train.json",
        out / "tuned",
        configs,
        init=run.path,
        options=("--trainer.max_epochs=-1", f"--trainer.max_steps={arguments.finetune_steps}", "--data.mosaic=0"),
    )
    scores = evaluate(data / "val", data / "instances_val.json", tuned)
    parameters = sum(value.numel() for value in load_detector(tuned).detector.parameters())
    return {
        "parameters": parameters,
        "steps": steps_of(run),
        "recall": recall,
        "AP": scores["AP"],
        "AP50": scores["AP50"],
        "AR@100": scores["AR@100"],
    }


def steps_of(run: RunFolder) -> list[dict[str, Any]]:
    """What the run's journal says of its steps."""
    return [json.loads(line) for line in run.steps.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
