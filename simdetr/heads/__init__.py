"""Heads on detectors and backbones: the contract, landmarks, weakly supervised localisation."""

from simdetr.heads.head import Head, HeadLosses
from simdetr.heads.headed_backbone import HeadedBackbone
from simdetr.heads.headed_detector import HeadedDetector
from simdetr.heads.landmarks import LandmarkHead
from simdetr.heads.localisation import LocalisationHead
from simdetr.heads.query_mil import QueryMILHead

__all__ = ["Head", "HeadLosses", "HeadedBackbone", "HeadedDetector", "LandmarkHead", "LocalisationHead", "QueryMILHead"]
