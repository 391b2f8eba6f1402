"""A recipe in, the same recipe with the largest batch that fits the device out; kept with the run.

The search is in ``training/auto_batch.py``; this module ties it to recipes and run folders for ``--auto-batch``.
"""

from __future__ import annotations

from dataclasses import replace

from simdetr.recipe import Recipe
from simdetr.training.auto_batch import BatchSettings, Scaling, auto_batch_options
from simdetr.training.run_folder import RunFolder

AUTO_BATCH = "auto_batch.json"


def is_chosen(run: RunFolder) -> bool:
    """Whether the run has its batch size already."""
    return (run.path / AUTO_BATCH).is_file()


def fit_to_device(recipe: Recipe, run: RunFolder, auto_batch: bool | Scaling, *options: str) -> Recipe:
    """The recipe with the largest batch that fits the device and learning rates to go with it, found once per run.

    Args:
        recipe: Of the training.
        run: Where the choice is kept.
        auto_batch: How learning rates follow the batch size: ``linear`` (True), ``sqrt``; False changes nothing.
        options: What the training needs beside the recipe, such as its labels.
    """
    if not auto_batch:
        return recipe
    config, _ = recipe.resolved(*options)
    rates = config.model
    before = BatchSettings(config.data.batch_size, rates.lr, rates.backbone_lr, rates.new_lr)
    scaling: Scaling = "linear" if isinstance(auto_batch, bool) else auto_batch
    found = auto_batch_options(run.path / AUTO_BATCH, before, scaling, lambda: recipe.training(run.path, *options))
    return replace(recipe, options=(*recipe.options, *found))
