"""From a few labels to many: label, verify, correct; which image next; when to stop.

In reading order:

    choices             what a user can choose
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

from typing import TYPE_CHECKING

from simdetr.data.first_use import names_on_first_use

if TYPE_CHECKING:
    from simdetr.labelling.annotator import SimulatedAnnotator
    from simdetr.labelling.autolabel import AutolabelRun
    from simdetr.labelling.choices import AutolabelSettings, LoopSettings, SelectionSettings
    from simdetr.labelling.loop import label_order, simulate_labelling
    from simdetr.labelling.stopping import AcceptRate, Budget, ErrorBound, Kappa, errors_left
else:
    __getattr__, __dir__ = names_on_first_use(
        __name__,
        {
            "annotator": ("SimulatedAnnotator",),
            "choices": ("AutolabelSettings", "LoopSettings", "SelectionSettings"),
            "autolabel": ("AutolabelRun",),
            "loop": ("label_order", "simulate_labelling"),
            "stopping": ("AcceptRate", "Budget", "ErrorBound", "Kappa", "errors_left"),
        },
    )

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
