"""One YAML, two ways to run it: Lightning's own ``fit | validate | test`` and the stages of ``pipeline.py``.

In: config files and command-line options. Out: the pipeline's sections, or a Trainer, a DetectionTask and a
DetectionData that fit together; ``num_classes`` flows from the labels to the detector and is never typed. The sections
``encoder``, ``mining``, ``clustering``, ``self_training`` and ``inference`` belong to the pipeline; ``fit`` reads and
ignores them.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn

from simdetr.data.class_paths import current_arguments
from simdetr.data.images import IMAGE_SUFFIXES, ImageSource, open_images
from simdetr.data.label_files import is_known, read_with_report
from simdetr.data.machine import default_device
from simdetr.data.storage import atomic_path, content_hash
from simdetr.detectors.detector import Detector
from simdetr.exchange.weights import (
    brings_weights,
    detector_class,
    read_checkpoint,
    without_downloads,
)
from simdetr.mining.batch import MiningConfig
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.encoders import Encoder
from simdetr.mining.miner import mine
from simdetr.mining.processes import Job, mine_in_processes
from simdetr.mining.store import ProposalStore
from simdetr.training.arms import (
    BACKBONE,
    Arm,
    Variant,
    default_arms,
    detreg_arguments,
    read_arms,
    run_settings,
)
from simdetr.training.auto_batch import BatchSettings, Scaling, auto_batch_options
from simdetr.training.datamodule import DetectionData, sizes_up_to
from simdetr.training.detection_task import CocoValidation, DetectionTask, check_start, fixed_parts
from simdetr.training.fusion import Fusion
from simdetr.training.label_budgets import LabelBudget, read_budgets
from simdetr.training.recipe_choice import for_finetuning
from simdetr.training.run_folder import CHECKPOINTS, RunFolder, detector_folder, leads
from simdetr.training.run_time import QUERIES, measure
from simdetr.training.throughput import Throughput
from simdetr.training.train import AtomicCheckpointIO, checkpoint_callbacks
from simdetr.training.training_bar import TrainingProgress

LOG = logging.getLogger(__name__)
SEEDS = ("data.seed", "model.seed", "seed_everything")
_MINE = "from simdetr.mining.processes import work; from simdetr.recipe import MiningJob; work(MiningJob.build)"
_DETECTOR = "--model.detector=simdetr.detectors.DeformableDETR"  # a recipe wants one; mining does not use it
DEFAULT_ENCODER = f"{ColourTextureEncoder.__module__}.{ColourTextureEncoder.__name__}"


@dataclass(frozen=True)
class SelfTrainingConfig:
    """Rounds of training and relabelling.

    Args:
        stages: Rounds; the document found a third to change nothing.
        iou_threshold: Overlap above which the less confident of two boxes goes.
        max_boxes: Most confident boxes kept per image after the overlap filter.
        fusion: How the labels before, mined at first, take part in those of a stage; null takes the detector's alone.
        min_certainty: Boxes of a stage's labels that are less certain are background when the next stage is trained.
        sharpening: Exponent on the certainty of the others, which is how much a box counts in training: above 1, a
            detector learns more from what is certain, and is surer itself.
        from_scratch: Start each round from new weights instead of the last round's.
        remine: Make the labels of a round by mining and clustering anew, with the backbone that it has trained as the
            encoder (Algorithm 1, line 3), instead of taking its detections; ``fusion`` then has no part.
        checkpoint_every_steps: Steps of any training, also of a fine-tuning, between two points a killed run can resume
            from; a tenth of the training, but 10 to 500, when left out.
    """

    stages: int = 2
    iou_threshold: float = 0.55
    max_boxes: int = 100
    fusion: Fusion | None = field(default_factory=Fusion)
    min_certainty: float = 0.15
    sharpening: float = 1.5
    from_scratch: bool = False
    remine: bool | None = None
    checkpoint_every_steps: int | None = None

    def data_options(self) -> tuple[str, ...]:
        """How much of a stage's labels the next stage learns, as options of its training."""
        return (f"--data.min_score={self.min_certainty}", f"--data.score_power={self.sharpening}")


