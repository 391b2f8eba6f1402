"""simdetr: from unlabelled images to a pretrained detection transformer, from few labels to a detector.

    images -> mine -> cluster -> (fit -> relabel) x stages -> finetune -> evaluate | compare | predict

Read ``simdetr/pipeline.py`` first: it is the whole method, one call per step.
"""

from simdetr.data.images import ImageSource, open_images
from simdetr.data.labels import Labels, read_labels, write_labels
from simdetr.pipeline import compare, evaluate, finetune, mine_proposals, predict, pretrain, report
from simdetr.proposals.store import ProposalStore

__all__ = [
    "ImageSource",
    "Labels",
    "ProposalStore",
    "compare",
    "evaluate",
    "finetune",
    "mine_proposals",
    "open_images",
    "predict",
    "pretrain",
    "read_labels",
    "report",
    "write_labels",
]
