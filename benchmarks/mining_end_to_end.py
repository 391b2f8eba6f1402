"""What mining costs beyond decoding and the encoder -> benchmarks/results/mining_end_to_end.json.

The same photographs in turns: decoded and encoded by ResNet-50 only, and mined into a store (decoded, encoded,
clustered, boxes found and written). Median of the ratios. Bar: at most 1.25 on the CPU.

    python -m benchmarks.mining_end_to_end [--images 64] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import DATA, environment, write_result
from simdetr.data.images import ImageSource, open_images
from simdetr.mining import ColourTextureEncoder, MiningConfig, TimmEncoder, mine
from simdetr.mining.batch import encode, images_ahead
from simdetr.mining.encoders import Encoder

WORKERS = 2


def decode_and_encode(source: ImageSource, encoder: Encoder, config: MiningConfig) -> None:
    """What every method that uses this encoder has to do."""
    waiting: dict[torch.Size, list[Tensor]] = defaultdict(list)
    with images_ahead(source, range(len(source)), config.image_size, WORKERS, ahead=config.batch_size) as loading:
        for image in loading:
            assert image.pixels is not None
            same = waiting[image.pixels.shape]
            same.append(image.pixels)
            if len(same) == config.batch_size:
                encode(torch.stack(waiting.pop(image.pixels.shape)), encoder)
    for rest in waiting.values():
        encode(torch.stack(rest), encoder)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(source: ImageSource, encoder: Encoder, config: MiningConfig, repeats: int) -> dict[str, object]:
    """Milliseconds per image of both, taking turns, and their ratio."""
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        decode_and_encode(source, encoder, config)
        for repeat in range(repeats):
            out = Path(folder) / str(repeat)
            alone.append(seconds(lambda: decode_and_encode(source, encoder, config)))
            whole.append(seconds(lambda out=out: mine(source, encoder, replace(config, num_workers=WORKERS), out)))
    ratios = [b / a for a, b in zip(alone, whole, strict=True)]
    per_image = {"decode_and_encode": alone, "mine": whole}
    return {
        "ms_per_image": {name: round(1e3 * statistics.median(v) / len(source), 1) for name, v in per_image.items()},
        "ratio": {"median": round(statistics.median(ratios), 3), "all": [round(ratio, 3) for ratio in ratios]},
    }


def main() -> None:
    """Measure both encoders and both kinds of boxes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    source = open_images(DATA / "coco256" / "train")
    source = source.subset(source.ids[: arguments.images])
    level_sets, document = MiningConfig(shard_size=64), MiningConfig(shard_size=64, level_sets=None)
    rows = {
        "resnet50, level sets": measure(
            source, TimmEncoder("resnet50", random_weights=True), level_sets, arguments.repeats
        ),
        "resnet50, the document's filters": measure(
            source, TimmEncoder("resnet50", random_weights=True), document, arguments.repeats
        ),
        "colour-texture, level sets": measure(source, ColourTextureEncoder(), level_sets, arguments.repeats),
    }
    result: dict[str, object] = {
        "what": f"{len(source)} images of coco256/train at 448 px, untrained ResNet-50 or colour-texture encoder",
        "rows": rows,
        "bar": 1.25,
        "environment": environment(("torch", "timm", "numpy", "scipy", "pillow")),
    }
    print(write_result("mining_end_to_end", result).read_text())


if __name__ == "__main__":
    main()
