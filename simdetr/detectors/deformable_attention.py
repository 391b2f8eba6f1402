"""Multi-scale deformable attention: every query reads a few points of every feature map.

In: queries, normalised reference points or boxes, flattened feature maps. Out: one vector per query.
Source: Deformable DETR (arXiv 2010.04159, equation 3), numerics of the published code.
Letters: B batch, N queries, S cells of all levels together, C channels, M heads, D = C / M, L levels, P points.

One of several implementations computes the sums: "triton" on CUDA devices where Triton works, "rows" on processors,
"grid_sample" elsewhere and in exported models. Another one is chosen by an argument, for a whole model by
`set_implementation`, for a whole process by the environment variable SIMDETR_DEFORMABLE_ATTENTION.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from simdetr.detectors.deformable_attention_torch import by_grid_sample, by_rows, constant_table

Implementation = Literal["auto", "triton", "rows", "grid_sample"]

ENVIRONMENT_VARIABLE = "SIMDETR_DEFORMABLE_ATTENTION"
IMPLEMENTATIONS = ("triton", "rows", "grid_sample")
"""Of these ``"auto"`` takes the first that can be used."""


def multi_scale_deformable_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    implementation: Implementation = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples of several feature maps.

    A location (x, y) in [0, 1] spans the whole map: 0 and 1 are the outer edges of the first and last cell, and what
    lies outside counts as zero; so does a level without cells. Sums are computed in float32 (in float64 if ``value``
    has it), also under autocast.

    Args:
        value: [B, S, M, D], levels one after the other, each row by row.
        shapes: (height, width) of each level; their areas sum to S.
        locations: [B, N, M, L, P, 2].
        weights: [B, N, M, L, P].
        implementation: which one computes it.

    Returns:
        [B, N, M · D] in the dtype of ``value``.

    Raises:
        ValueError: the sizes do not fit together, or the implementation is unknown or cannot be used here.
    """
    name = choose_implementation(value.device.type, value.device.index, value.dtype, implementation)
    if not _exporting():  # an exporter's sizes are symbols that must not be compared
        _check_sizes(value, shapes, locations)
        filled = [level for level, (height, width) in enumerate(shapes) if height * width > 0]
        if len(filled) < len(shapes):
            shapes = [shapes[level] for level in filled]
            locations, weights = locations[:, :, :, filled], weights[:, :, :, filled]
    if name == "triton":
        from simdetr.detectors.deformable_attention_triton import by_triton

        return by_triton(value, shapes, locations, weights)
    dtype = value.dtype
    with torch.autocast(value.device.type, enabled=False):
        if dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        compute = by_rows if name == "rows" else by_grid_sample
        return compute(value, shapes, locations.to(value.dtype), weights.to(value.dtype)).to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_implementation(device_type: str, device_index: int | None, dtype: torch.dtype, wanted: str = "auto") -> str:
    """Name of the implementation that computes values of this type on this device, such as ``"cuda"`` and its number.

    With ``"auto"`` the environment variable decides, else what can be used here.

    Raises:
        ValueError: what is wanted is unknown or cannot be used here; the message says why.
    """
    source = "implementation"
    if wanted == "auto":
        if _exporting():
            return "grid_sample"
        source, wanted = ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if wanted not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{source} must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {wanted!r}")
    if wanted == "auto":
        return next(name for name in IMPLEMENTATIONS if obstacle(name, device_type, device_index, dtype) is None)
    problem = obstacle(wanted, device_type, device_index, dtype)
    if problem is not None:
        raise ValueError(f"{source} {wanted!r} cannot compute deformable attention here: {problem}; use 'auto'")
    return wanted


