"""Small scenes, labels, settings and detectors that several folders of tests share."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
import yaml

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.data.scenes import render_scenes
from simdetr.detectors import DeformableDETR

TINY_DETECTOR = {
    "backbone": "test_resnet",
    "hidden_dim": 16,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "ffn_dim": 16,
    "num_queries": 8,
    "num_feature_levels": 1,
    "num_points": 2,
    "dropout": 0.1,
    "frozen_batch_norm": False,
    "freeze_stem": False,
}
"""A detector that takes a training step in a fraction of a second."""

TINY_CONFIG = {
    "mining": {"image_size": 64},
    "clustering": {"num_classes": 3},
    "self_training": {"stages": 1, "max_boxes": 5},
    "model": {
        "detector": {
            "class_path": "simdetr.detectors.DeformableDETR",
            "init_args": {k: v for k, v in TINY_DETECTOR.items() if k != "num_queries"},
        },
        "lr": 1e-3,
        "backbone_lr": 1e-3,
    },
    "data": {
        "batch_size": 2,
        "short_sides": [48, 64],
        "max_side": 80,
        "crop": False,
        "colour": "light",
        "mosaic": 0.3,
        "num_queries": 8,
    },
    "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
}

_TRANSFORMERS, _TORCHVISION = "simdetr.detectors.TransformersDetector", "simdetr.detectors.TorchvisionDetector"
_DETR = {
    "backbone": "test_resnet",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 10,
    "auxiliary_loss": True,
    "dropout": 0.0,
}
_RT_DETR = {
    "backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [2, 3, 4]},
    "freeze_backbone_batch_norms": False,
    "encoder_in_channels": [48, 192, 96],
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_n_points": 2,
    "num_queries": 10,
    "num_denoising": 6,
}
_GROUPS = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_n_points": 2,
    "c2f_num_blocks": 1,
    "num_queries": 10,
    "group_detr": 3,
    "dropout": 0.0,
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 64,
    "patch_size": 8,
    "out_indices": [1, 3],
}
_LW_DETR = {
    "projector_scale_factors": [1.0],
    "backbone_config": {
        "model_type": "lw_detr_vit",
        "pretrain_image_size": 64,
        "num_windows": 4,
        "window_block_indices": [0, 2],
        **_VIT,
    },
    **_GROUPS,
}
_RF_DETR = {"backbone_config": {"model_type": "rf_detr_dinov2", "num_windows": 2, **_VIT}, **_GROUPS}
_RESNET18 = {"backbone": "resnet18", "trainable_layers": 5, "frozen_batch_norm": False}
_FEW_REGIONS = {
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 12,
}
OTHERS = {
    "deformable_detr": (_TRANSFORMERS, {"config": {"model_type": "deformable_detr", **_DETR}}),
    "conditional_detr": (_TRANSFORMERS, {"config": {"model_type": "conditional_detr", **_DETR}}),
    "detr": (_TRANSFORMERS, {"config": {"model_type": "detr", **_DETR}}),
    "rt_detr_v2": (_TRANSFORMERS, {"config": {"model_type": "rt_detr_v2", **_RT_DETR}}),
    "d_fine": (_TRANSFORMERS, {"config": {"model_type": "d_fine", **_RT_DETR}}),
    "lw_detr": (_TRANSFORMERS, {"config": {"model_type": "lw_detr", **_LW_DETR}}),
    "rf_detr": (_TRANSFORMERS, {"config": {"model_type": "rf_detr", **_RF_DETR}}),
    "faster_rcnn": (
        _TORCHVISION,
        {"architecture": "fasterrcnn_resnet50_fpn", "options": _FEW_REGIONS, **_RESNET18},
    ),
    "fcos": (
        _TORCHVISION,
        {"architecture": "fcos_resnet50_fpn", "options": {"detections_per_img": 12}, **_RESNET18},
    ),
    "retinanet": (
        _TORCHVISION,
        {"architecture": "retinanet_resnet50_fpn", "options": {"detections_per_img": 12}, **_RESNET18},
    ),
}
"""The smallest detectors of other libraries: class path and arguments without ``num_classes``."""


FORKED = "forkserver"
multiprocessing.set_forkserver_preload(["simdetr.labelling.autolabel"])
"""Processes come from a server that has imported nearly everything once, instead of taking seconds of imports each."""


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[..., None]:
    """Calls a function with rank and arguments in two processes; raises as ``torch.multiprocessing`` does."""

    def run(function: Callable[..., None], *arguments: object) -> None:
        mp.start_processes(function, arguments, nprocs=2, start_method=FORKED)

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of 64 × 80 px with ``instances.json``; nothing may be written here."""
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder, 12, (64, 80), seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML of the whole recipe at the smallest size."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY_CONFIG), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tiny_config, scenes):
    """A recipe on the twelve scenes; later options win."""
    from simdetr.recipe import Recipe

    def make(*options, images=scenes):
        data = (f"--data.images={images}", f"--data.labels={images / 'instances.json'}")
        return Recipe((str(tiny_config),), (*data, *options))

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("SIMDETR_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist (set SIMDETR_DATA)")
    return folder


