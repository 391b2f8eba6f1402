"""What ``pretrain``, ``finetune``, ``compare`` and ``report`` do: one call of ``pipeline.py``, a few printed lines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from simdetr import pipeline

OUT = Console()


def pretrain(**arguments: Any) -> None:
    """Pretrain a detector on unlabelled images: mine, cluster, then train and relabel for each stage.

    The same command again resumes a run that was stopped.
    """
    run = pipeline.pretrain(**arguments)
    trained = [run.detector(stage) for stage in run.stages() if run.has_detector(stage)]
    if trained:
        OUT.print(f"detector: {trained[-1]}; fine-tune it with simdetr finetune --init {run.path}", soft_wrap=True)
    OUT.print(f"report: {run.report}", soft_wrap=True)


def finetune(**arguments: Any) -> None:
    """Train a detector on labelled images, from a pretrained one or from scratch."""
    OUT.print(f"detector: {pipeline.finetune(**arguments)}", soft_wrap=True)


def compare(**arguments: Any) -> None:
    """Is pretraining worth it here? Fine-tune several starts alike, print the answer and write a page of it."""
    found = pipeline.compare(**arguments)
    OUT.print(Markdown(found.text()))
    OUT.print(f"report: {found.page}", soft_wrap=True)


def report(**arguments: Any) -> None:
    """Write the report page of a run from what is in its folder."""
    OUT.print(f"report: {pipeline.report(**arguments)}", soft_wrap=True)
