"""What a backbone is trained for without labels: crops of the same images in, one loss out.

All have one signature, ``objective(encoder, views) -> loss``, and bring their own crops, heads and, where they have
one, teacher. Losses, heads and colour transforms are LightlySSL's (extra ``ssl``). VICReg (Bardes et al. 2022), DINO
(Caron et al. 2021) and VICRegL (Bardes et al. 2022), the dense one: it also compares the cells of the maps, by place
and by likeness.

Letters: B images, H, W a map's size, C channels, V views.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import timm
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from simdetr.data.class_paths import current
from simdetr.data.pretrained_weights import load_into
from simdetr.encoder_training.crops import Crops, CropWithPlaces
from simdetr.mining.encoders import TimmEncoder

LAST_STRIDE = 32


class MissingExtraError(RuntimeError):
    """A package that only some functions need is not installed."""


def require_lightly() -> None:
    """Raise a MissingExtraError that says how to install LightlySSL where it is missing."""
    try:
        importlib.import_module("lightly")
    except ImportError as error:
        raise MissingExtraError(
            "fitting an encoder needs the package lightly, which is not installed: pip install 'simdetr[ssl]'"
        ) from error


class Objective(nn.Module, ABC):
    """What an objective has. Its first argument is the encoder, which it may copy but must not keep."""

    @abstractmethod
    def crops(self, image_size: int, views: Mapping[str, Any]) -> Crops:
        """What makes the views of one image; large ones are square with this side in pixels.

        ``views`` are further arguments of lightly's transform, such as ``cj_strength``.
        """

    @abstractmethod
    def forward(self, encoder: LearningEncoder, views: Sequence[Tensor]) -> Tensor:
        """Loss of a batch; views are what ``crops`` gives, stacked: images [B, 3, S, S], RGB in 0..1, come first."""

    def before_step(self, encoder: LearningEncoder, progress: float) -> None:
        """Called before every step with the part of the training that is done, 0..1; for teachers."""

    def learnt(self, encoder: LearningEncoder) -> LearningEncoder:
        """The encoder that is kept: the trained one, or a teacher that follows it."""
        return encoder


class VICReg(Objective):
    """Two views of an image are alike, while the values of a batch keep their variance and are not correlated.

    Args:
        encoder: the backbone.
        hidden_dim, output_dim: of the projection head.
    """

    def __init__(self, encoder: LearningEncoder, hidden_dim: int = 2048, output_dim: int = 2048) -> None:
        super().__init__()
        from lightly.loss import VICRegLoss
        from lightly.models.modules.heads import VICRegProjectionHead

        self.head = VICRegProjectionHead(encoder.region_dim, hidden_dim, output_dim)
        self.loss = VICRegLoss()

    def crops(self, image_size: int, views: Mapping[str, Any]) -> Crops:
        """Two crops, by lightly's VICRegTransform."""
        from lightly.transforms.vicreg_transform import VICRegTransform

        crops: Crops = VICRegTransform(input_size=image_size, normalize=None, **views)
        return crops

    def forward(self, encoder: LearningEncoder, views: Sequence[Tensor]) -> Tensor:
        """Loss of two views [B, 3, S, S]."""
        first, second = (self.head(pooled(encoder(view))) for view in views)
        with in_32_bits(first):
            loss: Tensor = self.loss(first.float(), second.float())
        return loss


