"""From a few labels to many: label, verify, correct; which image next; when to stop.

In reading order:

    autolabel           the whole way from shots to a labelled set and a detector, stage by stage
    shots               what people give in -> what a labelling works on
    candidates          detections -> candidates for labels, each with a reason
    crop_features       the crop of every box -> a feature
    verification        features -> the votes of the nearest shots
    consensus           what a detector says of boxes in other views of their images -> better boxes, and doubts
    corrector_networks  networks that correct boxes
    correction          a corrector's training and its work
    assembly            candidates -> labels and regions to ignore
    gallery_page        the page of a run: gallery, votes, corrections, rejects
    image_selection     what is known of images -> which a person should see first
    annotator           a simulated person: truth and proposals -> what the person leaves
    stopping            what a person found -> errors left, and whether to stop
    loop                active labelling, round after round
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simdetr.labelling.annotator import SimulatedAnnotator
    from simdetr.labelling.autolabel import AutolabelRun, AutolabelSettings
    from simdetr.labelling.image_selection import SelectionSettings
    from simdetr.labelling.loop import LoopSettings, label_order, simulate_labelling
    from simdetr.labelling.stopping import AcceptRate, Budget, ErrorBound, Kappa, errors_left

__all__ = [
    "AcceptRate",
    "AutolabelRun",
    "AutolabelSettings",
    "Budget",
    "ErrorBound",
    "Kappa",
    "LoopSettings",
    "SelectionSettings",
    "SimulatedAnnotator",
    "errors_left",
    "label_order",
    "simulate_labelling",
]

_HOMES = {
    "AcceptRate": "stopping",
    "AutolabelRun": "autolabel",
    "AutolabelSettings": "autolabel",
    "Budget": "stopping",
    "ErrorBound": "stopping",
    "Kappa": "stopping",
    "LoopSettings": "loop",
    "SelectionSettings": "image_selection",
    "SimulatedAnnotator": "annotator",
    "errors_left": "stopping",
    "label_order": "loop",
    "simulate_labelling": "loop",
}


def __getattr__(name: str) -> object:
    """Import a name's module when it is first used: an estimate of errors needs nothing that trains."""
    if name not in _HOMES:
        raise AttributeError(f"module 'simdetr.labelling' has no attribute {name!r}")
    return getattr(import_module(f"simdetr.labelling.{_HOMES[name]}"), name)
