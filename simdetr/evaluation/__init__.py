"""Measures, pictures and the report: labels and predictions in, numbers and pages for people out."""

from simdetr.evaluation.coco_metric import coco_metrics, per_class_ap
from simdetr.evaluation.compare import comparison_table
from simdetr.evaluation.drawing import class_colour, draw_boxes, draw_points, write_pictures
from simdetr.evaluation.heat_map_boxes import heat_map_boxes
from simdetr.evaluation.heat_map_drawing import draw_heat_map
from simdetr.evaluation.localisation_metric import LocalisationMetric, PixelAveragePrecision
from simdetr.evaluation.loss_flow import draw_flow
from simdetr.evaluation.montages import class_montage, contact_sheet
from simdetr.evaluation.point_metric import per_class_point_metrics, point_metrics
from simdetr.evaluation.proposal_recall import proposal_recall
from simdetr.evaluation.report import ReportData, write_report
from simdetr.evaluation.run_folder import collect_run

__all__ = [
    "LocalisationMetric",
    "PixelAveragePrecision",
    "ReportData",
    "class_colour",
    "class_montage",
    "coco_metrics",
    "collect_run",
    "comparison_table",
    "contact_sheet",
    "draw_boxes",
    "draw_flow",
    "draw_heat_map",
    "draw_points",
    "heat_map_boxes",
    "per_class_ap",
    "per_class_point_metrics",
    "point_metrics",
    "proposal_recall",
    "write_pictures",
    "write_report",
]
