"""ONNX: a detector on disk in, one file for onnxruntime and other engines out.

The graph takes ``images``, float32 [B, 3, H, W], normalised and zero-padded at the bottom and right, and ``mask``, bool
[B, H, W], True = padding; it gives ``logits`` [B, Q, K] and ``boxes`` [B, Q, 4], cxcywh in fractions of each image
without its padding: Q queries, K classes. B, H and W are free. Categories, image sizes and normalisation stand in the
file's metadata. Source: torch.export and torch.onnx; `compare_with_file` checks the result.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simdetr.boxes import pairwise_iou
from simdetr.data.storage import atomic_path
from simdetr.detectors.detector import Detector, DetectorOutput, Prediction
from simdetr.detectors.predictions import postprocess
from simdetr.detectors.torchvision_adapter import TorchvisionDetector
from simdetr.exchange.weights import LoadedDetector, checkpoint_config, load_detector

LOG = logging.getLogger(__name__)
OPSET = 18
"""The oldest set of operators that torch's exporter writes by itself."""
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_SMALLEST_EXAMPLE = 320
_NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"
_NOISY_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")
LARGEST_DIFFERENCE = 1e-3
"""Of two logits, or of two coordinates in fractions of the image."""
LEAST_AGREEMENT = 0.99
SAME_BOX_IOU = 0.99
TOP_K = 100


class OnnxExportError(RuntimeError):
    """A detector cannot be written as an ONNX graph, or the graph does not compute what the detector does."""


class _Outputs(nn.Module):
    """A detector with plain tensors as outputs, without those that only training needs."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Q, K] and boxes [B, Q, 4]."""
        outputs: DetectorOutput = self.detector(images, mask)
        return outputs["pred_logits"], outputs["pred_boxes"]


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    verify: bool = False,
    image_size: tuple[int, int] | None = None,
    opset: int | None = None,
) -> str:
    """Write a detector as an ONNX file.

    Args:
        checkpoint: What ``load_detector`` reads.
        out: File to write; it appears whole or not at all, and with ``verify`` only if it passes.
        verify: Run the file by onnxruntime on the CPU, on padded batches of several sizes, and compare.
        image_size: (height, width) in pixels that all images have, padding included. By default any size will do, and
            where the network's code does not allow that, the largest that the detector's images have.
        opset: Version of ONNX's operators, 18 by default.

    Returns:
        What was written and compared, in lines.

    Raises:
        ModuleNotFoundError: The extra ``onnx`` is not installed.
        ValueError: ``image_size`` is no size.
        OnnxExportError: The detector cannot be exported, or onnxruntime finds something else.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Exporting to ONNX needs {', '.join(missing)}, which the extra `onnx` brings: pip install 'simdetr[onnx]'"
        )
    if image_size is not None and min(image_size) < 1:
        raise ValueError(f"image_size: expected a height and a width in pixels, got {image_size}.")
    loaded = load_detector(checkpoint)
    if isinstance(loaded.detector, TorchvisionDetector):
        raise OnnxExportError(
            f"checkpoint: {loaded.detector.init_args['architecture']} of torchvision chooses boxes one by one, which "
            "this exporter cannot trace; export its `model` by torchvision's own recipe, or to safetensors."
        )
    opset = opset or OPSET
    program, fixed_size = _trace_any_size(loaded, image_size, opset)
    program.model.metadata_props.update(metadata(loaded))
    name, classes = type(loaded.detector).__name__, loaded.detector.num_classes
    shapes = _other_shapes(_example_size(loaded.image_settings))
    if fixed_size:
        shapes = [(batch, *fixed_size) for batch in (1, 2, 3)]
    with atomic_path(out) as temporary:
        program.save(temporary)
        compared = compare_with_file(loaded.detector, temporary, shapes) if verify else []
        if not all(result.is_equal for result in compared):
            raise OnnxExportError(
                f"verify: onnxruntime does not find what {name} finds, {out} is not written:\n"
                + "\n".join(result.line() for result in compared)
                + "\nTry another opset, or image_size for a graph of one size."
            )
    size = "any height and width" if fixed_size is None else f"{fixed_size[0]} x {fixed_size[1]} px, padding included"
    title = f"{name} with {classes} classes in {out} ({out.stat().st_size / 1e6:.1f} MB, opset {opset})"
    return "\n".join([f"{title}: any number of images, {size}", *(result.line() for result in compared)])


def metadata(loaded: LoadedDetector) -> dict[str, str]:
    """What one has to know to use the file: categories and image settings as JSON, versions and the class."""
    config = checkpoint_config(loaded.detector, loaded)
    return {
        "categories": json.dumps(config["categories"]),
        "image_settings": json.dumps(config["image_settings"]),
        "class_path": config["class_path"],
        "simdetr_version": version("simdetr"),
    }


def _example_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width to trace and compare with: those of the detector's own images, but no map of a single cell."""
    height = max(int(settings.get("short_side", 0)), _SMALLEST_EXAMPLE)
    return height, height * 6 // 5


