"""Images and boxes: reading, checking, augmenting and writing them.

In: files of the user's. Out: `ImageSource`, `Labels` and batches for a detector.
"""

from simdetr.data.coco import LabelProblems, read_coco, write_coco, write_detections
from simdetr.data.dataset import Batch, DetectionDataset, collate
from simdetr.data.doctor import DoctorReport, examine, summary
from simdetr.data.images import ImageRecord, ImageSource, UnreadableImageError, open_images, read_image
from simdetr.data.labels import Category, ImageLabels, LabelError, Labels, read_labels, write_labels
from simdetr.data.lineage import Lineage
from simdetr.data.map_file import read_map
from simdetr.data.map_projection import map_targets
from simdetr.data.mosaic import Mosaic
from simdetr.data.quarantine import Quarantine, TooManyUnreadableError
from simdetr.data.reference_points import ReferencePoints, with_reference_points
from simdetr.data.transforms import eval_transforms, train_transforms

__all__ = [
    "Batch",
    "Category",
    "DetectionDataset",
    "DoctorReport",
    "ImageLabels",
    "ImageRecord",
    "ImageSource",
    "LabelError",
    "LabelProblems",
    "Labels",
    "Lineage",
    "Mosaic",
    "Quarantine",
    "ReferencePoints",
    "TooManyUnreadableError",
    "UnreadableImageError",
    "collate",
    "eval_transforms",
    "examine",
    "map_targets",
    "open_images",
    "read_coco",
    "read_image",
    "read_labels",
    "read_map",
    "summary",
    "train_transforms",
    "with_reference_points",
    "write_coco",
    "write_detections",
    "write_labels",
]
