"""Small scenes, settings and detectors that several folders of tests train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

from simdetr.data.scenes import render_scenes

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
