"""The pipeline on photographs: pretrain on coco256/train + imagenet1k, recall of every stage on coco256/val.

    python -m benchmarks.photographs --data ../shared/data --out runs/photographs

Writes benchmarks/results/photographs.json: class-agnostic recall on validation images of the mined proposals (stage 0)
and of the detector of each stage, none of which saw a label or a network's weights. Resumes like every run.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.environment import environment, write_result
from simdetr import open_images, predict, pretrain, read_labels
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.evaluation.recall import proposal_recall
from simdetr.pipeline import mine_proposals

ROOT = Path(__file__).parent.parent
CONFIGS = (ROOT / "configs/tiny.yaml", ROOT / "benchmarks/photographs.yaml")
MAX_BOXES = (10, 25, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out

    out.mkdir(parents=True, exist_ok=True)
    listed = [record.path for folder in ("coco256/train", "imagenet1k") for record in open_images(data / folder)]
    images = out / "unlabelled.txt"
    images.write_text("\n".join(map(str, listed)) + "\n", encoding="utf-8")

    started = time.perf_counter()
    run = pretrain(images, out / "run", CONFIGS)
    seconds = time.perf_counter() - started

    truth = read_labels(data / "coco256/instances_val.json").class_agnostic()
    stages = {0: mined_on(data / "coco256/val", out / "val")}
    for stage in (1, 2):
        found = predict(data / "coco256/val", run.detector(stage), iou_threshold=0.55, one_class=True)
        stages[stage] = found.class_agnostic()
    rows = [
        {"stage": stage, "boxes_per_image": len(found.boxes_xyxy) / len(found)}
        | proposal_recall(truth, found, max_boxes=MAX_BOXES)
        for stage, found in stages.items()
    ]
    result = {
        "environment": environment(("torch", "torchvision", "timm", "pytorch-lightning")),
        "unlabelled_images": len(listed),
        "val_images": len(truth),
        "seconds_of_this_start": round(seconds),
        "steps": [json.loads(line) for line in run.steps.read_text(encoding="utf-8").splitlines()],
        "rows": rows,
    }
    write_result("photographs", result)
    for row in rows:
        print({name: round(value, 3) for name, value in row.items()})


def mined_on(images: Path, out: Path) -> Labels:
    """Proposals of images as the pretraining mines them."""
    store = mine_proposals(images, out, CONFIGS)
    rows = [
        ImageLabels.build(row.image_id, (row.height, row.width), boxes := row.regions.boxes_xyxy, [0] * len(boxes))
        for row in store.iter_rows()
    ]
    return Labels.from_images(rows, [Category(1, "object")])


if __name__ == "__main__":
    main()
