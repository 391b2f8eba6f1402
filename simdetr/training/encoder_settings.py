"""Settings of ``simdetr encoder fit``: YAML files and options in, one checked dataclass out."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from jsonargparse import ArgumentParser

from simdetr.proposals.batch_mining import MiningConfig
from simdetr.training.optimisation import Schedule

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
_STRIDE = 32
# What may differ between a run and its continuation: it changes no weight.
_FREE = ("num_workers", "checkpoint_every_steps", "probe_every_steps", "probe_images", "mining")


@dataclass(frozen=True)
class EncoderFitConfig:
    """Self-supervised training of a backbone.

    Args:
        model: timm's name of the backbone.
        weights: File or URL to start from; random weights when left out.
        objective: ``vicreg``, ``dino``, ``vicregl`` (dense), or the class path of an Objective of your own.
        objective_args: Its arguments; see :mod:`simdetr.training.encoder_objectives`.
        views: Arguments of lightly's transform for that objective, such as ``cj_strength``.
        image_size: Side of the (large) crops in pixels, a multiple of 32.
        batch_size: Images per step; every one gives two or more crops.
        epochs: Passes over the images.
        max_steps: Steps, instead of epochs.
        lr: Learning rate of AdamW at this batch size.
        weight_decay: Of all weights but biases and norms.
        schedule: Of the learning rate after the warm-up: ``cosine``, ``constant`` or ``step``.
        warmup: Part of the training in which the learning rate rises.
        precision: Of the forward pass; losses are taken in 32 bits.
        num_workers: Processes that decode and crop; 0 does it in between.
        seed: Of new weights, order and crops.
        checkpoint_every_steps: Steps between two points that a killed run can resume from.
        probe_every_steps: Steps between two rows of ``probe.csv``.
        probe_images: Images that are probed, evenly spaced.
        mining: How the recall probe mines; as in the recipes of the pipeline.
    """

    model: str = "resnet18"
    weights: str | None = None
    objective: str = "vicregl"
    objective_args: dict[str, Any] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    batch_size: int = 64
    epochs: int = 100
    max_steps: int | None = None
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    precision: Precision = "32-true"
    num_workers: int = 2
    seed: int = 0
    checkpoint_every_steps: int = 200
    probe_every_steps: int = 500
    probe_images: int = 32
    mining: MiningConfig = field(default_factory=MiningConfig)

    def __post_init__(self) -> None:
        at_least = {"image_size": _STRIDE, "batch_size": 2, "epochs": 1, "max_steps": 1, "num_workers": 0}
        at_least |= {"checkpoint_every_steps": 1, "probe_every_steps": 1, "probe_images": 2}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                hint = "; the losses compare the images of a batch" if name == "batch_size" else ""
                raise ValueError(f"{name}: expected at least {least}, got {value}{hint}")
        if self.image_size % _STRIDE:
            nearest = max(2, round(self.image_size / _STRIDE)) * _STRIDE
            raise ValueError(f"image_size: expected a multiple of {_STRIDE}, got {self.image_size}; try {nearest}")
        if not 0 <= self.warmup < 1 or self.lr <= 0:
            raise ValueError(f"warmup, lr: expected 0 <= warmup < 1 and lr > 0, got {self.warmup} and {self.lr}")

    def settled(self) -> dict[str, Any]:
        """The settings that the weights depend on, as plain types."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def read_settings(configs: Sequence[str] = (), options: Sequence[str] = ()) -> EncoderFitConfig:
    """Settings from YAML files, later ones over earlier ones, and ``--name=value`` strings over them.

    Raises:
        ValueError: for a name or value that the settings do not have; the message names it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(EncoderFitConfig)
    try:
        parsed = parser.parse_args([*(f"--config={path}" for path in configs), *options])
        return EncoderFitConfig(
            **{name: value for name, value in parser.instantiate_classes(parsed).items() if name != "config"}
        )
    except ArgumentError as error:
        raise ValueError(f"config: {error}") from error
