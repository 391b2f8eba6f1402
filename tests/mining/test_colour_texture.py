import numpy as np
import pytest
import torch
from torch.nn import functional

from simdetr.mining.colour_texture import ColourTextureEncoder, cell_statistics, rgb_to_lab
from simdetr.mining.encoders import Encoder
from simdetr.mining.spectral_clustering import spectral_clustering


@pytest.fixture(scope="module")
def encoder():
    return ColourTextureEncoder()


def noise(height=128, width=160, batch=2, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def inside_and_across(level, mask):
    """Mean cosine between cells of one side, and between cells of both sides."""
    cells = functional.normalize(level.flatten(1), dim=0)
    own = mask.flatten()
    cosine = cells.T @ cells
    return float(cosine[own][:, own].mean()), float(cosine[own][:, ~own].mean())


def halves(left, right, size=128):
    image = torch.cat((left.expand(3, size, size // 2), right.expand(3, size, size // 2)), dim=2)
    return image[None]


@pytest.mark.parametrize(("height", "width"), [(128, 160), (70, 101), (20, 33), (1, 1)])
def test_maps_have_the_contracts_shapes(encoder, height, width):
    assert isinstance(encoder, Encoder)
    maps = encoder(noise(height, width))
    assert list(maps) == list(encoder.strides) == [16, 32]
    for stride, level in maps.items():
        assert level.shape == (2, encoder.region_dim, -(-height // stride), -(-width // stride))
        assert torch.isfinite(level).all()
        torch.testing.assert_close(level.norm(dim=1), torch.ones_like(level[:, 0]))


def test_lab_agrees_with_published_values():
    """Red, green, blue, white, black and mid grey in sRGB under D65 (CIE 15; Lindbloom's calculator)."""
    colours = torch.tensor(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5]], dtype=torch.float32
    )
    lab = rgb_to_lab(colours.T[None, :, :, None])[0, :, :, 0].T * 100
    expected = torch.tensor(
        [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0], [0, 0, 0], [53.39, 0, 0]]
    )
    torch.testing.assert_close(lab, expected, atol=0.06, rtol=0)


def test_cell_statistics_are_those_of_the_pixels():
    images = noise(64, 96)
    moments, energies = cell_statistics(images)
    cell = images[1, :, 16:32, 48:64]
    lab = rgb_to_lab(cell.unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean(dim=(2, 4))[None])[0]
    torch.testing.assert_close(moments[1, :3, 1, 3], lab.mean(dim=(1, 2)))
    torch.testing.assert_close(moments[1, 3:, 1, 3], lab.square().mean(dim=(1, 2)))
    luma = 0.299 * cell[0] + 0.587 * cell[1] + 0.114 * cell[2]
    x_differences = (luma[:, ::2] - luma[:, 1::2]).unflatten(0, (8, 2)).sum(dim=1) / 4
    torch.testing.assert_close(energies[1, 0, 1, 3], x_differences.abs().mean())


@pytest.mark.parametrize(("period", "band"), [(2, 0), (4, 1)])
def test_stripes_sound_in_their_own_band_and_direction(period, band):
    stripes = (torch.arange(64) // (period // 2) % 2).float().expand(1, 3, 64, 64)
    _, energies = cell_statistics(stripes)
    loudest = energies.mean(dim=(0, 2, 3))
    assert int(loudest.argmax()) == 3 * band  # upright stripes differ along x
    _, turned = cell_statistics(stripes.mT)
    assert int(turned.mean(dim=(0, 2, 3)).argmax()) == 3 * band + 1


@pytest.mark.parametrize("stride", [16, 32])
def test_colour_sets_cells_apart(encoder, stride):
    red, blue = torch.tensor([0.7, 0.3, 0.3]).view(3, 1, 1), torch.tensor([0.3, 0.3, 0.7]).view(3, 1, 1)
    level = encoder(halves(red, blue))[stride][0]
    left = torch.zeros(level.shape[1:], dtype=torch.bool)
    left[:, : level.shape[2] // 2] = True
    inside, across = inside_and_across(level, left)
    assert inside > 0.9 and across < inside - 0.4


@pytest.mark.parametrize("stride", [16, 32])
def test_texture_of_equal_mean_sets_cells_apart(encoder, stride):
    """Fine against coarse checks: mean and deviation are the same, only the band tells them apart."""
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(64), indexing="ij")
    fine = ((rows // 2 + columns // 2) % 2).float() * 0.5 + 0.25
    coarse = ((rows // 8 + columns // 8) % 2).float() * 0.5 + 0.25
    level = encoder(halves(fine, coarse))[stride][0]
    left = torch.zeros(level.shape[1:], dtype=torch.bool)
    left[:, : level.shape[2] // 2] = True
    inside, across = inside_and_across(level, left)
    assert inside > 0.95 and across < inside - 0.1


def test_spectral_clustering_finds_a_textured_square_on_a_textured_ground(encoder):
    """Equal colours, another grain: of eight clusters of the fine level one or more make up the square."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(1, 1, 256, 256, generator=generator)
    coarse = functional.interpolate(torch.rand(1, 1, 64, 64, generator=generator), (256, 256))
    image = fine.clone()
    image[:, :, 64:160, 96:192] = coarse[:, :, 64:160, 96:192]
    maps = encoder(image.expand(1, 3, 256, 256))
    labels = spectral_clustering(maps[16], (8,), affinity="clamp", centre=False)[8][0]
    square = torch.zeros(16, 16, dtype=torch.bool)
    square[4:10, 6:12] = True
    majority = torch.stack([square[labels == k].float().mean() for k in range(8) if bool((labels == k).any())])
    inside = torch.isin(labels, torch.unique(labels)[majority > 0.5])
    assert float((inside & square).sum() / (inside | square).sum()) > 0.7


def test_flat_images_are_the_same_everywhere(encoder):
    for value in (0.0, 0.4, 1.0):
        for level in encoder(torch.full((1, 3, 96, 96), value)).values():
            torch.testing.assert_close(level, level[:, :, :1, :1].expand_as(level), atol=1e-5, rtol=0)


def test_only_the_fine_level_knows_places():
    near, far = ColourTextureEncoder(position=0.0), ColourTextureEncoder(position=2.0)
    images = noise(96, 96)
    assert torch.equal(near(images)[32], far(images)[32])
    assert not torch.allclose(near(images)[16], far(images)[16], atol=0.05)


def test_an_image_does_not_depend_on_its_batch(encoder):
    images = noise(96, 128, batch=3)
    together = encoder(images)
    for index in range(3):
        alone = encoder(images[index : index + 1])
        for stride in encoder.strides:
            torch.testing.assert_close(together[stride][index], alone[stride][0], atol=1e-5, rtol=0)


def test_brightness_and_contrast_of_the_whole_image_hardly_matter(encoder):
    images = functional.interpolate(noise(8, 8), (128, 128), mode="bilinear") * 0.5
    cosine = (encoder(images)[16] * encoder(images * 0.8 + 0.1)[16]).sum(dim=1)
    assert float(cosine.mean()) > 0.95


def test_cosine_is_a_gaussian_kernel():
    """With one part, no mixing and no places, cosines follow the differences in colour alone."""
    encoder = ColourTextureEncoder(colour=1, deviation=0, energy=0, position=0, mixing=0, bandwidth=1, frequencies=4096)
    generator = torch.Generator().manual_seed(1)
    cells = torch.rand(3, 4, 4, generator=generator) * 0.6 + 0.2
    images = cells.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)[None]
    level = encoder(images)[16][0].flatten(1)
    lab = rgb_to_lab(cells[None])[0].flatten(1)
    centred = lab - lab.mean(dim=1, keepdim=True)
    points = (centred / centred.square().sum(dim=0).mean().sqrt()).T
    expected = np.exp(-torch.cdist(points, points).square().numpy() / 2)
    np.testing.assert_allclose((level.T @ level).numpy(), expected, atol=0.06)


def test_fingerprint_follows_the_settings_and_the_seed():
    marks = {
        ColourTextureEncoder(**options).fingerprint
        for options in ({}, {"colour": 2.0}, {"position": 0.0}, {"bandwidth": 2.0}, {"frequencies": 64}, {"seed": 1})
    }
    assert len(marks) == 6
    first, second = ColourTextureEncoder(), ColourTextureEncoder()
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first(noise())[16], second(noise())[16])


@pytest.mark.parametrize("options", [{"bandwidth": 0}, {"frequencies": 0}, {"mixing": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="bandwidth, frequencies, mixing: expected > 0"):
        ColourTextureEncoder(**options)
