"""Backbones: images [B, 3, H, W] in, feature maps from fine to coarse out, all [B, C_l, H_l, W_l].

Any timm network serves: those with a hierarchy (ResNet, ConvNeXt, Swin, EfficientNet, ...) give maps of strides 8, 16
and 32; a plain vision transformer gives one map, which a simple feature pyramid spreads over three strides. Freezing
follows Deformable DETR: batch norm and everything before the stage of stride 8. The network lives in ``body``, so that
names in a state dict are ``backbone.body.`` and timm's own. Padding masks are brought to the sizes of maps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import FrozenBatchNormAct2d, freeze_batch_norm_2d
from timm.layers.padding import pad_same
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from simdetr.data.pretrained_weights import PACKAGED, load_into, normalisation, timm_name

Between = Callable[[int, Tensor], Tensor]


class Backbone(nn.Module):
    """A timm network as a source of multi-scale feature maps.

    Args:
        name: any name of ``timm.list_models()`` whose maps have strides 8, 16 and 32, or a plain vision transformer; or
            a word for one whose weights a package carries, ``augnet-resnet50`` or ``efficientnet-lite0``.
        num_maps: 3 for strides 8, 16, 32; 1 for the coarsest map only (a transformer's own map, without a pyramid).
        output_stride: pixels per cell of the last map; 16 (the DC5 variant) or 8 dilate the stages that would go below
            (networks with ``output_stride``).
        frozen_batch_norm: fix statistics and affine parameters of batch norm; wanted with small batches and pretrained
            weights. Set it to False to train a batch-norm network from random weights.
        freeze_stem: fix all parameters before the stage of stride 8 (ResNet: conv1, bn1, layer1; plain transformers:
            before the first block). Running statistics of unfrozen batch norm in the stem still follow the data.
        freeze_all: fix the whole network, batch norm included, and keep it in evaluation mode.
        pretrained: load timm's pretrained weights (needs the network or timm's cache), or the package's.
        pyramid_channels: channels of the maps made by the pyramid of a plain vision transformer.

    Attributes:
        channels: channels of each map, fine to coarse.
        strides: input pixels per cell of each map.
        pad_multiple: image sides must be multiples of this many pixels (1 for convolutional networks).
        colour_mean: of the colours 0..1 that the network's own weights were learnt with.
        colour_std: their deviation.

    Raises:
        ValueError: unknown name, a network of fixed image size, or one without the needed strides.
    """

    def __init__(
        self,
        name: str,
        num_maps: int = 3,
        output_stride: Literal[8, 16, 32] = 32,
        frozen_batch_norm: bool = True,
        freeze_stem: bool = True,
        freeze_all: bool = False,
        pretrained: bool = False,
        pyramid_channels: int = 256,
    ) -> None:
        super().__init__()
        if num_maps not in (1, 3):
            raise ValueError(f"num_maps must be 1 or 3, got {num_maps}")
        self.colour_mean, self.colour_std = normalisation(name)
        packaged = PACKAGED.get(name) if pretrained else None
        name = timm_name(name)
        body = _create(name, output_stride, pretrained and packaged is None)
        if packaged is not None:
            load_into(body, packaged.load())
        info: Any = body.feature_info
        channels, strides = list(info.channels()), list(info.reduction())
        plain = len(set(strides)) == 1 and output_stride == 32  # at 8 all maps of a hierarchy have one stride too
        expected = [min(stride, output_stride) for stride in (8, 16, 32)]
        if not plain and strides != expected:
            raise ValueError(
                f"backbone {name!r} has maps of strides {strides}; expected {', '.join(map(str, expected))}. Choose "
                "another network."
            )

        if frozen_batch_norm or freeze_all:
            body = with_folded_norms(freeze_batch_norm_2d(body))  # type: ignore[no-untyped-call]
        if freeze_all:
            body.requires_grad_(False)
        elif freeze_stem:
            _freeze_before(body, "model.blocks.0." if plain else info.module_name()[0] + ".")
        self.body = body
        self.freeze_all = freeze_all
        self.pyramid = SimpleFeaturePyramid(channels[-1], pyramid_channels) if plain and num_maps == 3 else None
        self.channels: list[int] = [pyramid_channels] * 3 if self.pyramid is not None else channels[-num_maps:]
        own = strides[-1]
        self.strides: list[int] = strides[-num_maps:] if self.pyramid is None else [own // 2, own, own * 2]
        self.pad_multiple = (strides[-1] if plain else strides[0] // 2) if _takes_one_size(name) else 1
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; a wholly frozen body stays in evaluation mode (no drop path, no dropout)."""
        super().train(mode)
        if self.freeze_all:
            self.body.eval()
        return self

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them, if the network knows how to."""
        for module in (self.body, getattr(self.body, "model", None)):
            switch: Any = getattr(module, "set_grad_checkpointing", None)
            if switch is not None:
                switch(True)
                return

    def forward(self, images: Tensor, between: Between | None = None) -> list[Tensor]:
        """Feature maps of a batch.

        Args:
            images: normalised images [B, 3, H, W], sides multiples of ``pad_multiple``.
            between: sees map l [B, C_l, H_l, W_l] as soon as it is there, and gives what the next stage reads.

        Returns:
            Maps [B, channels[l], H_l, W_l], fine to coarse.
        """
        images = laid_out(images)
        if between is None:
            maps = self.body(images)
        else:
            with self._seen_by(between):
                maps = self.body(images)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if self.pyramid is not None:
            pyramid: list[Tensor] = self.pyramid(maps[-1])
            return pyramid
        maps = list(maps[-len(self.channels) :])
        # torch's group norm, which comes next, is a digit or two less exact where channels lie within pixels
        return [features.contiguous() for features in maps] if images.device.type == "cpu" else maps

    @contextmanager
    def _seen_by(self, between: Between) -> Iterator[None]:
        """Hooks on the stages that end in a map; a ValueError where maps come from a pyramid, after the last block."""
        if self.pyramid is not None:
            raise ValueError("backbone: a plain vision transformer has no stages between its maps; choose one with")

        def change(index: int, output: Tensor) -> Tensor:
            if not self._channels_last:
                return between(index, output)
            return between(index, output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

        info: Any = self.body.feature_info
        stages = [_submodule(self.body, name) for name in info.module_name()[-len(self.channels) :]]
        hooks = [
            stage.register_forward_hook(lambda _, __, output, index=index: change(index, output))
            for index, stage in enumerate(stages)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _submodule(body: nn.Module, name: str) -> nn.Module:
    """The module that timm's feature info names, in either of its two wrappers."""
    flat = name.replace(".", "_")
    known = dict(body.named_children())
    return known[flat] if flat in known else body.get_submodule(f"model.{name}")