def obstacle(
    name: str, device_type: str, device_index: int | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why an implementation cannot compute values of this type on this device; None if it can."""
    if name == "rows" and device_type != "cpu":
        return f"it is written for the CPU, not for {device_type}"
    if name != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, which would round {str(dtype).removeprefix('torch.')}"
    if device_type != "cuda":
        return f"it needs a CUDA device, not {device_type}"
    return _triton_failure(torch.cuda.current_device() if device_index is None else device_index)


@functools.cache
def _triton_failure(device_index: int) -> str | None:
    """What goes wrong when Triton computes a small case on this device, such as a missing C compiler; None if nothing.

    A thread of its own keeps the try apart from autocast, inference mode, tracing and whatever else is going on here.
    """

    def attempt() -> None:
        from simdetr.detectors.deformable_attention_triton import try_out

        try_out(torch.device("cuda", device_index))

    with ThreadPoolExecutor(max_workers=1) as pool:
        error = pool.submit(attempt).exception()
    if error is None:
        return None
    return f"Triton does not work here ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _exporting() -> bool:
    """Whether a model is being written as a graph for another runtime."""
    # torch.compiler.is_exporting came after the oldest torch that this package runs on
    by_torch_export = bool(getattr(torch.compiler, "is_exporting", bool)())
    return by_torch_export or torch.onnx.is_in_onnx_export() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _check_sizes(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor) -> None:
    areas = sum(height * width for height, width in shapes)
    if value.shape[1] != areas or areas == 0:
        raise ValueError(f"shapes must have as many cells as value, one at least, got {shapes} and {value.shape[1]}")
    if locations.shape[3] != len(shapes):
        raise ValueError(f"locations must have a level for each of shapes, got {locations.shape[3]} and {len(shapes)}")


def set_implementation(model: nn.Module, implementation: Implementation) -> None:
    """Let one implementation compute all deformable attention of a model."""
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.implementation = implementation


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections.

    Args:
        dim: C.
        num_levels: L.
        num_heads: M, a divisor of ``dim``.
        num_points: P, per head and level.

    Attributes:
        implementation: which implementation computes the sums; `set_implementation` changes it.
    """

    def __init__(self, dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.implementation: Implementation = "auto"
        if dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads look in M directions on the unit square, point p at p + 1 cells, with equal weights (A7)."""
        angles = torch.arange(self.num_heads) * (2.0 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to feature maps.

        Args:
            query: [B, N, C], positions already added.
            reference: points [B, N, L, 2] or boxes cxcywh [B, N, L, 4] in fractions of each padded map.
            memory: [B, S, C], without positions.
            shapes: (height, width) of each level.
            padding: bool [B, S], True at cells to read as zero; None if there are none.

        Returns:
            [B, N, C].
        """
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = rearrange(value, "b s (m d) -> b s m d", m=self.num_heads)
        offsets = self._of_points(self.sampling_offsets, query)
        weights = self._of_points(self.attention_weights, query, shares=True)
        if reference.shape[-1] == 2:
            offsets = offsets / self._per_point(_sizes_wh(shapes, reference)[None, None])
        else:
            offsets = offsets * self._per_point(reference[..., 2:] * (0.5 / self.num_points))
        locations = self._per_point(reference[..., :2]) + offsets
        locations = rearrange(locations, "b n m (l p xy) -> b n m l p xy", xy=2, l=self.num_levels)
        weights = rearrange(weights, "b n m (l p) -> b n m l p", l=self.num_levels)
        attended = multi_scale_deformable_attention(value, shapes, locations, weights, self.implementation)
        projected: Tensor = self.output_proj(attended)
        return projected

    def _of_points(self, layer: nn.Linear, query: Tensor, shares: bool = False) -> Tensor:
        """What a layer says of the points of every head [B, N, M, F], or what they make of 1.

        On the CPU it lies in memory with queries last: arithmetic then goes along long rows, ten times as fast.
        """
        heads, (batch, queries) = self.num_heads, query.shape[:2]
        if query.device.type != "cpu" or _exporting():
            said: Tensor = rearrange(layer(query), "b n (m f) -> b n m f", m=heads)
            return said.softmax(dim=-1) if shares else said
        weight = rearrange(layer.weight, "(m f) c -> (f m) c", m=heads)
        bias = rearrange(layer.bias, "(m f) -> (f m) 1", m=heads)
        rows = rearrange(torch.addmm(bias, weight, query.flatten(0, 1).T), "(f m) bn -> f (m bn)", m=heads)
        if shares:
            rows = rows.softmax(dim=0)
        return rearrange(rows, "f (m b n) -> b n m f", m=heads, b=batch, n=queries)

    def _per_point(self, per_level: Tensor) -> Tensor:
        """[B, N, L, 2] to [B, N, 1, L · P · 2], on the CPU with queries last in memory."""
        if per_level.device.type != "cpu" or _exporting():
            return repeat(per_level, "b n l xy -> b n 1 (l p xy)", p=self.num_points)
        return rearrange(repeat(per_level, "b n l xy -> (l p xy) b n", p=self.num_points), "f b n -> b n 1 f")


def _sizes_wh(shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """(width, height) of each level, [L, 2]."""
    if _exporting() or torch.compiler.is_compiling() or type(like) is not Tensor:
        # filled one by one: of a list of sizes, an exported graph would keep the numbers
        sides = [like.new_full((), side) for height, width in shapes for side in (width, height)]
        return torch.stack(sides).view(-1, 2)
    return constant_table(tuple((width, height) for height, width in shapes), like.dtype, like.device)
