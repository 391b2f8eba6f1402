"""Images in, mined boxes out, a few images at a time: what there is to look at before there is a detector.

The images are mined as a pretraining on this machine would mine them. Of each the boxes that are the likeliest objects
are kept, all of one class that has no name yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.ops import nms

from simdetr.app.box_life import SAME_IOU
from simdetr.app.proposals import UNNAMED
from simdetr.app.run_files import RunFiles, parts_of
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import open_images
from simdetr.data.label_files import write_labels
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.mining.certainty import certainty
from simdetr.mining.miner import load_ahead, mine_rows
from simdetr.mining.store import ProposalRow
from simdetr.recipe import MiningJob
from simdetr.training.recipe_choice import for_mining

PART = 16
"""Images whose boxes are kept together, as soon as they are there; the first part is small."""


def propose_first(files: RunFiles, job: dict[str, Any]) -> dict[str, Any]:
    """Mine the images of a run into its parts; those that are there stay.

    Returns:
        What there is to say of it; ``unfinished`` where other runs were to be let through first.
    """
    source, device = open_images(files.images), job["device"] or default_device()
    chosen = for_mining(job["config"], files.images)
    settings = MiningJob(str(files.images), str(files.parts), chosen.configs, chosen.options, device).sections()
    if isinstance(settings.encoder, nn.Module):
        settings.encoder.to(device).eval()
    total, unreadable = len(source), 0
    for number, positions in enumerate(parts_of(total, PART)):
        part = files.part(number)
        if not part.is_file():
            if files.make_way.is_file():
                files.make_way.unlink()
                return {"unfinished": True, "message": f"{positions.start:,} of {total:,} images are mined"}
            with load_ahead(source, positions, settings.mining, device) as loaded:
                rows, reasons = mine_rows(loaded, settings.encoder, settings.mining, device)
            unreadable += len(reasons)
            write_labels(best_of(rows, job["parameters"]["max_boxes"]), part)
        files.tell(done=positions.stop, total=total, unit="images", message="looking for objects")
    message = f"mined {total:,} images"
    return {"message": message + (f", {unreadable:,} of them unreadable" if unreadable else "")}


def best_of(rows: Sequence[ProposalRow], count: int) -> Labels:
    """The boxes of each image that are the likeliest objects, with their certainty as score; at most ``count``.

    Of two that overlap by more than half the surer one stays: so few boxes are to be of different objects.
    """
    offsets = np.cumsum([0, *(len(row.regions) for row in rows)])
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(row.regions.boxes_xyxy for row in rows)])
    scores = np.concatenate([np.zeros(0, np.float32), *(row.regions.score for row in rows)])
    sizes = np.array([(row.height, row.width) for row in rows], np.int64).reshape(-1, 2)
    sure = certainty(scores, boxes, sizes, offsets)
    made = []
    for row, start, stop in zip(rows, offsets, offsets[1:], strict=False):
        kept = nms(torch.from_numpy(boxes[start:stop]), torch.from_numpy(sure[start:stop]), SAME_IOU)
        best = start + kept[:count].numpy()
        classes = [0] * len(best)
        size = (row.height, row.width)
        made.append(ImageLabels.build(row.image_id, size, boxes[best].tolist(), classes, sure[best].tolist()))
    return Labels.from_images(made, (Category(0, UNNAMED),))
