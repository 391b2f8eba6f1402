"""An image and its boxes in, a picture of how a training might see them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simdetr.app.box_life import Corners
from simdetr.app.picture_files import encoded
from simdetr.app.refusals import Refusal
from simdetr.data.images import UnreadableImageError, read_image

_SIDE_PX = 480


def training_view(path: Path, boxes: Sequence[tuple[Corners, int]], changes: Mapping[str, Any], seed: int) -> bytes:
    """A JPEG with boxes drawn.

    Args:
        path: of the image.
        boxes: corners in its pixels, and class.
        changes: of the image, as `simdetr.data.augmentation.train_transforms` takes them.
        seed: of what is drawn at random.

    Raises:
        Refusal: 415, the image cannot be read.
    """
    import torch  # these here: the server imports this module, and another process calls it
    from torchvision import tv_tensors

    from simdetr.data.augmentation import train_transforms
    from simdetr.data.dataset import pixel_boxes
    from simdetr.reports.drawing import draw_boxes

    try:
        pixels = read_image(path)
    except UnreadableImageError as error:
        raise Refusal(415, f"{path.name} cannot be read: {error.reason}") from error
    transform = train_transforms([_SIDE_PX], 2 * _SIDE_PX, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **changes)
    corners = torch.tensor([xyxy for xyxy, _ in boxes]).reshape(-1, 4)
    target = {
        "boxes": pixel_boxes(corners, (pixels.shape[1], pixels.shape[2])),
        "labels": torch.tensor([class_id for _, class_id in boxes], dtype=torch.int64),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed, left = transform(tv_tensors.Image(pixels), target)
    return encoded(draw_boxes((changed.clamp(0, 1) * 255).to(torch.uint8), left["boxes"]), "JPEG")