class RecipeError(ValueError):
    """Config files or options that do not fit together; the message names the key."""


class PipelineSections(NamedTuple):
    """What the pipeline needs beside the training itself."""

    encoder: Encoder
    mining: MiningConfig
    clustering: ClusteringConfig
    self_training: SelfTrainingConfig
    inference: Throughput


def add_pipeline_sections(parser: ArgumentParser, *, build: bool) -> None:
    """Declare the sections that only the pipeline uses; a training does not ``build`` an encoder."""
    parser.add_subclass_arguments(nn.Module, "encoder", instantiate=build, help="Frozen encoder of the mining.")
    parser.set_defaults({"encoder": {"class_path": DEFAULT_ENCODER}})
    parser.add_class_arguments(MiningConfig, "mining")
    parser.add_class_arguments(ClusteringConfig, "clustering")
    parser.add_class_arguments(SelfTrainingConfig, "self_training")
    parser.add_class_arguments(Throughput, "inference")


class RecipeCLI(LightningCLI):
    """Lightning's command line for DetectionTask and DetectionData, with the pipeline's sections beside them.

    Args:
        args: Arguments instead of those of the process.
        run: Whether the first argument is a subcommand to run.
        parse_only: Parse and check, but build nothing: the labels of the first stage do not exist yet.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True, parse_only: bool = False) -> None:
        self._parse_only = parse_only
        with warnings.catch_warnings():
            # the arguments are ours on purpose, also under the `simdetr` command
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
            try:
                with constructors_speak():
                    self._build(args, run)
            except ArgumentError as error:
                raise RecipeError(f"config: {error}") from error

    def _build(self, args: Sequence[str] | None, run: bool) -> None:
        super().__init__(
            DetectionTask,
            DetectionData,
            args=list(current_arguments(args)) if args is not None else None,
            run=run,
            parser_kwargs={} if run else {"exit_on_error": False},  # a library raises, only commands exit
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "reload_dataloaders_every_n_epochs": 1,  # the loader of an epoch knows its epoch: exact resume
                "use_distributed_sampler": False,  # EpochBatchSampler shares images among ranks
                "gradient_clip_val": 0.1,  # of the published recipes
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 10,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The pipeline's sections, and the link from data to detector."""
        add_pipeline_sections(parser, build=False)
        for name in ("num_classes", "num_queries"):
            parser.link_arguments(f"data.{name}", f"model.detector.init_args.{name}", apply_on="instantiate")
        parser.link_arguments("mining.max_unreadable", "data.max_unreadable")
        parser.link_arguments("data.category_names", "model.class_names", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Build trainer, task and data, unless only parsing is asked for; images are as the detector wants them."""
        if not self._parse_only:
            super().instantiate_classes()
            self.datamodule.follow(self.model.image_settings)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:  # noqa: ANN401
        """A Trainer that logs and checkpoints below its root and scores validations, unless told otherwise."""
        config = self.config[str(self.subcommand)] if self.subcommand else self.config
        trainer, every = config["trainer"], config["self_training"]["checkpoint_every_steps"]
        root = Path(trainer.get("default_root_dir") or ".")
        if trainer.get("logger") in (None, True):
            kwargs["logger"] = default_loggers(root)
        if trainer.get("plugins") is None:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        built = self.config_init[str(self.subcommand)] if self.subcommand else self.config_init
        own = built["trainer"].get("callbacks") or []
        callbacks: list[Callback] = [*own] if isinstance(own, list) else [own]
        validated = self.datamodule.val_labels is not None
        if validated:
            callbacks.append(CocoValidation())
        shown = trainer.get("enable_progress_bar") is not False and not trainer.get("barebones")
        if shown and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(TrainingProgress())
        if trainer.get("enable_checkpointing") is not False:
            folder = root / CHECKPOINTS
            callbacks += checkpoint_callbacks(folder, every, validated=validated)
        return super().instantiate_trainer(**kwargs | {"callbacks": callbacks})


def default_loggers(root: Path) -> list[Logger]:
    """CSV and TensorBoard below ``root``/logs; every start gets its own version, so a resume loses no rows."""
    csv = CSVLogger(root, name="logs", flush_logs_every_n_steps=1)  # a killed run keeps its rows
    return [csv, TensorBoardLogger(root, name="logs", version=f"version_{csv.version}")]


def _data_of(stored: Mapping[str, Any], *, sizes: bool) -> dict[str, Any]:
    """Settings of the data that a stored detector brings: how many queries it has learned, and its image ``sizes``."""
    arguments, trained_on = stored.get("init_args") or {}, stored.get("image_settings") or {}
    found: dict[str, Any] = {}
    if "num_queries" in arguments and not arguments.get("two_stage"):  # two-stage detectors choose theirs
        found["num_queries"] = arguments["num_queries"]
    if sizes and {"short_side", "max_side"} <= set(trained_on):
        found |= {"short_sides": sizes_up_to(trained_on["short_side"]), "max_side": trained_on["max_side"]}
    return found


def _write_yaml(path: Path, content: dict[str, Any]) -> str:
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@dataclass(frozen=True)
class Recipe:
    """Config files and options of one run, parsed again for every stage with that stage's inputs.

    Args:
        configs: YAML files, later ones over earlier ones.
        options: ``--section.name=value`` strings, over the files.
    """

    configs: tuple[str, ...]
    options: tuple[str, ...] = ()

    def arguments(self, *options: str) -> list[str]:
        """The command line of this recipe with more options at its end."""
        return [*(f"--config={path}" for path in self.configs), *self.options, *options]

    def starting_from(self, detector: Path, out: Path, *, weights: bool = True, backbone: bool = True) -> Recipe:
        """This recipe with the detector of a file instead of its own, with its weights or only its architecture.

        Without ``weights`` its backbone starts as its arguments and this recipe say, and without ``backbone`` from
        random weights too, all of which learn, at the rate of the rest.

        The detector's class and arguments are written to ``out``/detector.yaml, a config over the others. A file that
        does not tell them, such as UP-DETR's, gives its weights to the recipe's own detector. Its architecture alone
        comes with its image sizes, in ``out``/data.yaml under the other configs, and freezes no random weights.
        The number of queries that a detector has learned is there too.
        """
        checkpoint = read_checkpoint(detector)
        stored = checkpoint.config()
        model: dict[str, Any] = {"init_weights": str(detector)} if weights else {}
        if stored is not None:
            trained, arguments = detector_class(stored["class_path"]).finetuned_as(stored["init_args"])
            arguments.pop("num_classes", None)
            if weights:
                arguments = without_downloads(arguments)
            elif not backbone:
                arguments = trained.thawed(without_downloads(arguments))
            elif arguments == without_downloads(arguments) and not self._gives_weights():
                given, arguments = arguments, trained.thawed(arguments)
                if arguments != given:
                    LOG.info("no weights: the new %s learns its whole backbone, batch norm too", trained.__name__)
            class_path = f"{trained.__module__}.{trained.__qualname__}"
            model |= self._placed({"class_path": class_path, "init_args": arguments})
        else:
            title = checkpoint.format.title
            LOG.info("init: %s (%s) does not tell its detector; that of the config is used", detector, title)
        configs = (*self.configs, _write_yaml(out / "detector.yaml", {"model": model}))
        under = _data_of(stored or {}, sizes=not weights)
        if under:
            configs = (_write_yaml(out / "data.yaml", {"data": under}), *configs)
        recipe = Recipe(configs, self.options)
        return recipe if weights or backbone else recipe._from_nothing()

    def _from_nothing(self) -> Recipe:
        """This recipe without any weights, and with one rate for all: nothing in the backbone is worth a lower one."""
        rate = self.resolved()[0].model.lr
        none = ("--model.backbone_weights=null", "--model.init_weights=null", f"--model.backbone_lr={rate}")
        return replace(self, options=(*self.options, *none))

    def brings_weights(self) -> bool:
        """Whether its detector starts from weights, at least in its backbone."""
        model = self.resolved()[0].model
        given = model.backbone_weights or model.init_weights
        return bool(given) or brings_weights(model.detector.as_dict().get("init_args") or {})

    def _placed(self, detector: dict[str, Any]) -> dict[str, Any]:
        """Where the detector of a file goes in ``model``: in place of the recipe's own, or under the recipe's head."""
        own = self._own_detector()
        if detector["class_path"].startswith("simdetr.heads.") or not own.startswith("simdetr.heads."):
            return {"detector": detector}
        if own.rpartition(".")[2] == "HeadedBackbone":  # takes weights, and has no place for more
            return {}
        return {"detector": {"class_path": own, "init_args": {"detector": detector}}}

    def _gives_weights(self) -> bool:
        """Whether the config files or options name weights to start from."""
        names = ("backbone_weights", "init_weights")
        options = tuple(f"--model.{name}" for name in names)
        return any(option.startswith(options) for option in self.options) or any(
            model.get(name) for model in self._models() for name in names
        )

    def _models(self) -> list[dict[str, Any]]:
        """The section ``model`` of every config file."""
        files = [yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {} for path in self.configs]
        return [content.get("model") or {} for content in files]

    def _own_detector(self) -> str:
        """Class of the detector that the config files name last; empty if none does."""
        found = ""
        for model in self._models():
            found = (model.get("detector") or {}).get("class_path", found)
        return found

    def resolved(self, *options: str) -> tuple[Namespace, str]:
        """The checked configuration and its YAML text; nothing is built."""
        cli = RecipeCLI(self.arguments(*options), run=False, parse_only=True)
        return cli.config, cli.parser.dump(cli.config, skip_link_targets=True)

    def check_detector(self, num_classes: int, num_queries: int | None = None) -> Detector:
        """Build the detector once, for its errors to come before the work of hours that precedes its training.

        Args:
            num_classes: Of the labels that are to come.
            num_queries: Where the detector has any; its own default when left out.

        Raises:
            ValueError: The detector cannot be built from its section, or would start from random weights that are
                frozen; and whatever else its class raises.
        """
        model = self.resolved()[0].model
        module_name, _, class_name = model.detector.class_path.rpartition(".")
        arguments = model.detector.init_args.as_dict() | {"num_classes": num_classes}
        if num_queries is not None and "num_queries" in arguments:
            arguments["num_queries"] = num_queries
        with torch.random.fork_rng(devices=[]):
            detector: Detector = getattr(importlib.import_module(module_name), class_name).from_init_args(arguments)
        DetectionTask(detector, backbone_weights=model.backbone_weights, init_weights=model.init_weights)
        check_start(detector, fixed_parts(detector))
        return detector

    def sections(self, *options: str) -> PipelineSections:
        """The pipeline's sections, built."""
        config, _ = self.resolved(*options)
        parser = ArgumentParser()
        add_pipeline_sections(parser, build=True)
        own = {name: config[name] for name in PipelineSections._fields}
        with constructors_speak():
            built = parser.instantiate_classes(parser.parse_object(own))
        return PipelineSections(
            built.encoder,
            MiningConfig(**vars(built.mining)),
            ClusteringConfig(**vars(built.clustering)),
            SelfTrainingConfig(**vars(built.self_training)),
            Throughput(**vars(built.inference)),
        )

    def training(self, out: Path, *options: str) -> RecipeCLI:
        """Trainer, task and data of one training that writes below ``out`` and can be resumed."""
        arguments = self.arguments(f"--trainer.default_root_dir={out}", *options)
        return RecipeCLI(arguments, run=False)


def contents_of(config: Namespace) -> dict[str, str]:
    """Hashes of what the label files and unlabelled images of a recipe hold, by the settings that name them."""
    data = config.data
    found = {"data.labels": content_hash(Path(data.labels or data.images), IMAGE_SUFFIXES)}
    if data.val_images is not None:
        found["data.val_labels"] = content_hash(Path(data.val_labels or data.val_images), IMAGE_SUFFIXES)
    if data.unlabelled is not None:
        found["data.unlabelled"] = open_images(data.unlabelled).fingerprint()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What a class that a config names says when it is built, without the config parser's own words around it.


@contextmanager
def constructors_speak() -> Iterator[None]:
    """Let an error of a class that a config names through as it was raised.

    The parser tries every type that an option may have, and wraps what the class said in what it thinks of the others.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__
        while cause is not None and not _raised_by_constructor(cause):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from cause.__cause__


def _raised_by_constructor(error: BaseException) -> bool:
    """Whether the way from the parser to this error leads through the constructor of another package's class."""
    called = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame, _ in walk_tb(error.__traceback__)]
    return any(
        function in ("__init__", "__post_init__") and not module.startswith("jsonargparse")
        for module, function in called
    )


