"""Landmarks on traffic lights: the coupled loss (Eq. 4) against Eqs. 5 to 7, pretrained against untrained weights.

    python -m benchmarks.landmark_study --data ../shared/data/traffic_lights --pretrained runs/lights \
        --out runs/landmarks

Trains configs/heads/landmarks_grid.yaml (a backbone) or configs/heads/landmarks_traffic_lights.yaml (a detector),
once per equation, initialisation and seed, and writes benchmarks/results/landmark_study.json after each, with class and
point losses along the training. The reference point is the centre of a light's box. ``runs/lights`` is the run of

    simdetr pretrain --config configs/tiny.yaml --config benchmarks/traffic_lights.yaml \
        --images ../shared/data/traffic_lights/train --out runs/lights
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from benchmarks.environment import RESULTS, environment, write_result
from simdetr import evaluate
from simdetr.data.storage import json_ready
from simdetr.exchange.weights import is_saved
from simdetr.recipe import Recipe
from simdetr.training.train import train

ROOT = Path(__file__).parent.parent
CONFIGS = {"grid": "landmarks_grid.yaml", "query": "landmarks_traffic_lights.yaml"}
CURVES = ("landmark_loss_class", "landmark_point_error", "landmark_true_probability", "landmark_reversal_rate")
SCORES = ("class_accuracy", "point_error_px_median", "point_error_percent", "PCK@1", "PCK@2", "PCK@5", "point_AP")


def curves(folder: Path) -> dict[str, list[float]]:
    """Losses along the training, from Lightning's CSV files."""
    tables = [pd.read_csv(path) for path in sorted(folder.glob("logs/*/metrics.csv"))]
    table = pd.concat(tables).dropna(subset=["train/loss"]).sort_values("step")
    found = {name: table[f"train/{name}"].round(5).tolist() for name in CURVES}
    return {"step": table["step"].astype(int).tolist(), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=CONFIGS, default="grid")
    parser.add_argument("--modes", nargs="+", default=["eq4", "eq5", "eq6", "eq7"])
    parser.add_argument("--initialisations", nargs="+", default=["pretrained", "untrained"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--options", nargs="*", default=[], help="over the config: trainer.precision=…")
    parser.add_argument("--name", default="landmark_study")
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    path = RESULTS / f"{arguments.name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    record: dict[str, object] = {
        "environment": environment(("torch", "torchvision", "timm", "pytorch-lightning")),
        "rows": rows,
    }
    for seed in arguments.seeds:
        for initialisation in arguments.initialisations:
            for mode in arguments.modes:
                key = {
                    "variant": arguments.variant,
                    "mode": mode,
                    "initialisation": initialisation,
                    "seed": seed,
                    "steps": arguments.steps,
                }
                if any(key.items() <= row.items() for row in rows):
                    continue
                folder = out / "-".join(str(value) for value in key.values())
                head = {"mode": mode}
                if mode in ("eq6", "eq7"):
                    head["point_weight"] = "1.0"  # these have no weight of their own
                options = [
                    f"--data.images={data / 'train'}",
                    f"--data.labels={data / 'instances_train.json'}",
                    f"--trainer.max_steps={arguments.steps}",
                    "--trainer.log_every_n_steps=5",
                    *(f"--{name}={seed}" for name in ("seed_everything", "data.seed", "model.seed")),
                    *(f"--model.detector.init_args.head.init_args.{name}={value}" for name, value in head.items()),
                    *([f"--model.init_weights={arguments.pretrained}"] if initialisation == "pretrained" else []),
                    *(f"--{option}" for option in arguments.options),
                ]
                if not is_saved(folder / "detector"):
                    config = str(ROOT / "configs/heads" / CONFIGS[arguments.variant])
                    train(Recipe((config,), tuple(options)).training(folder), folder)
                scores = json_ready(evaluate(data / "val", data / "instances_val.json", folder / "detector"))
                rows.append({**key, **{name: scores.get(name) for name in (*SCORES, "AP")}, "curves": curves(folder)})
                write_result(arguments.name, record)


if __name__ == "__main__":
    main()