def _takes_one_size(name: str) -> bool:
    """Whether a network is built for one image size unless told otherwise (transformers with positions or windows)."""
    return bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))


def _create(name: str, output_stride: int, pretrained: bool) -> nn.Module:
    """Build the timm network with its last three maps."""
    if not timm.is_model(name.split(".")[0]):
        similar = ", ".join(timm.list_models(f"*{name[:8]}*")[:6]) or "none"
        raise ValueError(f"backbone {name!r} is not a timm model; similar names: {similar}. See timm.list_models().")
    options: dict[str, Any] = {}
    if output_stride < 32:
        options["output_stride"] = output_stride
    if _takes_one_size(name):
        options["dynamic_img_size"] = True
        if name.startswith("swin_"):
            # built for 224 px the last stage would be one window and lose its shift for good
            options["always_partition"] = True
    try:
        body: nn.Module = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=(-3, -2, -1), **options
        )
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"backbone {name!r} cannot be built with {options}: {error}. Choose a network for any image size"
            + (" that can be dilated (ResNet)." if output_stride < 32 else " (ResNet, ConvNeXt, Swin, ViT).")
        ) from error
    return body


def _freeze_before(body: nn.Module, first_trainable: str) -> None:
    """Fix every parameter that comes, in order of definition, before the module of this name."""
    # timm flattens the names of children that it lifts out of their parent: stages.1 becomes stages_1
    starts = (first_trainable, first_trainable.replace(".", "_", first_trainable.count(".") - 1))
    for name, parameter in body.named_parameters():
        if name.startswith(starts):
            return
        parameter.requires_grad_(False)
    raise AssertionError(f"no parameter of the backbone is called {first_trainable}...")


class SimpleFeaturePyramid(nn.Module):
    """Maps of twice, once and half the resolution of a transformer's map: strides 8, 16 and 32 for a patch of 16 px.

    From D channels to C. Source: the simple feature pyramid of ViTDet (arXiv 2203.16527, section 3).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = in_channels // 2
        self.scales = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(in_channels, half, 2, stride=2), *_smooth(half, out_channels)),
                nn.Sequential(*_smooth(in_channels, out_channels)),
                nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), *_smooth(in_channels, out_channels)),
            ]
        )

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Map [B, D, h, w] to maps [B, C, 2h, 2w], [B, C, h, w] and [B, C, ceil(h/2), ceil(w/2)]."""
        return [scale(tokens) for scale in self.scales]


def laid_out(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] with channels last on processors, where convolutions are faster so; on GPUs as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


def _smooth(in_channels: int, out_channels: int) -> list[nn.Module]:
    """1x1 and 3x3 convolution, each followed by layer norm over the channels."""
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Frozen batch norm scales and shifts channels by constants: a convolution before it can do both. Its own weight stays
# what it is in state dicts and for the optimiser; it is scaled anew in every pass, and so is its gradient.


