"""simdetr: from unlabelled images to a pretrained detection transformer, from few labels to a detector.

    images -> mine -> cluster -> (fit -> relabel) x stages -> finetune -> evaluate | compare | predict

Read ``simdetr/pipeline.py`` first: it is the whole method, one call per step. Names are imported when they are first
used (PEP 562), because torch and Lightning take seconds and ``simdetr --help`` should not.
"""

from typing import TYPE_CHECKING

from simdetr.data.first_use import names_on_first_use

if TYPE_CHECKING:
    from simdetr.data.images import ImageSource, open_images
    from simdetr.data.label_files import read_labels, write_labels
    from simdetr.data.labels import Labels
    from simdetr.data.protocols import split
    from simdetr.labelling.autolabel import autolabel
    from simdetr.mining.store import ProposalStore
    from simdetr.pipeline import compare, finetune, mine_proposals, pretrain, report
    from simdetr.training.inference import evaluate, predict
else:
    __getattr__, __dir__ = names_on_first_use(
        __name__,
        {
            "data.images": ("ImageSource", "open_images"),
            "data.label_files": ("read_labels", "write_labels"),
            "data.labels": ("Labels",),
            "data.protocols": ("split",),
            "labelling.autolabel": ("autolabel",),
            "mining.store": ("ProposalStore",),
            "pipeline": ("compare", "finetune", "mine_proposals", "pretrain", "report"),
            "training.inference": ("evaluate", "predict"),
        },
    )

__all__ = [
    "ImageSource",
    "Labels",
    "ProposalStore",
    "autolabel",
    "compare",
    "evaluate",
    "finetune",
    "mine_proposals",
    "open_images",
    "predict",
    "pretrain",
    "read_labels",
    "report",
    "split",
    "write_labels",
]
