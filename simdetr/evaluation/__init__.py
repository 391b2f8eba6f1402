"""Numbers: human labels and predictions in, the field's scores out.

In reading order:

    coco_metric          average precision as COCO defines it, overall and per class
    recall               how many objects are found, whatever their class
    class_agreement      does a detector know the pseudo-classes that it was trained on
    point_metric         landmarks: accuracy, errors and point-AP
    heat_map_boxes       score map of an image -> boxes around its high values
    localisation_metric  MaxBoxAcc, MaxBoxAccV2, PxAP
    intervals            differences of equal seeds -> intervals over seeds and images
    compare              rows of trainings -> means over seeds, paired differences
    early_warning        mined boxes -> signs that pretraining on them will not pay
    verdict              rows and evidence -> whether pretraining is worth it, and why
"""

from simdetr.evaluation.coco_metric import coco_metrics, per_class_ap
from simdetr.evaluation.compare import comparison_table
from simdetr.evaluation.heat_map_boxes import heat_map_boxes
from simdetr.evaluation.localisation_metric import LocalisationMetric, PixelAveragePrecision
from simdetr.evaluation.point_metric import per_class_point_metrics, point_metrics
from simdetr.evaluation.recall import proposal_recall

__all__ = [
    "LocalisationMetric",
    "PixelAveragePrecision",
    "coco_metrics",
    "comparison_table",
    "heat_map_boxes",
    "per_class_ap",
    "per_class_point_metrics",
    "point_metrics",
    "proposal_recall",
]
