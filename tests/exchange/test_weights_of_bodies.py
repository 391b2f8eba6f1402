"""``backbone_weights``: encoder checkpoints reach the feature network of every detector."""

from __future__ import annotations

import pytest
import timm
import torch

from simdetr.data.pretrained_weights import PretrainedWeightsError
from simdetr.detectors import DeformableDETR, TorchvisionDetector, TransformersDetector, ViDT
from simdetr.training.detection_task import DetectionTask

SMALL = {"hidden_dim": 32, "num_heads": 2, "num_decoder_layers": 2, "ffn_dim": 32, "num_queries": 9}
HF = {
    "model_type": "deformable_detr",
    "backbone": "resnet18",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 9,
}
DETECTORS = {
    "DeformableDETR": lambda: DeformableDETR(3, backbone="resnet18", num_encoder_layers=1, **SMALL),
    "torchvision": lambda: TorchvisionDetector(3, "retinanet_resnet50_fpn", backbone="resnet18"),
    "transformers": lambda: TransformersDetector(3, HF),
}


@pytest.fixture(scope="module")
def swav(tmp_path_factory):
    """A ResNet-18 as SwAV stores it, and its tensors."""
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    path = tmp_path_factory.mktemp("swav") / "swav.pth.tar"
    heads = {"module.prototypes.weight": torch.zeros(3, 2)}
    torch.save({f"module.{name}": value for name, value in state.items()} | heads, path)
    return path, state


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_resnet_reaches_every_detector(kind, swav):
    path, state = swav
    detector = DETECTORS[kind]()
    DetectionTask(detector, backbone_weights=str(path))
    body = detector.get_submodule(detector.body_name).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in body.items() if "num_batches" not in name)
    assert len(body) > 90


def test_a_swin_of_moby_reaches_the_body_of_vidt(tmp_path):
    source = ViDT(3, backbone="swin_pico", **SMALL).backbone.body.state_dict()
    encoder = {}
    for name, value in source.items():  # the original Swin ends a stage with its merging
        stage, _, rest = name.removeprefix("layers.").partition(".")
        encoder[f"encoder.layers.{int(stage) - 1}.{rest}" if rest.startswith("downsample") else f"encoder.{name}"] = (
            value
        )
    extra = {
        "encoder.norm.weight": torch.zeros(256),
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(2),
        "queue": torch.zeros(2),
    }
    torch.save({"model": encoder | {f"{name}_k": torch.zeros(1) for name in encoder} | extra}, tmp_path / "moby.pth")
    detector = ViDT(3, backbone="swin_pico", **SMALL)
    DetectionTask(detector, backbone_weights=str(tmp_path / "moby.pth"))
    body = detector.backbone.body.state_dict()
    assert body.keys() == source.keys() and all(torch.equal(body[name], source[name]) for name in body)


def test_a_backbone_of_another_kind_is_refused(swav):
    with pytest.raises(PretrainedWeightsError, match="is it for another architecture"):
        DetectionTask(ViDT(3, backbone="swin_pico", **SMALL), backbone_weights=str(swav[0]))
