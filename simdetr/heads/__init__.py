"""Heads on detectors and backbones: the contract, landmarks, weakly supervised localisation, features for labelling.

In reading order:

    head                 the contract of heads
    headed               a detector or a backbone with a head on it
    landmarks            landmark head: class and reference point
    landmark_targets     landmarks of a batch as tensors of one shape
    landmark_losses      class loss and class-weighted point loss
    landmark_grid        landmarks by subregions of a map
    landmark_queries     landmarks by queries of a decoder
    localisation         localisation from image-level labels
    attention            what it looks at: non-local attention and the three masks
    localisation_losses  its losses
    score_maps           its score maps and their boxes
    query_mil            localisation by the queries of a detector
    location_prior       where objects recur: a learned map over the image
    spatial_pyramid      spatial pyramid pooling whose internal layers are read
    gradient_reversal    features that do not tell labelled images from unlabelled ones
    stack                several heads on one detector
"""

from simdetr.heads.gradient_reversal import DomainAdversary
from simdetr.heads.head import Head, HeadLosses
from simdetr.heads.headed import HeadedBackbone, HeadedDetector
from simdetr.heads.landmarks import LandmarkHead
from simdetr.heads.localisation import LocalisationHead
from simdetr.heads.location_prior import LocationPrior
from simdetr.heads.query_mil import QueryMILHead
from simdetr.heads.spatial_pyramid import SpatialPyramid, SpatialPyramidNeck
from simdetr.heads.stack import HeadStack

__all__ = [
    "DomainAdversary",
    "Head",
    "HeadLosses",
    "HeadStack",
    "HeadedBackbone",
    "HeadedDetector",
    "LandmarkHead",
    "LocalisationHead",
    "LocationPrior",
    "QueryMILHead",
    "SpatialPyramid",
    "SpatialPyramidNeck",
]
