"""Detection transformers: images and padding masks in, class logits and boxes out; matching, losses, predictions."""

from simdetr.detectors.backbone import Backbone
from simdetr.detectors.deformable_attention import multi_scale_deformable_attention
from simdetr.detectors.deformable_detr import DeformableDETR
from simdetr.detectors.detector import Detector, DetectorOutput, Prediction
from simdetr.detectors.detreg import DETReg
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.matcher import HungarianMatcher
from simdetr.detectors.predictions import Detections, best_per_query, postprocess
from simdetr.detectors.torchvision_adapter import TorchvisionDetector
from simdetr.detectors.transformers_adapter import TransformersDetector
from simdetr.detectors.vidt import ViDT

__all__ = [
    "Backbone",
    "DETReg",
    "DeformableDETR",
    "DetectionLoss",
    "Detections",
    "Detector",
    "DetectorOutput",
    "HungarianMatcher",
    "Prediction",
    "TorchvisionDetector",
    "TransformersDetector",
    "ViDT",
    "best_per_query",
    "multi_scale_deformable_attention",
    "postprocess",
]
