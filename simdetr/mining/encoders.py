"""Images [B, 3, H, W] in 0..1 -> feature maps at strides 16 and 32, by any timm backbone (US 2025/0265826 [0053]).

The two top-most maps of a frozen encoder: stride 32 means more, stride 16 shows more. The encoder that needs no weights
is in :mod:`simdetr.mining.colour_texture`.

Letters: B images, H, W their size in pixels, C channels, h, w a map's size.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from simdetr.data.pretrained_weights import PACKAGED, load_backbone_weights, load_into, normalisation, timm_name

STRIDES = (16, 32)
WEIGHTS_NAME, RECORD_NAME = "encoder.safetensors", "encoder.json"
# Tried in this order; families that do not know an option refuse it. A Swin must take any size and keep its windows and
# shifts at every stage; a ViT must take any size.
_FAMILY_OPTIONS: tuple[dict[str, Any], ...] = (
    {"feature_cls": "getter", "dynamic_img_size": True, "always_partition": True},
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {},
)
_log = logging.getLogger(__name__)


@runtime_checkable
class Encoder(Protocol):
    """What mining needs of an encoder.

    Attributes:
        strides: of the maps, in pixels, fine to coarse.
        region_dim: channels of the coarsest map, which region features are pooled from.
        fingerprint: changes whenever the maps of an image would.
    """

    strides: tuple[int, ...]
    region_dim: int
    fingerprint: str

    def __call__(self, images: Tensor) -> dict[int, Tensor]:
        """Map images [B, 3, H, W], RGB in 0..1, to ``{stride: [B, C, ceil(H / stride), ceil(W / stride)]}``."""
        ...


class TimmEncoder(nn.Module):
    """A frozen timm backbone: CNN or Swin (its own two levels), or ViT (one map, average-pooled to the second level).

    Args:
        model: timm's name, with or without a tag, for example ``resnet50`` or ``vit_small_patch16_224.dino``; or a word
            for weights that a package carries, ``augnet-resnet50`` or ``efficientnet-lite0``.
        weights: a local file or URL, read by :func:`simdetr.data.pretrained_weights.load_backbone_weights`.
        pretrained: fetch timm's own weights for the name, or read the package's; not together with ``weights``.
        random_weights: build it untrained, where there are neither; a control, which finds little.
        seed: of the random weights.
        mean: of the colours 0..1 that the weights were learnt with; timm's for the model when left out.
        std: their deviation, likewise.

    Raises:
        ValueError: for both kinds of weights, or none and no ``random_weights``; or for a backbone without maps at
            strides 16 and 32.
        PretrainedWeightsError: when the weights are unreadable or for another architecture.
    """

    def __init__(
        self,
        model: str = "resnet50",
        weights: str | Path | None = None,
        pretrained: bool = False,
        random_weights: bool = False,
        seed: int = 0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        if weights is not None and pretrained:
            raise ValueError("weights, pretrained: expected one of them, got both; drop pretrained to use your file")
        if weights is None and not pretrained and not random_weights:
            raise ValueError(
                f"weights: {model} would look at images with random weights; give weights (a file or URL) or "
                "pretrained=True, or random_weights=True if an untrained network is what you want"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            packaged = PACKAGED.get(model) if pretrained else None
            self.net, reductions, channels = _build(timm_name(model), pretrained and packaged is None)
        if packaged is not None:
            load_into(self.net, packaged.load())
        if weights is not None:
            report = load_into(self.net, load_backbone_weights(weights))
            _log.info("weights of %s into %s: %s", weights, model, report.summary())
        self.single_map = len(set(reductions)) == 1
        if not self.single_map and not set(STRIDES) <= set(reductions):
            raise ValueError(
                f"model: expected maps at strides {STRIDES}, {model} has {reductions}; take another backbone"
            )
        self._levels = [-1 if self.single_map else reductions.index(stride) for stride in STRIDES]
        self.strides: tuple[int, ...] = STRIDES
        self.channels = {stride: channels[level] for stride, level in zip(STRIDES, self._levels, strict=True)}
        self.region_dim: int = self.channels[STRIDES[-1]]
        own_mean, own_std = normalisation(model)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean or own_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std or own_std).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()
        self.fingerprint: str = f"timm:{timm_name(model)}:{digest_of(self)}"

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked: a frozen encoder keeps its statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Feature maps of a batch as :class:`Encoder` has them; sides no multiple of 32 are continued by their edge."""
        if not images.is_cpu:
            return self.maps(images)
        # a processor takes half the time or less for one image, whose activations stay in its cache
        each = [self.maps(image[None].contiguous(memory_format=torch.channels_last)) for image in images]
        return {stride: torch.cat([maps[stride] for maps in each]) for stride in self.strides}

    def maps(self, images: Tensor) -> dict[int, Tensor]:
        """As ``forward``, with gradients: for those who train it."""
        height, width = images.shape[-2:]
        normalised = (images - self.mean) / self.std
        padded = functional.pad(normalised, (0, -width % 32, 0, -height % 32), mode="replicate")
        if self.single_map:
            fine = self.net.forward_intermediates(padded, indices=1, norm=True, intermediates_only=True)[-1]
            maps = {
                stride: resample(fine, padded.shape[-2] // stride, padded.shape[-1] // stride) for stride in STRIDES
            }
        else:
            levels = self.net(padded)
            maps = {stride: levels[level] for stride, level in zip(STRIDES, self._levels, strict=True)}
        return {stride: level[..., : -(-height // stride), : -(-width // stride)] for stride, level in maps.items()}


def _build(model: str, pretrained: bool) -> tuple[Any, list[int], list[int]]:
    """The network, and reduction and channels of each of its maps; a ViT comes whole, for its final norm."""
    net: Any
    for options in _FAMILY_OPTIONS:
        try:
            net = timm.create_model(model, features_only=True, pretrained=pretrained, **options)
            break
        except TypeError:  # this family has no such option
            if not options:
                raise
    reductions, channels = list(net.feature_info.reduction()), list(net.feature_info.channels())
    if len(set(reductions)) == 1:
        net = timm.create_model(model, num_classes=0, pretrained=pretrained, **options)
    return net, reductions, channels


def resample(level: Tensor, height: int, width: int) -> Tensor:
    """A map [B, C, h, w] averaged (or, where it is coarser, interpolated) to height x width cells."""
    if level.shape[-2] >= height and level.shape[-1] >= width:
        return functional.adaptive_avg_pool2d(level, (height, width))
    return functional.interpolate(level, (height, width), mode="bilinear", align_corners=False)


def digest_of(module: nn.Module) -> str:
    """Hash of all names and values, so that equal weights are equal wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class FittedEncoder(TimmEncoder):
    """A frozen backbone that was trained on the user's own images.

    Args:
        folder: what ``simdetr encoder fit`` wrote: ``encoder.safetensors``, the backbone under timm's names, and
            ``encoder.json``, how it was trained.

    Raises:
        FileNotFoundError: when the folder holds no finished training.
        ValueError: when its record is damaged.
        PretrainedWeightsError: when its weights are.
    """

    def __init__(self, folder: str | Path) -> None:
        record = read_record(folder)
        mean, std = tuple(record["mean"]), tuple(record["std"])
        super().__init__(record["model"], weights=Path(folder) / WEIGHTS_NAME, mean=mean, std=std)
        self.record: dict[str, Any] = record


def is_fitted(folder: str | Path) -> bool:
    """Whether a training ended well in this folder: the record is written last."""
    return (Path(folder) / WEIGHTS_NAME).is_file() and (Path(folder) / RECORD_NAME).is_file()


def read_record(folder: str | Path) -> dict[str, Any]:
    """The training record of a folder: model, normalisation, objective, steps, versions, probe results.

    Errors as of :class:`FittedEncoder`.
    """
    if not is_fitted(folder):
        raise FileNotFoundError(
            f"folder: expected {WEIGHTS_NAME} and {RECORD_NAME} in {folder}, which a finished `simdetr encoder fit` "
            "writes; run the same command again to finish it, or give TimmEncoder your own weights"
        )
    path = Path(folder) / RECORD_NAME
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = record["model"], record["mean"], record["std"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} is no record of `simdetr encoder fit` ({error}); fit it again") from error
    return record
