"""What a user can choose of the global clustering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["torch", "faiss"]


@dataclass(frozen=True)
class ClusteringConfig:
    """Global clustering of region features into pseudo-classes.

    Args:
        num_classes: Pseudo-classes; 1 = class-unaware.
        seed: Seed of the starting centroids.
        spherical: Compare features by direction, not by distance.
        max_iterations: Passes over all features at most.
        backend: What finds the nearest centroid; torch is the faster on CPUs.
    """

    num_classes: int = 2048
    seed: int = 0
    spherical: bool = True
    max_iterations: int = 50
    backend: Backend = "torch"
