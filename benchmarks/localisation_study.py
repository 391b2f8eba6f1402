"""Weakly supervised localisation on FOD-A: this method against CAM and centre boxes, from the same initialisations.

    python -m benchmarks.localisation_study --data ../shared/data/fod --pretrained runs/fod --out runs/localisation

Trains configs/heads/localisation_fod.yaml on the classes of whole images, once per method, initialisation and seed, and
writes benchmarks/results/localisation_study.json after each. Boxes serve scoring alone. The threshold, and which of a
method's score maps is read, are chosen on a part of the training frames that is held out (blocks of neighbouring
frames); MaxBoxAcc's own definition, the best threshold on the images that are scored, stands beside it. Finished
trainings are not repeated. ``runs/fod`` is a run of ``simdetr pretrain`` with configs/tiny.yaml on fod/train.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.environment import RESULTS, environment, write_result
from simdetr.data.augmentation import eval_transforms
from simdetr.data.dataset import DetectionDataset, collate
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.evaluation.localisation_metric import LocalisationMetric, centre_gaussian_map, full_image_map
from simdetr.exchange.weights import is_saved, load_detector
from simdetr.heads import HeadedBackbone, LocalisationHead
from simdetr.recipe import Recipe
from simdetr.training.train import train

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/heads/localisation_fod.yaml"
NUM_HELD_OUT, NUM_VAL, BLOCK = 200, 320, 45
STEP = 0.01  # between thresholds, as the public code's command line has it
HEAD = "--model.detector.init_args.head.init_args"
METHODS: dict[str, tuple[str, ...]] = {
    "CAM": (f"{HEAD}.method=cam",),
    "in-sample": (f"{HEAD}.method=in_sample",),
    "in-sample, without dropping": (f"{HEAD}.method=in_sample", f"{HEAD}.mask_probability=null"),
    "in-sample, importance only": (f"{HEAD}.method=in_sample", f"{HEAD}.mask_probability=0.0"),
    "in-sample after CAM": (f"{HEAD}.method=in_sample",),
    "CAM after CAM": (f"{HEAD}.method=cam",),
}
"""What is trained; those after the second are remedies, the last one the control of the one before."""
AFTER = " after CAM"  # starts from the network that CAM trained, for half as many steps more
SOURCES = {"cam": ("cam",), "in_sample": ("last_attention", "first_attention", "product", "cam")}


def split(labels: Labels) -> tuple[list[str], list[str]]:
    """Image ids to train on and to choose thresholds on: every twentieth block of frames is held out."""
    ids = sorted(labels.image_ids)
    held_out = [name for index, name in enumerate(ids) if index // BLOCK % 20 == 10]
    rest = set(ids) - set(held_out)
    one_class = [name for name in ids if name in rest and len(set(labels.of(name).classes.tolist())) == 1]
    return one_class, held_out[:: max(1, len(held_out) // NUM_HELD_OUT)][:NUM_HELD_OUT]


@torch.no_grad()
def score(detector: HeadedBackbone, folder: Path, truth: Labels, settings: dict[str, Any]) -> dict[str, Any]:
    """A metric per score map of one model on the images of ``truth``, with the true class given (GT-known)."""
    head = detector.head
    assert isinstance(head, LocalisationHead)
    sources = SOURCES["in_sample" if head.is_neck else "cam"]
    metrics = {source: LocalisationMetric(step=STEP) for source in sources}
    dataset = DetectionDataset(
        open_images(folder), truth, eval_transforms(settings["short_side"], settings["max_side"])
    )
    detector.eval()
    for batch in DataLoader(dataset, 16, collate_fn=collate):
        wanted = torch.tensor([int(target["labels"][0]) for target in batch.targets])
        for source in sources:
            head.map_source = source
            features = detector.features(batch.images, batch.mask)
            logits = head(features)
            maps = head.score_map(logits, features, wanted)[:, 0].numpy()
            for row, target in enumerate(batch.targets):
                image = truth.image(int(target["image_index"]))
                right = int(logits[row].argmax()) in image.classes
                metrics[source].update(maps[row], image.boxes_xyxy, image.size_hw, class_correct=right)
    return metrics


def baseline(score_map: np.ndarray, truth: Labels) -> LocalisationMetric:
    """The same map for every image."""
    metric = LocalisationMetric(step=STEP)
    for index in range(len(truth)):
        image = truth.image(index)
        metric.update(score_map, image.boxes_xyxy, image.size_hw)
    return metric


def numbers(chosen_on: LocalisationMetric, scored: LocalisationMetric) -> dict[str, Any]:
    """MaxBoxAcc as defined, and the accuracies at the thresholds of the held-out part."""
    largest = scored.accuracy_at(chosen_on.best_thresholds("largest"), "largest")
    every = scored.accuracy_at(chosen_on.best_thresholds("all"), "all")
    best = scored.compute()
    return {
        "MaxBoxAccV2": best["MaxBoxAccV2"],
        "MaxBoxAcc": best["MaxBoxAcc"],
        "held-out MaxBoxAccV2": chosen_on.compute()["MaxBoxAccV2"],
        "BoxAccV2": float(np.mean(list(every.values()))),
        "BoxAccV2 per IoU": {f"{delta:g}": value for delta, value in every.items()},
        "BoxAcc": largest[0.5],
        "Top-1 Loc": None if math.isnan(best["Top-1 Loc"]) else best["Top-1 Loc"],
        "threshold": chosen_on.compute()["threshold"],
        "constant_maps": best["constant_maps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True, help="run folder of simdetr pretrain on fod/train")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=["CAM", "in-sample"], choices=METHODS)
    parser.add_argument("--initialisations", nargs="+", default=["pretrained", "untrained"])
    parser.add_argument("--options", nargs="*", default=[], help="over the config: trainer.precision=…")
    parser.add_argument("--name", default="localisation_study")
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    everything = read_labels(data / "instances_train.json")
    train_ids, held_out_ids = split(everything)
    out.mkdir(parents=True, exist_ok=True)
    write_labels(everything.select(train_ids), out / "train.parquet")
    held_out, val = everything.select(held_out_ids), read_labels(data / "instances_val.json")
    val = val.select(sorted(val.image_ids)[:: len(val) // NUM_VAL][:NUM_VAL])
    path = RESULTS / f"{arguments.name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    record: dict[str, object] = {
        "environment": environment(("torch", "torchvision", "timm", "pytorch-lightning")),
        "steps": arguments.steps,
        "train_images": len(train_ids),
        "held_out_images": len(held_out),
        "val_images": len(val),
        "rows": rows,
    }
    for name, constant in (("centre Gaussian", centre_gaussian_map()), ("whole image", full_image_map())):
        if not any(row["method"] == name for row in rows):
            rows.append({"method": name, **numbers(baseline(constant, held_out), baseline(constant, val))})
    for seed in arguments.seeds:
        for initialisation in arguments.initialisations:
            for method in arguments.methods:
                key = {"method": method, "initialisation": initialisation, "seed": seed}
                if any(key.items() <= row.items() for row in rows):
                    continue
                folder = out / f"{method}-{initialisation}-{seed}".replace(" ", "_").replace(",", "")
                start = arguments.pretrained if initialisation == "pretrained" else None
                steps = arguments.steps
                if method.endswith(AFTER):
                    start, steps = out / f"CAM-{initialisation}-{seed}", arguments.steps // 2
                weights = [f"--model.init_weights={start}"] if start is not None else []
                options = [
                    f"--data.images={data / 'train'}",
                    f"--data.labels={out / 'train.parquet'}",
                    f"--trainer.max_steps={steps}",
                    *(f"--{name}={seed}" for name in ("seed_everything", "data.seed", "model.seed")),
                    f"{HEAD}.class_loss=softmax",
                    *METHODS[method],
                    *weights,
                    *(f"--{option}" for option in arguments.options),
                ]
                if not is_saved(folder / "detector"):
                    train(Recipe((str(CONFIG),), tuple(options)).training(folder), folder)
                loaded = load_detector(folder / "detector")
                detector = loaded.detector
                assert isinstance(detector, HeadedBackbone)
                chosen = score(detector, data / "train", held_out, loaded.image_settings)
                scored = score(detector, data / "val", val, loaded.image_settings)
                maps = {source: numbers(chosen[source], scored[source]) for source in chosen}
                best = max(maps, key=lambda source: maps[source]["held-out MaxBoxAccV2"])
                rows.append({**key, "map_source": best, **maps[best], "all maps": maps})
                write_result(arguments.name, record)


if __name__ == "__main__":
    main()
