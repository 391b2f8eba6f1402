"""Whether an ONNX file computes what its detector computes: both in, numbers of each batch out.

Letters: B images, Q queries, K classes, H and W the padded size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from simdetr.boxes import pairwise_iou
from simdetr.detectors.detector import Detector, Prediction
from simdetr.detectors.predictions import Detections, postprocess

LARGEST_DIFFERENCE = 1e-3
"""Of two logits, or of two coordinates in fractions of the image."""
LEAST_AGREEMENT = 0.99
SAME_BOX_IOU = 0.99
TOP_K = 100


@dataclass(frozen=True)
class Comparison:
    """What an ONNX file and its detector make of one batch.

    Attributes:
        batch: Images.
        size_hw: Height and width of the padded batch, in pixels.
        logits: Largest difference of two logits.
        boxes: Largest difference of two coordinates.
        agreement: Part of the detector's best detections that the file has too, of one class and with an IoU above
            0.99.
        reordered: Whether its queries stand in another order, as those of a two-stage detector may whose scores are
            equal but for rounding.
    """

    batch: int
    size_hw: tuple[int, int]
    logits: float
    boxes: float
    agreement: float
    reordered: bool

    @property
    def is_equal(self) -> bool:
        """Whether the numbers are within the bars; one that is no number is not."""
        close = self.logits <= LARGEST_DIFFERENCE and self.boxes <= LARGEST_DIFFERENCE
        return close and self.agreement >= LEAST_AGREEMENT

    def line(self) -> str:
        """The numbers in one line."""
        order = ", queries in another order" if self.reordered else ""
        return (
            f"  {self.batch} x {self.size_hw[0]} x {self.size_hw[1]} px: logits differ by {self.logits:.1e} at most, "
            f"boxes by {self.boxes:.1e}; {self.agreement:.1%} of the best detections are the same{order}"
        )


def compare_with_file(
    detector: Detector, file: Path | bytes, shapes: Sequence[tuple[int, int, int]]
) -> list[Comparison]:
    """Run a file by onnxruntime on the CPU, beside the detector, on one batch of each shape; see ``example_batch``.

    Args:
        detector: In evaluation mode, on the CPU.
        file: The ONNX file, or what is in it.
        shapes: B, H and W of each batch.

    Raises:
        RuntimeError: onnxruntime cannot run it.
    """
    import onnxruntime

    batches = [example_batch(batch, (height, width)) for batch, height, width in shapes]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exception
    model = file if isinstance(file, bytes) else str(file)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        outputs = [
            session.run(["logits", "boxes"], {"images": images.numpy(), "mask": mask.numpy()})
            for images, mask in batches
        ]
    except Exception as error:  # its errors have no class of their own
        raise RuntimeError(f"onnxruntime cannot run the graph: {str(error).strip()[:500]}") from error
    results = []
    for (images, mask), (logits, boxes) in zip(batches, outputs, strict=True):
        with torch.no_grad():
            wanted = detector(images, mask)
        found: Prediction = {"pred_logits": torch.from_numpy(logits), "pred_boxes": torch.from_numpy(boxes)}
        results.append(compare(wanted, found, (images.shape[2], images.shape[3])))
    return results


def example_batch(batch: int, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images of soft random shapes [B, 3, H, W] and their mask [B, H, W]; image i has lost i sixths of its sides."""
    height, width = size_hw
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, 3, 12, 12, generator=generator)
    images = F.interpolate(coarse, size=size_hw, mode="bicubic", align_corners=False)
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    for index in range(1, batch):
        mask[index, height - height * index // 6 :] = True
        mask[index, :, width - width * index // 6 :] = True
    return images.masked_fill(mask[:, None], 0.0), mask


def compare(wanted: Prediction, found: Prediction, size_hw: tuple[int, int]) -> Comparison:
    """Compare two outputs for one batch.

    Args:
        wanted: Of the detector.
        found: Of the file.
        size_hw: Height and width of the batch in pixels, for the record.
    """
    kinds = (wanted["pred_logits"], found["pred_logits"]), (wanted["pred_boxes"], found["pred_boxes"])
    logits, boxes = (_difference(ours, theirs) for ours, theirs in kinds)
    reordered = max(logits, boxes) > LARGEST_DIFFERENCE
    if reordered:
        nearest = _nearest_queries(wanted, found)
        logits, boxes = (_difference(ours, theirs.gather(1, nearest.expand_as(ours))) for ours, theirs in kinds)
    return Comparison(
        batch=len(wanted["pred_logits"]),
        size_hw=size_hw,
        logits=logits,
        boxes=boxes,
        agreement=agreement(wanted, found),
        reordered=reordered and max(logits, boxes) <= LARGEST_DIFFERENCE,
    )


def agreement(wanted: Prediction, found: Prediction) -> float:
    """Part of the best detections of ``wanted`` that ``found`` has among its own; 1 where there are none."""
    pixels = [(1000, 1000)] * len(wanted["pred_logits"])
    matched = total = 0
    for ours, theirs in zip(postprocess(wanted, pixels, TOP_K), postprocess(found, pixels, TOP_K), strict=True):
        matched += int(_also_in(ours, theirs).sum())
        total += len(ours["scores"])
    return matched / total if total else 1.0


def _also_in(ours: Detections, theirs: Detections) -> Tensor:
    """Bool [N]: whether a detection is among others, with its class and its place."""
    same_class = ours["labels"][:, None] == theirs["labels"][None]
    boxes = ours["boxes_xyxy"].double(), theirs["boxes_xyxy"].double()
    same_place = (pairwise_iou(*boxes) > SAME_BOX_IOU) | (torch.cdist(*boxes, p=torch.inf) < 0.1)
    return (same_class & same_place).any(dim=1)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; equal infinities, as rows without a detection have them, do not differ."""
    return float(torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max())


def _nearest_queries(wanted: Prediction, found: Prediction) -> Tensor:
    """For each query the one of ``found`` that is most like it, int64 [B, Q, 1]."""
    ours, theirs = (torch.cat((out["pred_logits"], out["pred_boxes"]), dim=-1) for out in (wanted, found))
    return torch.cdist(ours, theirs, p=torch.inf).argmin(dim=-1, keepdim=True)
