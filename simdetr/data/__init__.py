"""Images and labels: what the user brings, read, checked, augmented and written.

In reading order:

    images              a folder, list, COCO file, tar shards or URL -> ordered images with ids; a file -> pixels
    spellings           file names as other tools wrote them -> ids of images
    quarantine          what could not be read, and when to stop
    annotations         the boxes of one image, their categories and lineage
    category_matching   which class of one file is which of another: by name
    points, masks       a point per box, an instance mask per box
    labels              the one table of the boxes of a set of images
    label_report        what reading a label file met: problems, changes, unlabelled images
    label_checks        labels held against the images they are of, and against their use
    coco                COCO JSON in and out
    label_formats       YOLO, Pascal VOC, Label Studio, CVAT and CSV, in and out; one of them to another
    label_files         any tool's label file or folder -> that table; the table in Parquet
    image_level         classes of whole images
    protocols           few-label protocols: one COCO file -> smaller ones that everybody draws alike
    dataset             images and labels -> samples and padded batches
    augmentation        transforms and mosaics of samples
    reference_points    the point of an object that a landmark head learns
    map3d               landmarks of a 3-D map <-> points in images
    pretrained_weights  checkpoint, package or URL -> the tensors of a backbone
    doctor              what is wrong with images and labels, before a long run meets it
    scenes              drawn images with exact boxes
    legal_values        is a value one of the few that there are
    first_use           names of a folder that are imported when they are first used
    class_paths         classes that configs and checkpoints name, also by the names of before
    storage             paths and URLs; files that are there whole or not at all
    machine             how many cores, threads and loader processes to use

Names are imported when they are first used (PEP 562): `simdetr.data.machine` must be there before torch.
"""

from typing import TYPE_CHECKING

from simdetr.data.first_use import names_on_first_use

if TYPE_CHECKING:
    from simdetr.data.annotations import Category, ImageLabels, LabelError, Lineage
    from simdetr.data.augmentation import Mosaic, MosaicTiles, eval_transforms, train_transforms
    from simdetr.data.coco import read_coco, write_coco, write_detections
    from simdetr.data.dataset import Batch, DetectionDataset, collate
    from simdetr.data.doctor import DoctorReport, examine, summary
    from simdetr.data.images import ImageRecord, ImageSource, UnreadableImageError, open_images, read_image
    from simdetr.data.label_files import read_labels, write_labels
    from simdetr.data.label_report import LabelReport
    from simdetr.data.labels import Labels
    from simdetr.data.map3d import map_targets, read_map
    from simdetr.data.quarantine import Quarantine, TooManyUnreadableError
    from simdetr.data.reference_points import ReferencePoints, with_reference_points
else:
    __getattr__, __dir__ = names_on_first_use(
        __name__,
        {
            "annotations": ("Category", "ImageLabels", "LabelError", "Lineage"),
            "augmentation": ("Mosaic", "MosaicTiles", "eval_transforms", "train_transforms"),
            "coco": ("read_coco", "write_coco", "write_detections"),
            "dataset": ("Batch", "DetectionDataset", "collate"),
            "doctor": ("DoctorReport", "examine", "summary"),
            "images": ("ImageRecord", "ImageSource", "UnreadableImageError", "open_images", "read_image"),
            "label_files": ("read_labels", "write_labels"),
            "label_report": ("LabelReport",),
            "labels": ("Labels",),
            "map3d": ("map_targets", "read_map"),
            "quarantine": ("Quarantine", "TooManyUnreadableError"),
            "reference_points": ("ReferencePoints", "with_reference_points"),
        },
    )

__all__ = [
    "Batch",
    "Category",
    "DetectionDataset",
    "DoctorReport",
    "ImageLabels",
    "ImageRecord",
    "ImageSource",
    "LabelError",
    "LabelReport",
    "Labels",
    "Lineage",
    "Mosaic",
    "MosaicTiles",
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
