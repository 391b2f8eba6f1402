"""What pretraining is worth on one domain: FOD-A, unlabelled frames, then 1 % and 10 % of the labels, two seeds.

    python -m benchmarks.fod_comparison --data ../shared/data/fod --out runs/fod

Pretrains configs/tiny.yaml's detector on frames without labels, fine-tunes it and the same detector from new weights
with equal labels, steps and seeds, and writes benchmarks/results/fod_comparison.json. No network weights are used: the
encoder of the mining is the colour-texture one. Killed and started again, it goes on where it stopped.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.environment import environment, write_result
from simdetr import compare, pretrain
from simdetr.evaluation.compare import comparison_table

ROOT = Path(__file__).parent.parent
CONFIGS = (ROOT / "configs/tiny.yaml", ROOT / "benchmarks/fod.yaml")
FINETUNE_CONFIGS = (ROOT / "configs/finetune/tiny.yaml", ROOT / "benchmarks/fod_finetune.yaml")
NUM_UNLABELLED, NUM_VAL = 2000, 560


def every_nth(folder: Path, count: int, out: Path) -> Path:
    """Copies of ``count`` images spread evenly over a folder."""
    names = sorted(path.name for path in folder.iterdir())
    out.mkdir(parents=True, exist_ok=True)
    for name in names[:: max(1, len(names) // count)][:count]:
        if not (out / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1])
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out

    unlabelled = every_nth(data / "train", NUM_UNLABELLED, out / "unlabelled")
    run = pretrain(unlabelled, out / "pretrain", CONFIGS, truth=data / "instances_train.json")
    val = every_nth(data / "val", NUM_VAL, out / "val")
    rows = compare(
        data / "train",
        data / "instances_train.json",
        val,
        data / "instances_val.json",
        run.path,
        out / "comparison",
        FINETUNE_CONFIGS,
        fractions=arguments.fractions,
        seeds=arguments.seeds,
    )
    result = {
        "environment": environment(("torch", "torchvision", "timm", "pytorch-lightning")),
        "unlabelled_images": NUM_UNLABELLED,
        "val_images": NUM_VAL,
        "rows": rows,
    }
    write_result("fod_comparison", result)
    print(comparison_table(rows))


if __name__ == "__main__":
    main()
