"""Measures, pictures and the report: labels and predictions in, numbers and pages for people out."""

from simdetr.evaluation.coco_metric import coco_metrics, per_class_ap
from simdetr.evaluation.compare import comparison_table
from simdetr.evaluation.drawing import class_colour, class_montage, contact_sheet, draw_boxes, write_pictures
from simdetr.evaluation.proposal_recall import proposal_recall
from simdetr.evaluation.report import ReportData, write_report
from simdetr.evaluation.run_folder import collect_run

__all__ = [
    "ReportData",
    "class_colour",
    "class_montage",
    "coco_metrics",
    "collect_run",
    "comparison_table",
    "contact_sheet",
    "draw_boxes",
    "per_class_ap",
    "proposal_recall",
    "write_pictures",
    "write_report",
]
