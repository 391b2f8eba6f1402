"""Detection transformers: images and padding masks in, class logits and boxes out; matching, losses, predictions."""

from simdetr.detectors.backbone import Backbone
from simdetr.detectors.deformable_attention import multi_scale_deformable_attention
from simdetr.detectors.deformable_detr import DeformableDETR
from simdetr.detectors.detector import Detector, DetectorOutput, Prediction
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.matcher import HungarianMatcher
from simdetr.detectors.predictions import Detections, postprocess

__all__ = [
    "Backbone",
    "DeformableDETR",
    "DetectionLoss",
    "Detections",
    "Detector",
    "DetectorOutput",
    "HungarianMatcher",
    "Prediction",
    "multi_scale_deformable_attention",
    "postprocess",
]
