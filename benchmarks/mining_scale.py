"""Cost of mining against the number of images -> benchmarks/results/mining_scale.json.

The command as a user runs it, on two ranks, on 1,000, 3,000 and 9,025 frames of fod/train: wall seconds, disk, and the
highest memory of one process. Bar: linear within 10 %, that is, no count is off the straight line (start and seconds
per image, least squares) by more.

    python -m benchmarks.mining_scale [--counts 1000 3000 9025] [--num-ranks 2]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.environment import DATA, environment, write_result
from simdetr.data.images import open_images
from simdetr.mining.pseudo_labels import count_regions
from simdetr.mining.store import ProposalStore


def mine(count: int, ranks: int, folder: Path) -> dict[str, float]:
    """Mine the first ``count`` frames by the command line."""
    source = open_images(DATA / "fod" / "train")
    listed = folder / f"{count}.txt"
    listed.write_text("\n".join(str(source.root / image_id) for image_id in source.ids[:count]), encoding="utf-8")
    out = folder / f"run{count}"
    command = [sys.executable, "-m", "simdetr", "mine", "--images", str(listed), "--out", str(out)]
    started = time.perf_counter()
    subprocess.run([*command, "--num-ranks", str(ranks), "--mining.shard_size", "128"], check=True)
    seconds = time.perf_counter() - started
    store = ProposalStore(out / "proposals")
    return {
        "images": len(store),
        "seconds": round(seconds, 1),
        "regions": count_regions(store),
        "store_mb": round(sum(path.stat().st_size for path in (out / "proposals").iterdir()) / 1e6, 1),
        "peak_rss_mb_of_a_process": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "load_after": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and write the result after every run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 3000, 9025])
    parser.add_argument("--num-ranks", type=int, default=2)
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.counts:
            runs.append(mine(count, arguments.num_ranks, Path(folder)))
            images, seconds = (np.array([run[key] for run in runs], float) for key in ("images", "seconds"))
            result: dict[str, object] = {
                "what": "simdetr mine on frames of fod/train, 448 px, colour-texture encoder",
                "ranks": arguments.num_ranks,
                "runs": runs,
                "environment": environment(("torch", "numpy", "scipy", "pyarrow", "pillow")),
            }
            if len(runs) > 2:
                # relative errors count, so the smallest run weighs as much as the largest
                rows = np.stack([np.ones(len(runs)), images], axis=1) / seconds[:, None]
                (start, slope), *_ = np.linalg.lstsq(rows, np.ones(len(runs)), rcond=None)
                off = np.abs((start + slope * images) / seconds - 1)
                result |= {
                    "start_seconds": round(float(start), 1),
                    "images_per_second": round(float(1 / slope), 2),
                    "largest_deviation": round(float(off.max()), 4),
                    "bar": 0.10,
                    "met": bool(off.max() <= 0.10),
                }
            write_result("mining_scale", result)
            print(runs[-1], flush=True)


if __name__ == "__main__":
    main()
