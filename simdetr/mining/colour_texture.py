"""Images [B, 3, H, W] in 0..1 -> maps at strides 16 and 32 that need no weights: what colour and texture a cell has.

For the quickstart and for users without a checkpoint. A cell is described by its mean colour and colour
deviation in CIE L*a*b* and by the energy of its luma in the bands of a Haar wavelet pyramid, which tells fine from
coarse and upright from flat texture. Each of these is scaled by its spread within the image, neighbours are mixed a
little, and the fine level also knows where in the image it is. Random Fourier features (Rahimi and Recht 2007) then
turn the description into one whose cosine is a Gaussian kernel of the differences: the cosine, which all of mining
works with, hardly tells the raw numbers apart. `benchmarks/results/proposal_recall.json` has the recall of each choice.

Letters: B images, H, W their size in pixels, h, w a map's size, C channels of a description, F Fourier frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDES = (16, 32)
_HAAR_LEVELS = 2  # bands of 2 and 4 pixels; coarser ones mark the outlines of objects, and recall falls
_LUMA = (0.299, 0.587, 0.114)
_HAAR = (((1.0, 1.0), (1.0, 1.0)), ((1.0, -1.0), (1.0, -1.0)), ((1.0, 1.0), (-1.0, -1.0)), ((1.0, -1.0), (-1.0, 1.0)))
_FLAT = 0.004  # spread, in units of the lightness range, below which differences count as noise


class ColourTextureEncoder(nn.Module):
    """A fixed, hand-made encoder; the same images give the same maps everywhere.

    Its cosines are similarities already. Mining's defaults suit it; ``affinity="clamp"``, ``centre=False``,
    ``cut_steps=0`` with limits of 0.9 for the two similarity filters find more on two of three sets.

    Args:
        colour: weight of the mean colour.
        deviation: weight of the colour's deviation within a cell.
        energy: weight of the wavelet energies.
        position: weight of the place in the image at stride 16; the coarse level, which region features are averaged
            from, must not know it, or pseudo-classes would be places.
        mixing: share of the 3 x 3 neighbourhood in a cell's description, 0..1.
        bandwidth: of the Gaussian kernel, in spreads of the image; smaller tells more apart.
        frequencies: F; a map has 2 F channels.
        seed: of the frequencies.

    Raises:
        ValueError: if the bandwidth or the number of frequencies is not positive, or ``mixing`` is not in 0..1.
    """

    def __init__(
        self,
        colour: float = 1.5,
        deviation: float = 0.8,
        energy: float = 0.8,
        position: float = 0.7,
        mixing: float = 0.3,
        bandwidth: float = 2.5,
        frequencies: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if bandwidth <= 0 or frequencies < 1 or not 0 <= mixing <= 1:
            got = f"{bandwidth}, {frequencies} and {mixing}"
            raise ValueError(f"bandwidth, frequencies, mixing: expected > 0, >= 1 and 0..1, got {got}")
        self.weights = (colour, deviation, energy)
        self.position = position
        self.mixing = mixing
        self.strides: tuple[int, ...] = STRIDES
        self.region_dim: int = 2 * frequencies
        channels = 3 + 3 + 3 * _HAAR_LEVELS + 2
        draw = torch.randn(frequencies, channels, generator=torch.Generator().manual_seed(seed))
        self.directions: Tensor
        self.register_buffer("directions", draw / bandwidth)
        numbers = (*self.weights, position, mixing, bandwidth, frequencies, seed)
        self.fingerprint: str = "colour-texture-1:" + ",".join(f"{number:g}" for number in numbers)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Feature maps ``{stride: [B, 2 F, ceil(H / stride), ceil(W / stride)]}`` of a batch, cells of unit length.

        Sides that are no multiple of 32 are continued by their edge.
        """
        height, width = images.shape[-2:]
        padded = functional.pad(images, (0, -width % 32, 0, -height % 32), mode="replicate")
        moments, energies = cell_statistics(padded)
        coarse = functional.avg_pool2d(moments, 2), functional.avg_pool2d(energies, 2)
        maps = {16: self._describe(moments, energies, self.position), 32: self._describe(*coarse, 0.0)}
        return {stride: level[..., : -(-height // stride), : -(-width // stride)] for stride, level in maps.items()}

    def _describe(self, moments: Tensor, energies: Tensor, position: float) -> Tensor:
        """Means and mean squares [B, 6, h, w] and energies [B, 6, h, w] to Fourier features [B, 2 F, h, w]."""
        mean, square = moments.chunk(2, dim=1)
        parts = mean, (square - mean.square()).clamp(min=0).sqrt(), energies
        weighted = [weight * standardise(part) for weight, part in zip(self.weights, parts, strict=True)]
        description = torch.cat(weighted, dim=1)
        if self.mixing > 0:
            around = functional.avg_pool2d(description, 3, stride=1, padding=1, count_include_pad=False)
            description = torch.lerp(description, around, self.mixing)
        # The coordinates of the cells are of unit mean square together.
        axes = [torch.linspace(-1.2, 1.2, size, device=mean.device, dtype=mean.dtype) for size in mean.shape[-2:]]
        place = torch.stack(torch.meshgrid(axes, indexing="ij")) * position
        # Where nothing varies, the place must not either: a flat image is one cluster.
        varies = description.square().sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True).sqrt().clamp(max=1)
        description = torch.cat((description, place * varies), dim=1)
        phase = torch.einsum("fc,bchw->bfhw", self.directions, description)
        return torch.cat((phase.cos(), phase.sin()), dim=1) / math.sqrt(len(self.directions))


def rgb_to_lab(images: Tensor) -> Tensor:
    """Standard RGB in 0..1 to CIE L*a*b* (D65), divided by 100 so that lightness is in 0..1; both [B, 3, H, W]."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    to_xyz = images.new_tensor(
        [[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]]
    )
    white = to_xyz.sum(dim=1)
    xyz = torch.einsum("xc,bchw->bxhw", to_xyz / white[:, None], linear)
    root = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(dim=1)
    return torch.stack((1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)), dim=1)


def cell_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of 16 x 16 pixel cells, of RGB [B, 3, H, W] in 0..1; they average to those of larger cells.

    Returns:
        Means and mean squares of L*a*b* at half the resolution [B, 6, H/16, W/16]; mean absolute Haar coefficients of
        the luma [B, 6, H/16, W/16]: per band (fine to coarse) for differences along x, along y and diagonally.
    """
    lab = rgb_to_lab(functional.avg_pool2d(images, 2))  # the costly part, on a quarter of the pixels
    moments = functional.avg_pool2d(torch.cat((lab, lab.square()), dim=1), 8)
    low = torch.einsum("bchw,c->bhw", images, images.new_tensor(_LUMA))[:, None]
    haar = images.new_tensor(_HAAR)[:, None] / 4
    energies = []
    for level in range(1, _HAAR_LEVELS + 1):
        bands = functional.conv2d(low, haar, stride=2)
        low = bands[:, :1]
        energies.append(functional.avg_pool2d(bands[:, 1:].abs(), 16 >> level))
    return moments, torch.cat(energies, dim=1)


def standardise(part: Tensor) -> Tensor:
    """Zero mean per channel and image, and unit mean square over all channels together, unless nearly flat."""
    centred = part - part.mean(dim=(2, 3), keepdim=True)
    spread = centred.square().sum(dim=1).mean(dim=(1, 2)).sqrt()
    return centred / spread.clamp(min=_FLAT)[:, None, None, None]
