"""Put the tables of the README together from benchmarks/results/*.json.

python benchmarks/tables.py
"""

import json
from pathlib import Path

from simdetr.evaluation.compare import comparison_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- tables:begin (python benchmarks/tables.py) -->", "<!-- tables:end -->"


def hardware(result: dict) -> str:
    environment = result["environment"]
    versions = environment["versions"]
    return (
        f"{environment['processor']}, {environment['cores']} cores, torch {versions['torch']}, {environment['date']}, "
        f"`{environment['command']}`"
    )


def fod(result: dict) -> str:
    rows = comparison_table(result["rows"])
    return (
        f"**Pretrained or not, on one domain** (FOD-A, {result['unlabelled_images']:,} frames without labels; R18 "
        f"Deformable DETR at 144 to 176 px; percent on {result['val_images']} validation frames; no network weights, "
        f"proposals by the colour-texture encoder; the same steps for both):\n\n{rows}\n{hardware(result)}\n"
    )


TABLES = {"fod_comparison": fod}


def main() -> None:
    parts = []
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            parts.append(table(json.loads(path.read_text(encoding="utf-8"))))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    readme.write_text(f"{head}{BEGIN}\n" + "\n".join(parts) + f"{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
