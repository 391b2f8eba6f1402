"""How many objects does an encoder's mining find? Some labelled images in; per encoder, recall numbers out.

For the probe of ``simdetr encoder fit``: the same few images are mined again and again, so they are decoded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simdetr.data.images import open_images, read_image
from simdetr.data.labels import Category, ImageLabels, Labels
from simdetr.evaluation.proposal_recall import proposal_recall
from simdetr.proposals.batch_mining import MiningConfig, mine_batch
from simdetr.proposals.features import Encoder
from simdetr.proposals.image_loading import shrink
from simdetr.training.datamodule import read_training_labels

MAX_BOXES = 25


@dataclass(frozen=True)
class EncoderRecall:
    """Mines its images with an encoder and compares the boxes with the truth.

    Attributes:
        truth: labels of the images.
        images: uint8 [3, H, W] each, already of the size that they are mined at, in the order of ``truth``.
        mining: settings.
    """

    truth: Labels
    images: tuple[Tensor, ...]
    mining: MiningConfig

    def __call__(self, encoder: Encoder, device: str | torch.device = "cpu") -> dict[str, float]:
        """Class-agnostic recall of the at most 25 best boxes per image.

        Returns:
            ``recall50@25``, ``AR@25`` (IoU 0.50:0.95), fractions 0..1, and ``boxes`` per image.
        """
        rows = []
        for image_id, size_hw, image, found in zip(
            self.truth.image_ids,
            self.truth.sizes_hw.tolist(),
            self.images,
            mine_batch(self.images, encoder, self.mining, device),
            strict=True,
        ):
            scale = np.array([size_hw[1] / image.shape[2], size_hw[0] / image.shape[1]] * 2)
            best = np.argsort(-found.score, kind="stable")
            boxes = found.boxes_xyxy[best] * scale
            rows.append(ImageLabels.build(image_id, (size_hw[0], size_hw[1]), boxes, np.zeros(len(boxes))))
        mined = Labels.from_images(rows, (Category(1, "object"),), stage=0)
        recall = proposal_recall(self.truth, mined, (MAX_BOXES,))
        return {
            f"recall50@{MAX_BOXES}": recall[f"recall50@{MAX_BOXES}"],
            f"AR@{MAX_BOXES}": recall[f"AR@{MAX_BOXES}"],
            "boxes": sum(map(len, rows)) / len(rows),
        }


def load_encoder_recall(
    truth: str | Path, images: str | Path | None, count: int, mining: MiningConfig
) -> EncoderRecall:
    """Choose evenly spaced images of a labelled set and decode them.

    Args:
        truth: COCO JSON or Parquet with boxes.
        images: where its images are; found from the COCO JSON when left out.
        count: images at most.
        mining: settings.

    Raises:
        ValueError: the labels are not of these images.
        UnreadableImageError: one of them cannot be decoded.
    """
    labels = read_training_labels(Path(truth))
    source = open_images(images if images is not None else truth)
    present = [image_id for image_id in labels.image_ids if image_id in source]
    if not present:
        raise ValueError(
            f"truth: none of its {len(labels)} images is in {source.root} (first: {labels.image_ids[0]!r}, there are "
            f"ids like {source.ids[0]!r}); give the folder that its file names are relative to"
        )
    rows = np.unique(np.linspace(0, len(present) - 1, min(count, len(present))).round().astype(int))
    chosen = labels.select(present[row] for row in rows)
    pixels = (read_image(record) for record in source.subset(chosen.image_ids))
    return EncoderRecall(chosen, tuple(shrink(image, mining.image_size) for image in pixels), mining)
