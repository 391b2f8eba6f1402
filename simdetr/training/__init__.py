"""Training: labelled images and a detector in, a trained detector and the labels it gives out."""

from simdetr.training.datamodule import DetectionData
from simdetr.training.detection_task import DetectionTask, NonFiniteLossError
from simdetr.training.optimisation import lr_factor, parameter_groups
from simdetr.training.relabel import InferenceSettings, detect, relabel
from simdetr.training.run_folder import RunFolder, RunMismatchError
from simdetr.training.train import train
from simdetr.training.weights import LoadReport, load_detector, load_weights, save_detector

__all__ = [
    "DetectionData",
    "DetectionTask",
    "InferenceSettings",
    "LoadReport",
    "NonFiniteLossError",
    "RunFolder",
    "RunMismatchError",
    "detect",
    "load_detector",
    "load_weights",
    "lr_factor",
    "parameter_groups",
    "relabel",
    "save_detector",
    "train",
]