# ----------------------------------------------------------------------------------------------------------------------
# One word for an encoder in (``--encoder``), the config's options that mean it out.
#
# A folder of ``simdetr encoder fit``, a timm model with its own weights, or a word for weights that a package carries;
# anything else is for the config's section ``encoder``.


# ----------------------------------------------------------------------------------------------------------------------
# A recipe in, the same recipe with the largest batch that fits the device out; kept with the run.
#
# The search is in ``training/auto_batch.py``; this module ties it to recipes and run folders for ``--auto-batch``.


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


# ----------------------------------------------------------------------------------------------------------------------
# What a recipe means for this machine: how long its run takes, and one mining as plain values that processes are told.


def say_time(
    recipe: Recipe,
    sections: PipelineSections,
    source: ImageSource,
    run: RunFolder,
    device: str,
    num_ranks: int = 1,
    *,
    mined: bool = False,
) -> None:
    """Log what is left of a run and how long it takes; nothing where all stages are trained or no image can be read.

    ``mined`` says that nothing will be mined, because the proposals are given.
    """
    stages = sum(not run.has_detector(stage) for stage in range(1, sections.self_training.stages + 1))
    if not leads() or stages == 0:
        return
    config, _ = recipe.resolved()
    found = measure(
        source,
        sections.encoder,
        sections.mining,
        recipe.check_detector(sections.clustering.num_classes, config.data.num_queries or QUERIES),
        config,
        device,
        objects=sections.self_training.max_boxes,
        stages=stages,
        mined=mined or run.labels(0).is_file(),
        num_ranks=num_ranks,
    )
    if found is not None:
        LOG.info("%s; the same command goes on where it was stopped", found)


