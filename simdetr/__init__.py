"""simdetr: from unlabelled images to a pretrained detection transformer, from few labels to a detector.

    images -> mine -> cluster -> (fit -> relabel) x stages -> finetune -> evaluate | compare | predict

Read ``simdetr/pipeline.py`` first: it is the whole method, one call per step. Names are imported when they are first
used (PEP 562), because torch and Lightning take seconds and ``simdetr --help`` should not.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simdetr.data.images import ImageSource, open_images
    from simdetr.data.label_files import read_labels, write_labels
    from simdetr.data.labels import Labels
    from simdetr.data.protocols import split
    from simdetr.labelling.autolabel import autolabel
    from simdetr.mining.store import ProposalStore
    from simdetr.pipeline import compare, finetune, mine_proposals, pretrain, report
    from simdetr.training.inference import evaluate, predict

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

_HOMES = {
    "ImageSource": "simdetr.data.images",
    "open_images": "simdetr.data.images",
    "Labels": "simdetr.data.labels",
    "read_labels": "simdetr.data.label_files",
    "write_labels": "simdetr.data.label_files",
    "split": "simdetr.data.protocols",
    "evaluate": "simdetr.training.inference",
    "predict": "simdetr.training.inference",
    "ProposalStore": "simdetr.mining.store",
    "autolabel": "simdetr.labelling.autolabel",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'simdetr' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES.get(name, "simdetr.pipeline")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
