"""``simdetr fit | validate | test``: Lightning's own commands on the same YAML files as the pipeline's."""

from __future__ import annotations

from pathlib import Path

from simdetr.exchange.weights import checkpoint_config, save_detector
from simdetr.recipe import RecipeCLI
from simdetr.reports.prediction_samples import write_fit_results


class FitCLI(RecipeCLI):
    """Leaves the detector where the pipeline would, in ``detector/`` below the root, and what a head found."""

    def after_fit(self) -> None:
        """Called by Lightning at the end of ``fit``."""
        if self.trainer.is_global_zero and self.trainer.state.finished:
            config = checkpoint_config(self.model.detector, self.datamodule)
            root = Path(self.trainer.default_root_dir)
            save_detector(self.model.detector, config, root / "detector")
            write_fit_results(root, self.model.detector, self.datamodule)
