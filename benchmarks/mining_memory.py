"""Peak memory of mining few and many images, each in a process of its own.

Frames of fod/train at a small image size (memory does not depend on how long an image takes, and 5,000 images should
take minutes). Bar: the peaks differ by less than 10 %.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import DATA, environment, write_result


def mine_once(count: int, image_size: int, out: Path) -> dict[str, float]:
    """Mine ``count`` frames in this process; peak memory in MB and seconds."""
    from simdetr.data.images import open_images
    from simdetr.mining.batch import MiningConfig
    from simdetr.mining.colour_texture import ColourTextureEncoder
    from simdetr.mining.miner import mine

    torch.set_num_threads(1)
    source = open_images(DATA / "fod" / "train")
    started = time.perf_counter()
    config = MiningConfig(image_size=image_size, shard_size=256, num_workers=1)
    store = mine(source.subset(source.ids[:count]), ColourTextureEncoder(), config, out)
    return {
        "images": len(store),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "store_mb": round(sum(path.stat().st_size for path in out.iterdir()) / 1e6, 1),
    }


def main() -> None:
    """Measure and write ``results/mining_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs=2, default=(1000, 5000))
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--once", type=int, help="mine this many images in this process and print the peak")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.once:
            print(json.dumps(mine_once(arguments.once, arguments.image_size, Path(folder))))
            return
    command = [sys.executable, "-m", "benchmarks.mining_memory", f"--image-size={arguments.image_size}"]
    runs = [
        json.loads(subprocess.run([*command, f"--once={n}"], check=True, capture_output=True, text=True).stdout)
        for n in arguments.counts
    ]
    few, many = (run["peak_rss_mb"] for run in runs)
    result = {
        "what": f"mining fod/train frames at {arguments.image_size} px, colour-texture encoder, one process each",
        "runs": runs,
        "difference": round(many / few - 1, 4),
        "bar": 0.10,
        "met": abs(many / few - 1) < 0.10,
        "environment": environment(("torch", "pyarrow", "numpy", "pillow")),
    }
    path = write_result("mining_memory", result)
    print(path.read_text())


if __name__ == "__main__":
    main()
