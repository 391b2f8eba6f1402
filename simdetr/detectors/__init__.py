"""Detection transformers: images and padding masks in, class logits and boxes out; matching, losses, predictions.

In reading order:

    detector               the contract: what training, relabelling, evaluation and heads need of any detector
    backbone               images -> feature maps
    position_encoding      where a cell or box is, as a vector
    deformable_attention   every query reads a few points of every map; the next two compute it
    deformable_attention_torch, deformable_attention_triton
    deformable_transformer encoder, decoder and the two-stage choice of queries
    deformable_detr        the detector of the method
    matcher, losses        predictions and targets -> assignment -> scalars
    predictions            logits and boxes -> detections
    swin_ram, vidt         ViDT and ViDT+: their body, the detector
    vidt_losses            their losses
    mask_vectors           instance masks as short vectors
    detreg                 DETReg, to compare with
    transformers_adapter   any DETR of transformers
    torchvision_adapter    Faster R-CNN, FCOS and RetinaNet of torchvision
"""

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
