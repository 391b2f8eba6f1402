"""``simdetr fit | validate | test``: Lightning's own commands on the same YAML files as the pipeline's."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from simdetr.exchange.weights import checkpoint_config, save_detector
from simdetr.recipe import RecipeCLI, contents_of
from simdetr.reports.prediction_samples import write_fit_results
from simdetr.training.run_folder import BEST, CHECKPOINTS, RESUME, RunFolder

LOG = logging.getLogger(__name__)


class FitCLI(RecipeCLI):
    """As the pipeline trains: a killed training goes on, and its detector ends in ``detector/`` below the root."""

    def before_fit(self) -> None:
        """Go on from the point that a killed training in the same folder has left.

        Raises:
            RunMismatchError: It had other settings, or other labels.
        """
        given = self.config["fit"]
        if given.ckpt_path is not None or given.trainer.default_root_dir is None:
            return
        checkpoints = Path(given.trainer.default_root_dir) / CHECKPOINTS
        run = RunFolder(checkpoints)
        killed = (checkpoints / RESUME).is_file() and run.config.is_file()  # nobody knows another point's settings
        settings = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=True))["fit"]
        run.claim(yaml.safe_dump(settings), None if killed else ())
        run.claim_contents(contents_of(given), begun=killed)
        if not killed and self.trainer.is_global_zero:
            (checkpoints / BEST).unlink(missing_ok=True)  # of a training that this one does not go on with
        if killed:
            LOG.info("going on from %s", checkpoints / RESUME)
            self.config_init["fit"]["ckpt_path"] = str(checkpoints / RESUME)

    def after_fit(self) -> None:
        """Keep the detector, and what a head found on validation images."""
        if self.trainer.is_global_zero and self.trainer.state.finished:
            config = checkpoint_config(self.model.detector, self.datamodule)
            root = Path(self.trainer.default_root_dir)
            save_detector(self.model.detector, config, root / "detector")
            write_fit_results(root, self.model.detector, self.datamodule)
            (root / CHECKPOINTS / RESUME).unlink(missing_ok=True)