@dataclass(frozen=True)
class MiningJob:
    """What to mine and how, as plain values that another process can be told.

    Attributes:
        images: what ``open_images`` takes.
        out: folder or URL of the store.
        config: YAML files, later ones over earlier ones; without any the defaults.
        options: ``--section.name=value`` strings, over the files.
        device: Torch device; the GPU if there is one, each process its own.
    """

    images: str
    out: str
    config: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    device: str | None = None

    def sections(self) -> PipelineSections:
        """The settings, checked and built."""
        options = self.options if self.config else (_DETECTOR, *self.options)
        return Recipe(self.config, (f"--data.images={self.images}", *options)).sections()

    @property
    def own_device(self) -> str:
        """The device of this process: of several GPUs the one of its local rank."""
        anyone = self.device is None or (self.device == "cuda" and torch.cuda.is_available())
        return default_device() if anyone else str(self.device)

    @staticmethod
    def build(order: dict[str, Any]) -> Job:
        """The job of a process that was told the values of this class."""
        return MiningJob(**order | {name: tuple(order[name]) for name in ("config", "options")})._job()

    def _job(self, sections: PipelineSections | None = None) -> Job:
        built = sections or self.sections()
        return Job(open_images(self.images), built.encoder, built.mining, self.out, self.own_device)

    def run(self, num_ranks: int = 1, sections: PipelineSections | None = None, *, progress: bool) -> ProposalStore:
        """Mine in this process, together with others that mine into the same store, or in ``num_ranks`` new ones.

        Args:
            num_ranks: Processes.
            sections: The settings, where they are built already.
            progress: Show a bar.

        Raises:
            ValueError: ``num_ranks`` where these are several processes already.
            StoreError: A process died and the others could not do all of its work; the same call goes on.
        """
        job = self._job(sections)
        if num_ranks != 1:
            return mine_in_processes(job, _MINE, asdict(self), num_ranks, progress=progress)
        return mine(job.source, job.encoder, job.config, job.out, job.device, progress=progress)