@pytest.fixture
def learned_backbone(tmp_path: Path) -> str:
    """Backbone weights of ``TINY_DETECTOR`` whose batch norm has seen images, as that of any learned weights has."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value += 0.1
    torch.save(state, tmp_path / "learned.pth")
    return str(tmp_path / "learned.pth")


@pytest.fixture
def own_scenes(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the first six scenes and their labels that a test may damage."""
    folder = tmp_path / "own"
    content = json.loads((scenes / "instances.json").read_text())
    content["images"] = content["images"][:6]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    (folder / "images").mkdir(parents=True)
    for image in content["images"]:
        (folder / image["file_name"]).write_bytes((scenes / image["file_name"]).read_bytes())
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


DIE = """
import os, signal
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="session")
def run_until_killed() -> Callable[..., None]:
    """Runs a script in a process of its own, with words as its arguments, until it calls ``die``, which is kill -9."""

    def run(script: str, *words: object) -> None:
        process = multiprocessing.get_context(FORKED).Process(target=_run_script, args=(DIE + script, *map(str, words)))
        process.start()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL

    return run


def _run_script(script: str, *words: str) -> None:
    sys.argv = ["-c", *words]
    torch.set_num_threads(1)
    exec(script, {"__name__": "__main__"})


@pytest.fixture(scope="session")
def begin() -> Callable[..., list[BaseProcess]]:
    """Starts ``simdetr`` with some words in one process or several ``ranks``, which have imported everything already.

    What rank R prints goes into the file ``said`` with the ending ``-R.out``, its errors into that with ``-R.err``.
    """

    def start(words: Sequence[object], said: Path, ranks: int = 1) -> list[BaseProcess]:
        processes = []
        for rank, place in enumerate(_places(ranks) if ranks > 1 else [{}]):
            arguments = ([str(word) for word in words], f"{said}-{rank}", place)
            processes.append(multiprocessing.get_context(FORKED).Process(target=_run_command, args=arguments))
            processes[-1].start()
        return processes

    return start


def _places(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells the ranks on a machine in their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    same = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    same |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _run_command(words: list[str], said: str, environment: dict[str, str]) -> None:
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    from simdetr.commands.main import main

    for number, ending in ((1, ".out"), (2, ".err")):
        with Path(said + ending).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ |= {"OMP_NUM_THREADS": "1"} | environment
    if "RANK" in environment:  # the import that took it from the environment was that of the server
        rank_zero_only.rank = int(environment["RANK"])
    torch.set_num_threads(1)
    sys.argv = ["simdetr", *words]
    main()


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """Waits until a condition holds, five minutes at most; tells what processes said that ended before."""

    def wait(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 300
        while not condition() and all(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert condition(), [process.stderr.read() for process in processes if process.poll() is not None]

    return wait


@pytest.fixture
def resume_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Copies of a training's folder, as a kill right after each save would leave it."""
    from simdetr.training.train import ResumePoint

    copies: list[Path] = []
    save = ResumePoint._save_if_time

    def save_and_copy(self: ResumePoint, trainer: object) -> None:
        before = self._last_step
        save(self, trainer)
        if self._last_step != before:
            copies.append(tmp_path / f"copy{len(copies)}")
            shutil.copytree(self.path.parent.parent, copies[-1])

    monkeypatch.setattr(ResumePoint, "_save_if_time", save_and_copy)
    return copies


@pytest.fixture(scope="session")
def make_detector():
    """Build the smallest detector, with changes."""
    from simdetr.detectors import DeformableDETR

    return lambda num_classes=3, **changes: DeformableDETR(num_classes, **{**TINY_DETECTOR, **changes})


@pytest.fixture(scope="session")
def config_of_other():
    """The class path and arguments of a small detector of another library, by its name in ``OTHERS``."""

    def config(name, num_classes=3, **changes):
        if name not in ("faster_rcnn", "fcos", "retinanet"):
            pytest.importorskip("transformers", reason="an optional dependency")
        class_path, arguments = OTHERS[name]
        return {"class_path": class_path, "init_args": {"num_classes": num_classes, **arguments, **changes}}

    return config


