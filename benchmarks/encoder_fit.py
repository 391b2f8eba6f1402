"""Is an encoder that was trained on the images themselves better for mining? -> benchmarks/results/encoder_fit.json.

Trains a backbone without labels on photographs and frames (coco256/train and evenly spaced images of fod/train), then
mines with it, with the same backbone untrained, and with the colour-texture encoder: class-agnostic recall of the at
most 25 boxes per image, with the same settings for all. coco256/train is among the training images, the other sets are
not. Stopped at any point, the same command goes on.

    python benchmarks/encoder_fit.py --out runs/encoder [--fod 2872] [--max_steps 1000] [--images 40]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from environment import DATA, environment, write_result

from simdetr.data.images import ImageSource, open_images
from simdetr.encoder_training.fit_encoder import EncoderFitConfig, fit_encoder, read_settings
from simdetr.encoder_training.probe import EncoderRecall, load_encoder_recall
from simdetr.mining import ColourTextureEncoder, FittedEncoder, MiningConfig, TimmEncoder
from simdetr.mining.encoders import Encoder

REPOSITORY = Path(__file__).parents[1]
SETS = (("coco256", "train"), ("coco256", "val"), ("fod", "val"))


def training_images(fod: int) -> ImageSource:
    """coco256/train and so many evenly spaced images of fod/train."""
    ids = [f"coco256/train/{name}" for name in open_images(DATA / "coco256" / "train").ids]
    frames = open_images(DATA / "fod" / "train").ids
    rows = np.unique(np.linspace(0, len(frames) - 1, min(fod, len(frames))).round().astype(int))
    return ImageSource(DATA, [*ids, *(f"fod/train/{frames[row]}" for row in rows)])


def mining_settings() -> dict[str, MiningConfig]:
    """The default, which follows the document, and what the small recipe uses."""
    tiny = yaml.safe_load((REPOSITORY / "configs" / "tiny.yaml").read_text())["mining"]
    return {"default": MiningConfig(), "tiny": MiningConfig(**tiny)}


def measure(encoders: dict[str, Encoder], images: int) -> list[dict[str, object]]:
    """One row per set, settings and encoder."""
    rows: list[dict[str, object]] = []
    for set_name, split in SETS:
        for config_name, config in mining_settings().items():
            folder = DATA / set_name
            recall = load_encoder_recall(folder / f"instances_{split}.json", folder / split, images, config)
            for name, encoder in encoders.items():
                row = {"set": f"{set_name}/{split}", "mining": config_name, "encoder": name}
                rows.append(row | {key: round(value, 4) for key, value in recall(encoder).items()})
                print(rows[-1], flush=True)
    return rows


def fit(arguments: argparse.Namespace) -> Path:
    """Train, or go on; the probe looks at coco256/train."""
    settings = EncoderFitConfig(**vars(read_settings([arguments.config], arguments.options)))
    truth = DATA / "coco256" / "instances_train.json"
    recall: EncoderRecall = load_encoder_recall(truth, truth.parent / "train", settings.probe_images, settings.mining)
    return fit_encoder(training_images(arguments.fod), arguments.out, settings, device=arguments.device, recall=recall)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--config", default=str(REPOSITORY / "configs/encoder/resnet18.yaml"))
    parser.add_argument("--fod", type=int, default=2872, help="images of fod/train to train on")
    parser.add_argument("--images", type=int, default=40, help="images per set to mine, evenly spaced")
    parser.add_argument("--device", default=None)
    arguments, arguments.options = parser.parse_known_args()
    folder = fit(arguments)
    record = json.loads((folder / "encoder.json").read_text())
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    encoders = {
        "colour-texture": ColourTextureEncoder(),
        f"untrained {record['model']}": TimmEncoder(record["model"], random_weights=True),
        f"fitted {record['model']}": FittedEncoder(folder),
    }
    measured_on = environment(("torch", "timm", "lightly"))
    command = str(measured_on["command"])
    device = "cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu"
    write_result(
        "encoder_fit",
        {
            "what": "class-agnostic recall of at most 25 mined boxes, by encoder; evenly spaced images of each set",
            "environment": measured_on | {"command": command.replace(str(arguments.out), "runs/encoder")},
            "device": device,
            "gpu": "not measured" if device == "cpu" else torch.cuda.get_device_name(),
            "images_per_set": arguments.images,
            "training": {"seconds": round(steps[-1]["seconds"]), "record": record},
            "mining": {name: config.result_settings() for name, config in mining_settings().items()},
            "rows": measure(encoders, arguments.images),
        },
    )


if __name__ == "__main__":
    main()