# ----------------------------------------------------------------------------------------------------------------------
# One comparison of arms as plain values that processes are told: its trainings in, the recipe of each out.


ROW, PREDICTIONS = "row.json", "predictions.parquet"
"""What a training of a comparison leaves in its folder beside its detector."""


@dataclass(frozen=True)
class ArmTraining:
    """One fine-tuning of a comparison: an arm, so many labels, a seed."""

    arm: Arm
    budget: LabelBudget
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.arm.name}, {self.budget.title} of the labels, seed {self.seed}".replace("shot of", "shots of")


@dataclass(frozen=True)
class ComparisonJob:
    """What to compare and how, as plain values that another process can be told.

    Attributes:
        images: Training images.
        labels: Labels that budgets are drawn from.
        val_images: Images to evaluate on.
        val_labels: Their boxes.
        init: Run folder or detector of the pretraining.
        out: Folder of the comparison.
        config: YAML files of the fine-tuning.
        arms: Names of the arms, maybe each with a place.
        fractions: Parts of the labelled images.
        shots: Boxes per class.
        seeds: Of labels, order, augmentation and new weights.
        options: ``--section.name=value`` strings, over the files.
    """

    images: str
    labels: str
    val_images: str
    val_labels: str
    init: str
    out: str
    config: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    shots: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    options: tuple[str, ...] = ()

    @staticmethod
    def build(order: dict[str, Any]) -> ComparisonJob:
        """The job that was told."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in order.items()}
        return ComparisonJob(**values)

    @cached_property
    def detector(self) -> Path:
        """The pretraining's detector, whose architecture every arm has but those that bring their own."""
        return detector_folder(self.init)

    @cached_property
    def with_weights(self) -> bool:
        """Whether the pretraining's backbone started from weights."""
        return self._common().starting_from(self.detector, Path(self.out), weights=False).brings_weights()

    @cached_property
    def own_arms(self) -> tuple[Arm, ...]:
        """The arms, checked."""
        words = self.arms or default_arms(Path(self.init), with_weights=self.with_weights)
        return read_arms(words, Path(self.init), Path(self.out), with_weights=self.with_weights)

    @property
    def budgets(self) -> tuple[LabelBudget, ...]:
        """How many labels."""
        return read_budgets(self.fractions, self.shots)

    def trainings(self) -> list[ArmTraining]:
        """All fine-tunings, seed by seed, so that pairs are complete early; the fewest labels first."""
        return [
            ArmTraining(arm, budget, seed, Path(self.out) / f"{budget.name}-seed{seed}-{arm.name}")
            for seed in self.seeds
            for budget in self.budgets
            for arm in self.own_arms
        ]

    @property
    def devices(self) -> object:
        """Of one fine-tuning, as its recipe says."""
        return self._common().starting_from(self.detector, Path(self.out), weights=False).resolved()[0].trainer.devices

    def labels_of(self, training: ArmTraining) -> Path:
        """The label file of a training."""
        return training.budget.file(Path(self.labels), Path(self.out) / "labels", training.seed)

    def label_counts(self, training: ArmTraining) -> dict[str, int | None]:
        """``images`` and ``labels`` (boxes) that a training learns from; None where labels are of whole images."""
        path = self.labels_of(training)
        if not is_known(path):
            return {"images": None, "labels": None}
        labels = read_with_report(path, images=open_images(self.images))[0]
        drawn = training.budget.drawn(labels, training.seed)
        return {"images": len(drawn), "labels": int((~drawn.crowd).sum())}

    def _common(self, labels: Path | None = None, fraction: float = 1.0) -> Recipe:
        """The fine-tuning's recipe before any arm, on the pretraining's backbone weights where its run names some."""
        data = (f"--data.images={self.images}", f"--data.labels={labels or self.labels}")
        chosen = for_finetuning(self.config, self.images, labels or self.labels, self.detector, self.options, fraction)
        weights = (run_settings(Path(self.init)).get("model") or {}).get("backbone_weights")
        given = () if weights is None else (f"--model.backbone_weights={weights}",)
        return Recipe(chosen.configs, (*data, *given, *chosen.options, *self.options))

    def recipe(self, training: ArmTraining, start: Path | None) -> Recipe:
        """The recipe of a training: for all arms of a budget the same but for what they start from.

        Args:
            training: Which.
            start: The detector that its arm starts from, None for those that start from none.
        """
        budget, out = training.budget, training.folder
        common = self._common(self.labels_of(training), budget.amount if budget.kind == "fraction" else 1.0)
        seeded = tuple(f"--{name}={training.seed}" for name in SEEDS)
        recipe = replace(common, options=(*common.options, *budget.options(), *seeded))
        if start is None:
            return recipe.starting_from(self.detector, out, weights=False, backbone=training.arm.name == BACKBONE)
        if read_checkpoint(start).config() is not None:
            return recipe.starting_from(start, out)
        recipe = recipe.starting_from(self.detector, out, weights=False)
        return replace(recipe, options=(*recipe.options, f"--model.init_weights={start}"))

    def claim(self, *, begun: bool) -> None:
        """Keep what the rows depend on beside them, or a RunMismatchError: theirs would be mixed with others.

        Arms, budgets and seeds may be added to a comparison that has begun.
        """
        folder, own = RunFolder(Path(self.out)), self._common()
        settings, text = own.starting_from(self.detector, folder.path, weights=False).resolved()
        inputs = {"init": self.init, "val_images": self.val_images, "val_labels": self.val_labels}
        folder.claim(text + yaml.safe_dump({"compare": inputs}))
        contents = contents_of(settings) | {"val_labels": content_hash(Path(self.val_labels), IMAGE_SUFFIXES)}
        folder.claim_contents(contents, begun=begun)


def variant_configs(init: Path, detector: Path, variant: Variant, out: Path) -> tuple[str, ...]:
    """Config files of a pretraining like a run's but for one thing; its options come beside them.

    Args:
        init: The run folder.
        detector: Its detector.
        variant: What differs.
        out: Where a file of its own is written, if it needs one.
    """
    own = str(RunFolder(init).config)
    if variant.random:
        recipe = Recipe((own,)).starting_from(detector, out, weights=False, backbone=False)
        names = ("backbone_weights", "init_weights", "backbone_lr")
        model = recipe.resolved()[0].model
        return (*recipe.configs, _write_yaml(out / "random.yaml", {"model": {name: model[name] for name in names}}))
    if variant.detector is None:
        return (own,)
    arguments = detreg_arguments(run_settings(init))
    described = {"model": {"detector": {"class_path": variant.detector, "init_args": arguments}}}
    return own, _write_yaml(out / "variant.yaml", described)
