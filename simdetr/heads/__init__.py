"""Heads on detectors and backbones: the contract, landmarks, weakly supervised localisation."""

from simdetr.heads.head import Head, HeadLosses
from simdetr.heads.headed_backbone import HeadedBackbone
from simdetr.heads.headed_detector import HeadedDetector

__all__ = ["Head", "HeadLosses", "HeadedBackbone", "HeadedDetector"]