class _Affine:
    """Frozen batch norm whose ``scale_and_shift`` are one pass over the activations, or none after its convolution."""

    folded = False

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Of each channel [C]."""
        norm: Any = self
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.bias - norm.running_mean * scale

    def normalised(self, x: Tensor) -> Tensor:
        """[B, C, H, W]; nothing of ``x`` is kept for the backward pass."""
        if self.folded:
            return x
        scale, shift = (values.to(x.dtype)[:, None, None] for values in self.scale_and_shift())
        return torch.addcmul(shift, x, scale)


class FrozenBatchNorm(_Affine, FrozenBatchNorm2d):  # type: ignore[misc]
    """Batch norm with fixed statistics and affine parameters, all of them buffers.

    torchvision's takes two passes and, under autocast, turns half precision into float32, which doubles the memory of
    everything up to the next convolution. Arguments and names in a state dict are torchvision's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift every channel."""
        return self.normalised(x)


class FrozenBatchNormAct(_Affine, FrozenBatchNormAct2d):
    """The same, and the activation after it, with the arguments and names of timm's."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale, shift and activate every channel."""
        activated: Tensor = self.act(self.drop(self.normalised(x)))
        return activated


class NormedConvolution(nn.Conv2d):
    """A convolution that its frozen batch norm is folded into.

    Attributes:
        norm: that batch norm, in a tuple: it is registered where it was.
        pads_to_same: pad as TensorFlow does.
    """

    norm: tuple[FrozenBatchNorm | FrozenBatchNormAct]
    pads_to_same: bool

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to its normed map."""
        scale, shift = self.norm[0].scale_and_shift()
        if self.pads_to_same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)


class _Modules(fx.Tracer):
    """Sees convolutions and batch norms as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _Affine) or super().is_leaf_module(m, module_qualified_name)


def with_folded_norms(body: nn.Module) -> nn.Module:
    """Fold frozen batch norms, with the buffers that they have, into convolutions that they alone follow.

    Others, and those of networks whose forward pass torch.fx cannot follow, are one pass. Returns ``body``.
    """
    for module in body.modules():
        if type(module) is FrozenBatchNorm2d:
            module.__class__ = FrozenBatchNorm
        elif type(module) is FrozenBatchNormAct2d:
            module.__class__ = FrozenBatchNormAct
    if not any(isinstance(module, _Affine) for module in body.modules()):
        return body
    try:
        nodes = _Modules().trace(body).nodes
    except (fx.proxy.TraceError, TypeError):
        return body
    called = {node: body.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    times = Counter(called.values())
    for node, norm in called.items():
        source = node.args[0]
        if not isinstance(norm, FrozenBatchNorm | FrozenBatchNormAct) or not isinstance(source, fx.Node):
            continue
        conv = called.get(source)
        plain = type(conv) in (nn.Conv2d, Conv2dSame) and getattr(conv, "padding_mode", None) == "zeros"
        if conv is not None and plain and len(source.users) == times[conv] == times[norm] == 1:
            conv.__dict__.update(norm=(norm,), pads_to_same=isinstance(conv, Conv2dSame))
            conv.__class__ = NormedConvolution
            norm.folded = True
    return body


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest resize of bool masks, [B, H, W] to [B, *size].

    The pixels are those that ``F.interpolate(mode="nearest")`` takes, in its float32 arithmetic: spelt out because
    other runtimes of an exported graph round otherwise where a pixel ends at the border of a cell.
    """
    rows, columns = (_nearest(mask.shape[axis + 1], cells, mask.device) for axis, cells in enumerate(size))
    return mask[:, rows[:, None], columns]


def _nearest(pixels: int, cells: int, device: torch.device) -> Tensor:
    """One pixel for each cell, int64 [cells]."""
    scale = torch.full((), pixels, dtype=torch.float32, device=device) / cells
    return (torch.arange(cells, device=device) * scale).long()


def batch_mask(images: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of images [B, 3, H, W]: bool [B, H, W], or, to save work, [1, H, W] and all False without padding.

    ``mask`` is True at padding, None if no image is padded; another shape is a ValueError.
    """
    wanted = [images.shape[0], *images.shape[-2:]]
    if mask is None:
        return images.new_zeros(1, *wanted[1:], dtype=torch.bool)
    if list(mask.shape) != wanted:
        raise ValueError(f"mask must be [B, H, W] = {wanted}, got {list(mask.shape)}")
    # on other devices the host would wait for the answer
    free = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return mask[:1] if free and not mask.any() else mask


def pad_to_multiple(images: Tensor, mask: Tensor | None, multiple: int) -> tuple[Tensor, Tensor]:
    """Zero-pad to sides that are multiples of so many pixels; arguments, mask and errors are ``batch_mask``'s."""
    mask = batch_mask(images, mask)
    extra_h, extra_w = (-side % multiple for side in images.shape[-2:])
    # a compiled or exported graph pads by 0 where eager mode would not pad: it serves every size
    if multiple > 1 and (torch.compiler.is_compiling() or extra_h or extra_w):
        images = F.pad(images, (0, extra_w, 0, extra_h))
        mask = F.pad(mask.expand(images.shape[0], -1, -1), (0, extra_w, 0, extra_h), value=True)
    return images, mask
