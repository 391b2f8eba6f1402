"""Detection by Deformable DETR R50 against transformers', same weights: latency at batch 1, throughput at batch 8.

Forward pass alone, no gradients, in turns in one process. CPU: 224 px, float32. GPU: 640 px, bf16; where there is no
GPU the result says so.

python -m benchmarks.inference_speed
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.detector_pair import PACKAGES, build_pair, make_batch, transformers_inputs
from benchmarks.environment import environment, write_result
from benchmarks.turns import compare_in_turns

SIDES = {"cpu": 224, "cuda": 640}
BATCHES = (1, 8)


@torch.inference_mode()
def measure(device: str, batch_size: int, side: int, repeats: int) -> dict[str, Any]:
    """Times of both, how far their boxes are apart, images per second."""
    ours, theirs = build_pair(device)
    images, mask, targets = make_batch(batch_size, side, device)
    inputs = {name: value for name, value in transformers_inputs(images, mask, targets).items() if name != "labels"}
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")

    def detect() -> torch.Tensor:
        with half:
            return ours(images, mask)["pred_boxes"]

    def detect_theirs() -> torch.Tensor:
        with half:
            return theirs(**inputs).pred_boxes

    apart = float((detect() - detect_theirs()).abs().max())
    times = compare_in_turns(detect, detect_theirs, device, repeats)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "side": side,
        "batch": batch_size,
        "precision": "bf16" if device == "cuda" else "fp32",
        "largest_box_difference": apart,
        **times,
        "images_per_s": {
            name: round(1000 * batch_size / times["wall"][f"{name}_ms"], 2) for name in ("ours", "theirs")
        },
    }


def main() -> None:
    """Measure and write ``results/inference_speed.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--side", type=int, help="of the images, in place of the device's own")
    parser.add_argument("--name", default="inference_speed", help="of the result file")
    arguments = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [
        measure(device, batch, arguments.side or SIDES[device], arguments.repeats)
        for device in devices
        for batch in BATCHES
    ]
    result: dict[str, object] = {
        "rows": rows,
        "gpu": "measured" if "cuda" in devices else "not measured",
        "environment": environment(PACKAGES),
    }
    print(write_result(arguments.name, result).read_text())


if __name__ == "__main__":
    main()