class DINO(Objective):
    """A student that sees small and large crops predicts what its own moving average says of the large ones.

    Args:
        encoder: the backbone.
        hidden_dim, bottleneck_dim, output_dim: of the projection head.
        momentum: of the teacher at the start; it rises to 1 along a cosine.
        teacher_temperature: lower sharpens what the teacher says.
    """

    def __init__(
        self,
        encoder: LearningEncoder,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 4096,
        momentum: float = 0.996,
        teacher_temperature: float = 0.04,
    ) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules.heads import DINOProjectionHead

        sizes = (encoder.region_dim, hidden_dim, bottleneck_dim, output_dim)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm")  # lightly's head uses torch's older one
            self.head, self.teacher_head = DINOProjectionHead(*sizes), DINOProjectionHead(*sizes)
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.teacher_head.requires_grad_(False)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.loss = DINOLoss(output_dim, teacher_temp=teacher_temperature)
        self.momentum = momentum

    def crops(self, image_size: int, views: Mapping[str, Any]) -> Crops:
        """Two large crops, then the small ones, by lightly's DINOTransform."""
        from lightly.transforms.dino_transform import DINOTransform

        small = max(1, round(image_size * 96 / 224 / LAST_STRIDE)) * LAST_STRIDE  # 96 of 224 pixels in the paper
        sizes = {"global_crop_size": image_size, "local_crop_size": small}
        crops: Crops = DINOTransform(**(sizes | {"normalize": None} | dict(views)))
        return crops

    def forward(self, encoder: LearningEncoder, views: Sequence[Tensor]) -> Tensor:
        """Loss of two large and any number of small views."""
        said = [self.head(pooled(encoder(view))) for view in views]
        with torch.no_grad():
            target = [self.teacher_head(pooled(self.teacher(view))) for view in views[:2]]
        with in_32_bits(said[0]):
            loss: Tensor = self.loss([level.float() for level in target], [level.float() for level in said])
        return loss

    def before_step(self, encoder: LearningEncoder, progress: float) -> None:
        """Let the teacher follow what the last step made of the student."""
        from lightly.models.utils import update_momentum

        momentum = 1 - (1 - self.momentum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        with torch.no_grad():
            update_momentum(encoder, self.teacher, momentum)
            update_momentum(self.head, self.teacher_head, momentum)

    def learnt(self, encoder: LearningEncoder) -> LearningEncoder:
        """The teacher."""
        return self.teacher


class VICRegL(Objective):
    """VICReg of whole views and of single cells: cells at the same place, and cells that are most alike, agree.

    Args:
        encoder: the backbone.
        hidden_dim, output_dim: of the head for whole views.
        local_dim: of the heads for cells, hidden and output.
        alpha: weight of the whole views against the cells, 0..1.
        strides: maps whose cells are compared, out of 16 and 32.
        matches: pairs of cells per image and view: from the first view to the second, and back.
        crop_scale: smallest and largest part of the image's area in a view.
    """

    def __init__(
        self,
        encoder: LearningEncoder,
        hidden_dim: int = 2048,
        output_dim: int = 2048,
        local_dim: int = 512,
        alpha: float = 0.75,
        strides: Sequence[int] = (16, 32),
        matches: tuple[int, int] = (20, 4),
        crop_scale: tuple[float, float] = (0.2, 1.0),
    ) -> None:
        super().__init__()
        from lightly.loss import VICRegLLoss
        from lightly.models.modules.heads import VicRegLLocalProjectionHead, VICRegProjectionHead

        if not set(strides) <= set(encoder.channels) or not strides:
            raise ValueError(f"strides: expected some of {sorted(encoder.channels)}, got {list(strides)}")
        self.head = VICRegProjectionHead(encoder.region_dim, hidden_dim, output_dim)
        heads = {s: VicRegLLocalProjectionHead(encoder.channels[s], local_dim, local_dim) for s in strides}
        self.cell_heads = nn.ModuleDict({str(stride): head for stride, head in heads.items()})
        self.loss = VICRegLLoss(alpha=alpha, num_matches=(int(matches[0]), int(matches[1])))
        self.crop_scale = crop_scale
        self.finest = min(strides)

    def crops(self, image_size: int, views: Mapping[str, Any]) -> Crops:
        """Two crops, then the places [H, W, 2] of their cells in the image, at the finest of the strides.

        ``views`` go to lightly's VICRegLViewTransform, which changes the colours.
        """
        from lightly.transforms.image_grid_transform import ImageGridTransform
        from lightly.transforms.vicregl_transform import VICRegLViewTransform

        crop = CropWithPlaces(image_size, image_size // self.finest, self.crop_scale)
        colours = VICRegLViewTransform(normalize=None, **views)
        crops: Crops = ImageGridTransform([(crop, colours), (crop, colours)])
        return crops

    def forward(self, encoder: LearningEncoder, views: Sequence[Tensor]) -> Tensor:
        """Loss of two views [B, 3, S, S] with the places of their cells [B, H, W, 2]."""
        maps = [encoder(view) for view in views[:2]]
        whole = [self.head(pooled(levels)) for levels in maps]
        losses = []
        for stride, head in self.cell_heads.items():
            cells = [head(rearrange(levels[int(stride)], "b c h w -> b h w c")) for levels in maps]
            step = int(stride) // self.finest
            places = [reduce(grid, "b (h y) (w x) two -> b h w two", "mean", y=step, x=step) for grid in views[2:]]
            with in_32_bits(whole[0]):
                features = [(view.float(), cell.float()) for view, cell in zip(whole, cells, strict=True)]
                losses.append(self.loss(features, places))
        return torch.stack(losses).mean()


def pooled(maps: Mapping[int, Tensor]) -> Tensor:
    """The average of the last level's map, [B, C]."""
    return reduce(maps[LAST_STRIDE], "b c h w -> b c", "mean")


def in_32_bits(tensor: Tensor) -> torch.autocast:
    """A block in which mixed precision is off: variances and covariances need the digits."""
    return torch.autocast(tensor.device.type, enabled=False)


OBJECTIVES: dict[str, type[Objective]] = {"vicreg": VICReg, "dino": DINO, "vicregl": VICRegL}


def build_objective(name: str, encoder: LearningEncoder, arguments: Mapping[str, Any], seed: int = 0) -> Objective:
    """An objective, one of ``OBJECTIVES`` or ``package.module.Class``, with its heads for this encoder.

    ``arguments`` are those of the class after the encoder, ``seed`` is that of the heads' weights.

    Raises:
        ValueError: for an unknown name, a class that is no objective, or arguments that it does not take.
        MissingExtraError: lightly is not installed.
    """
    require_lightly()
    found: object = OBJECTIVES.get(name)
    if found is None and "." in name:
        module, _, attribute = current(name).rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError as error:
            raise ValueError(f"objective: cannot import {module} of {name!r} ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        known = ", ".join(OBJECTIVES)
        raise ValueError(f"objective: expected {known} or the class path of an Objective, got {name!r}")
    if found.__abstractmethods__:
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"objective: expected a class with crops and forward, {name} lacks {lacking}; define it there")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return found(encoder, **arguments)
        except TypeError as error:
            raise ValueError(f"objective_args: {name} does not take them ({error}); see its docstring") from error


def make_crops(objective: Objective, image_size: int, views: Mapping[str, Any]) -> Crops:
    """The crops of an objective; a ValueError where ``views`` does not fit lightly's transform."""
    try:
        return objective.crops(image_size, views)
    except TypeError as error:
        raise ValueError(f"views: lightly's transform does not take {dict(views)} ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# A timm backbone that learns: name in, maps with gradients out; and its weights under timm's names, to be kept.


class LearningEncoder(TimmEncoder):
    """A trainable :class:`TimmEncoder`, so that what is trained is what is mined with, pixel by pixel.

    Arguments and errors are those of the latter; without weights it starts from random ones. A ValueError names a model
    that timm does not know.
    """

    def __init__(self, model: str, weights: str | None = None, seed: int = 0) -> None:
        check_model(model)
        super().__init__(model, weights=weights, random_weights=weights is None, seed=seed)
        self.model = model
        self.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Unlike a frozen encoder's, its statistics follow the images."""
        nn.Module.train(self, mode)
        return self

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Feature maps of images [B, 3, H, W], RGB in 0..1, by stride; with gradients."""
        return self.maps(images)


def check_model(model: str) -> None:
    """Raise a ValueError for a name that timm does not know, with the nearest ones that it does."""
    if timm.is_model(model):
        return
    near = difflib.get_close_matches(model, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('*resnet*') lists names"
    raise ValueError(f"model: expected the name of a timm model, got {model!r}; {hint}")


def timm_weights(encoder: LearningEncoder) -> dict[str, Tensor]:
    """Weights of the backbone on the CPU under the names of timm's plain model, which is built for them.

    Raises:
        RuntimeError: if the plain model has no place for some of them.
    """
    with torch.random.fork_rng(devices=[]):  # the plain model's own initialisation must not disturb anyone
        plain = timm.create_model(encoder.model, num_classes=0)
    report = load_into(plain, encoder.net.state_dict(), min_matched=0.0)
    if report.unexpected or report.mismatched:
        raise RuntimeError(f"model: the weights of {encoder.model} do not fit timm's plain model: {report.summary()}")
    state: dict[str, Tensor] = plain.state_dict()
    return {name: state[name].detach().cpu().contiguous() for name in report.loaded}
