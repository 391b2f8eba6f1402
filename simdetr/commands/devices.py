"""The devices of this machine in; which fast implementations can be used on them, and why not the others, out."""

from __future__ import annotations

import os

import torch

from simdetr.detectors.deformable_attention import (
    ENVIRONMENT_VARIABLE,
    IMPLEMENTATIONS,
    choose_implementation,
    obstacle,
)


def summary() -> str:
    """Lines of text: torch and its devices, then for each device the implementations of deformable attention."""
    devices = _devices()
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    named = ", ".join(f"{device} ({detail})" for device, detail in devices.items())
    lines = [f"torch {torch.__version__}{cuda}; devices: {named}"]
    for device in devices:
        lines += _attention_lines(device)
    return "\n".join(lines)


def _devices() -> dict[torch.device, str]:
    """Every device and a word about it."""
    found = {torch.device("cpu"): f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        found[torch.device("cuda", index)] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        found[torch.device("mps")] = "Apple GPU"
    return found


def _attention_lines(device: torch.device) -> list[str]:
    set_by = f" (set by {ENVIRONMENT_VARIABLE})" if os.environ.get(ENVIRONMENT_VARIABLE) else ""
    try:
        chosen = choose_implementation(device.type, device.index, torch.float32)
    except ValueError as error:
        return [f"deformable attention on {device}: none: {error}"]
    lines = [f"deformable attention on {device}: {chosen}{set_by}"]
    for name in IMPLEMENTATIONS:
        problem = obstacle(name, device.type, device.index)
        if name != chosen:
            lines.append(f"  {name}: {'can be used too' if problem is None else f'cannot be used: {problem}'}")
    return lines
