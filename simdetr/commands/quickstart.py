"""The whole method in minutes, offline: scenes drawn here in, a report and a comparison with training from scratch out.

With the user's own labelled images in place of the scenes, the same lines run on them, with the recipe of the machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from simdetr.data.scenes import PLAIN_CLASSES, render_scenes

OUT = Console()
PRETRAIN_CONFIG = Path(__file__).with_name("quickstart_pretrain.yaml")
FINETUNE_CONFIG = Path(__file__).with_name("quickstart_finetune.yaml")
NUM_TRAIN, NUM_VAL = 480, 120
SCENE_SIZE_HW = (128, 128)
LABEL_FRACTION = 0.1
SEEDS = (0,)


@dataclass(frozen=True)
class LabelledSet:
    """Images to pretrain on, with boxes for some fine-tuning and evaluation."""

    images: Path
    labels: Path
    val_images: Path
    val_labels: Path


def quickstart(
    out: Path = Path("runs/quickstart"),
    images: Path | None = None,
    labels: Path | None = None,
    val_images: Path | None = None,
    val_labels: Path | None = None,
    config: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> None:
    """Run the whole method offline on scenes drawn here, and compare it with training from scratch.

    Args:
        out: Run folder.
        images: Your own images instead of the drawn scenes.
        labels: COCO JSON with boxes for them; needed for the comparison.
        val_images: Images to evaluate on.
        val_labels: COCO JSON with boxes for them.
        config: YAML files over the built-in ones; with your own images in place of the recipe for this machine.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
    """
    own = None
    if images is not None:
        if labels is None or val_images is None or val_labels is None:
            raise ValueError(
                "quickstart: with --images, give --labels, --val_images and --val_labels too, for the comparison; "
                "without labels use `simdetr pretrain --images DIR`."
            )
        own = LabelledSet(images, labels, val_images, val_labels)
    table, page = pretrain_and_compare(out, own, config=config, options=options)
    OUT.print(Markdown(table))
    OUT.print(f"report: {page}", soft_wrap=True)


def pretrain_and_compare(
    out: Path, own: LabelledSet | None = None, *, config: Sequence[str] = (), options: Sequence[str] = ()
) -> tuple[str, Path]:
    """Pretrain, fine-tune with and without it, report; resumes like every run.

    Args:
        out: Run folder.
        own: The user's images and labels; drawn scenes when left out.
        config: As of ``quickstart``, for both trainings.
        options: As of ``quickstart``, for both trainings.

    Returns:
        The comparison as a Markdown table, and the report's path.
    """
    from simdetr import pipeline
    from simdetr.evaluation.compare import comparison_table

    data = own or draw_scenes(out / "scenes")
    built_in = own is None
    pretraining, finetuning = ((path,) if built_in else () for path in (PRETRAIN_CONFIG, FINETUNE_CONFIG))
    run = pipeline.pretrain(data.images, out, (*pretraining, *config), truth=data.labels, options=options)
    found = pipeline.compare(
        data.images,
        data.labels,
        run.path,
        out / "comparison",
        (*finetuning, *config),
        val_images=data.val_images,
        val_labels=data.val_labels,
        fractions=(LABEL_FRACTION,),
        seeds=SEEDS,
        options=options,
    )
    shutil.copyfile(out / "comparison" / "comparison.json", out / "comparison.json")
    page = pipeline.report(run.path, data.images, truth=data.labels)
    return comparison_table(found.rows), page


def draw_scenes(folder: Path) -> LabelledSet:
    """Render plain scenes for training and validation once; a finished folder is used as it is."""
    sets = {}
    for split, count, seed in (("train", NUM_TRAIN, 0), ("val", NUM_VAL, 1)):
        sets[split] = folder / split
        done = folder / f"{split}.json"
        wanted = {"count": count, "size_hw": list(SCENE_SIZE_HW), "seed": seed, "style": "plain"}
        if not done.is_file() or json.loads(done.read_text(encoding="utf-8")) != wanted:
            render_scenes(sets[split], count, SCENE_SIZE_HW, seed, PLAIN_CLASSES, "plain")
            done.write_text(json.dumps(wanted), encoding="utf-8")
    train, val = sets["train"], sets["val"]
    return LabelledSet(train, train / "instances.json", val, val / "instances.json")