@pytest.fixture(scope="session")
def make_other(config_of_other):
    """Build a small detector of another library with a fixed seed."""
    from simdetr.exchange.weights import build_detector

    def make(name, num_classes=3, seed=0, **changes):
        config = config_of_other(name, num_classes, **changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_detector(config)

    return make


Box = tuple[float, ...]  # x0, y0, x1, y1, class index and, if given, score


@pytest.fixture
def make_labels() -> Callable[..., Labels]:
    """Labels from {image id: [(x0, y0, x1, y1, class, score)]} on images of 640 by 640 pixels."""

    def make(
        images: Mapping[str, Sequence[Box]],
        category_ids: Sequence[int | str] = (1,),
        crowd: Sequence[bool] | None = None,
        stage: int = -1,
    ) -> Labels:
        rows, start = [], 0
        for image_id, boxes in images.items():
            table = np.asarray([(*box, 1.0)[:6] for box in boxes], np.float64).reshape(-1, 6)
            flags = None if crowd is None else crowd[start : start + len(table)]
            start += len(table)
            rows.append(ImageLabels.build(image_id, (640, 640), table[:, :4], table[:, 4], table[:, 5], flags))
        return Labels.from_images(rows, [Category(id_, f"kind {id_}") for id_ in category_ids], stage)

    return make


@pytest.fixture
def make_points() -> Callable[..., Labels]:
    """Labels with points from {image id: [(x, y, class, score)]}; their boxes have no area unless given for all."""

    def make(
        images: Mapping[str, Sequence[tuple[float, ...]]],
        classes: int = 1,
        boxes: Sequence[tuple[float, ...]] | None = None,
        crowd: Sequence[bool] | None = None,
        size_hw: tuple[int, int] = (640, 640),
    ) -> Labels:
        rows, start = [], 0
        for image_id, points in images.items():
            table = np.asarray([(*point, 1.0)[:4] for point in points], np.float64).reshape(-1, 4)
            own = slice(start, start + len(table))
            start += len(table)
            corners = np.nan_to_num(np.tile(table[:, :2], 2)) if boxes is None else boxes[own]
            flags = None if crowd is None else crowd[own]
            row = ImageLabels.build(
                image_id, size_hw, corners, table[:, 2], table[:, 3], flags, points=table[:, :2].astype(np.float32)
            )
            rows.append(row)
        return Labels.from_images(rows, [Category(index + 1, f"kind {index}") for index in range(classes)])

    return make


@pytest.fixture
def random_points(make_points: Callable[..., Labels]) -> Callable[[int], tuple[Labels, Labels]]:
    """Truth and predictions of three classes on eight images by a seed: some near, some wrong, missing or invented."""

    def make(seed: int) -> tuple[Labels, Labels]:
        rng = np.random.default_rng(seed)
        truth: dict[str, list[tuple[float, ...]]] = {}
        found: dict[str, list[tuple[float, ...]]] = {}
        for index in range(8):
            points = [(*rng.uniform(0, 640, 2), int(rng.integers(3))) for _ in range(index)]  # the first has none
            truth[str(index)] = points
            found[str(index)] = [
                (x + rng.normal(0, 12), y + rng.normal(0, 12), label if rng.random() < 0.8 else 0, rng.random())
                for x, y, label in points
                for _ in range(rng.integers(0, 4))
            ]
            found[str(index)] += [(*rng.uniform(0, 640, 2), int(rng.integers(3)), rng.random()) for _ in range(3)]
        return make_points(truth, 3), make_points(found, 3)

    return make


VARIANTS = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
    "single_scale": {"num_feature_levels": 1},
    "dc5": {"num_feature_levels": 1, "dilation": True, "backbone": "resnet50"},
    "learned positions": {"position_encoding": "learned"},
    "three levels": {"num_feature_levels": 3, "num_encoder_layers": 1},
}
"""Of Deformable DETR, those that the original published and some more."""


@pytest.fixture
def make_deformable():
    """Build a small detector in evaluation mode with a fixed seed."""

    def make(variant="base", seed=0, **changes):
        small = {
            "num_classes": 7,
            "backbone": "resnet18",
            "hidden_dim": 64,
            "num_heads": 4,
            "num_encoder_layers": 2,
            "num_decoder_layers": 3,
            "ffn_dim": 128,
            "num_queries": 20,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return DeformableDETR(**(small | VARIANTS[variant] | changes)).eval()

    return make


@pytest.fixture
def shake():
    """Give every parameter and batch-norm buffer of a module random values that matter."""

    def randomise(module, seed=1):
        generator = torch.Generator().manual_seed(seed)

        def noise(tensor):
            return torch.randn(tensor.shape, generator=generator)

        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "sampling_offsets.bias" in name:
                    parameter.copy_(2.0 * noise(parameter))
                elif parameter.dim() > 1:
                    parameter.copy_(noise(parameter) / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(0.1 * noise(parameter))
            for name, buffer in module.named_buffers():
                if name.endswith(("running_mean", "bias")):
                    buffer.copy_(0.1 * noise(buffer))
                elif name.endswith(("running_var", "weight")):
                    buffer.copy_(1.0 + 0.2 * noise(buffer).abs())
        return module

    return randomise


@pytest.fixture
def batch():
    """Two images, the second padded at the bottom and right: images, mask, targets."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 120, 136, generator=generator)
    mask = torch.zeros(2, 120, 136, dtype=torch.bool)
    mask[1, 90:] = True
    mask[1, :, 100:] = True
    images = images.masked_fill(mask[:, None], 0.0)
    targets = [
        {"labels": torch.tensor([1, 4, 4]), "boxes": torch.rand(3, 4, generator=generator) * 0.4 + 0.2},
        {"labels": torch.tensor([6]), "boxes": torch.rand(1, 4, generator=generator) * 0.4 + 0.2},
    ]
    return images, mask, targets