def _other_shapes(size_hw: tuple[int, int]) -> list[tuple[int, int, int]]:
    """One image of that size, two upright ones, three of sides that nothing divides."""
    height, width = size_hw
    return [(1, height, width), (2, width, height + 7), (3, height - 61, width - 29)]


def _trace_any_size(
    loaded: LoadedDetector, image_size: tuple[int, int] | None, opset: int
) -> tuple[Any, tuple[int, int] | None]:
    """The program, and the one size that it takes; None for any."""
    detector, example = loaded.detector, _example_size(loaded.image_settings)
    if image_size is not None:
        return _trace(detector, image_size, opset, any_size=False), image_size
    try:
        return _trace_checked(detector, example, opset), None
    except OnnxExportError as error:
        side = int(loaded.image_settings.get("max_side", max(example)))
        program = _trace(detector, (side, side), opset, any_size=False)
        LOG.warning("%s. It is for images padded to %d x %d px; image_size gives another size.", error, side, side)
    return program, (side, side)


def _trace_checked(detector: Detector, example: tuple[int, int], opset: int) -> Any:  # noqa: ANN401
    """A program for any size, tried at another one: numbers that pass through Python's lists become constants."""
    names = ("window_size", "num_windows")  # of Swin; of the ViTs of LW-DETR and RF-DETR
    if any(getattr(module, name, None) for module in detector.modules() for name in names):
        # Swin's windows are padded, shifted and masked by the map's size: the exporter would work on that for hours
        raise OnnxExportError(_cannot(detector, "any size", "its backbone attends within windows"))
    program = _trace(detector, example, opset, any_size=True)
    try:
        (result,) = compare_with_file(detector, program.model_proto.SerializeToString(), _other_shapes(example)[1:2])
    except RuntimeError as error:
        raise OnnxExportError(_cannot(detector, "any size", _first_line(error))) from error
    if not result.is_equal:
        raise OnnxExportError(_cannot(detector, "any size", f"its graph serves one size alone,{result.line()}"))
    return program


def _trace(detector: Detector, size_hw: tuple[int, int], opset: int, *, any_size: bool) -> Any:  # noqa: ANN401
    """The ONNX program of a detector; two images, because of a single one it would learn that there is one."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, dict[int, Any]] = {"images": {0: "batch"}, "mask": {0: dynamic}}
    if any_size:
        shapes = {"images": {0: "batch", 2: "height", 3: "width"}, "mask": dict.fromkeys(range(3), dynamic)}
    with _quiet():
        try:
            return torch.onnx.export(
                _Outputs(detector).eval(),
                example_batch(2, size_hw),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["images", "mask"],
                output_names=["logits", "boxes"],
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # what cannot be traced fails in any way
            sizes = "any size" if any_size else f"{size_hw[0]} x {size_hw[1]} px"
            raise OnnxExportError(_cannot(detector, sizes, _first_line(error.__cause__ or error))) from error


def _cannot(detector: Detector, sizes: str, reason: str) -> str:
    return f"{type(detector).__name__} cannot be exported to ONNX for images of {sizes}: {reason}"


def _first_line(error: BaseException) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own passes from the user, and transformers' checks of sizes from the graph."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    before = os.environ.get(_NO_CHECKS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|onnxscript|onnx_ir|copyreg)\b")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ[_NO_CHECKS] = "1"
        try:
            yield
        finally:
            os.environ.pop(_NO_CHECKS)
            if before is not None:
                os.environ[_NO_CHECKS] = before
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


# ----------------------------------------------------------------------------------------------------------------------
# Whether the file computes what its detector computes.


@dataclass(frozen=True)
class Comparison:
    """What an ONNX file and its detector make of one batch.

    Attributes:
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
    """Run an ONNX file, or what is in it, by onnxruntime beside the detector, in evaluation mode and on the CPU both.

    ``shapes`` are B, H and W of batches, see ``example_batch``. What onnxruntime cannot run is a RuntimeError.
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
    """Compare the detector's output with the file's, for one batch of this size."""
    kinds = (wanted["pred_logits"], found["pred_logits"]), (wanted["pred_boxes"], found["pred_boxes"])
    logits, boxes = (_difference(ours, theirs) for ours, theirs in kinds)
    reordered = max(logits, boxes) > LARGEST_DIFFERENCE
    if reordered:  # for each query the one of the file that is most like it
        rows, others = (torch.cat((out["pred_logits"], out["pred_boxes"]), dim=-1) for out in (wanted, found))
        nearest = torch.cdist(rows, others, p=torch.inf).argmin(dim=-1, keepdim=True)
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
        same_class = ours["labels"][:, None] == theirs["labels"][None]
        boxes = ours["boxes_xyxy"].double(), theirs["boxes_xyxy"].double()
        same_place = (pairwise_iou(*boxes) > SAME_BOX_IOU) | (torch.cdist(*boxes, p=torch.inf) < 0.1)
        matched += int((same_class & same_place).any(dim=1).sum())
        total += len(ours["scores"])
    return matched / total if total else 1.0


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; equal infinities, as rows without a detection have them, do not differ."""
    return float(torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max())
