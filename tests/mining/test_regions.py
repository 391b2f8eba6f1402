"""Boxes, sizes and pooled features against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from simdetr.mining.regions import (
    Regions,
    _components_on_device,
    _number_on_device,
    connected_components,
    find_candidates,
    mask_components,
    to_regions,
)


def scipy_components(labels, connectivity):
    """Flat index of the first cell of each component, one mask at a time."""
    height, width = labels.shape[-2:]
    roots = np.zeros(labels.shape, np.int64)
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    for g, grid in enumerate(labels.reshape(-1, height, width)):
        for value in np.unique(grid):
            parts, count = ndimage.label(grid == value, structure)
            for part in range(1, count + 1):
                inside = parts == part
                roots.reshape(-1, height, width)[g][inside] = g * height * width + inside.ravel().argmax()
    return roots


def random_candidates(seed=0, batch=3, connectivity=4):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 2, (batch, 1, 4, 5), generator=generator)
    labels = torch.cat(
        [
            coarse.repeat_interleave(2, 2).repeat_interleave(2, 3),
            torch.randint(0, 3, (batch, 2, 8, 10), generator=generator),
        ],
        dim=1,
    )
    maps = {
        16: torch.randn(batch, 6, 8, 10, generator=generator),
        32: torch.randn(batch, 7, 4, 5, generator=generator),
    }
    return find_candidates(labels, [32, 16, 16], [2, 3, 3], maps, connectivity=connectivity)


@pytest.mark.parametrize("connectivity", [4, 8])
def test_boxes_cells_and_features_equal_plain_loops(connectivity):
    candidates = random_candidates(connectivity=connectivity)
    roots = scipy_components(candidates.labels.numpy(), connectivity)
    for image in range(3):
        own = candidates.valid[image].nonzero()[:, 0].tolist()
        assert len(own) == len(np.unique(roots[image]))
        for row, root in zip(own, np.unique(roots[image]), strict=True):
            clustering = int(candidates.clustering[image, row])
            mask = roots[image, clustering] == root
            y, x = mask.nonzero()
            assert candidates.boxes[image, row].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert int(candidates.cells[image, row]) == mask.sum()
            assert int(candidates.cluster[image, row]) == int(candidates.labels[image, clustering, y[0], x[0]])
            np.testing.assert_array_equal(candidates.masks[image, row].reshape(8, 10).numpy(), mask)
            level, inside = candidates.maps[32][image], mask
            if candidates.strides[clustering] == 16:
                level = torch.nn.functional.interpolate(level[None], (8, 10), mode="bilinear", align_corners=False)[0]
            else:
                inside = mask[::2, ::2]
            expected = level[:, torch.from_numpy(inside)].mean(dim=1)
            torch.testing.assert_close(candidates.features[image, row], expected, atol=1e-5, rtol=1e-5)


def test_where_keeps_order_and_pads():
    candidates = random_candidates()
    keep = torch.zeros_like(candidates.valid)
    keep[0, [1, 4]] = True
    keep[2, [0, 2, 3]] = True
    left = candidates.where(keep)
    assert left.ids.tolist() == [[1, 4, -1], [-1, -1, -1], [0, 2, 3]]
    assert left.cells[1].tolist() == [0, 0, 0]
    torch.testing.assert_close(left.features[0, :2], candidates.features[0, [1, 4]])
    assert left.features[1].abs().max() == 0
    assert not left.masks[1].any()


def test_pixels_of_the_original():
    labels = torch.tensor([[[[0, 0, 1, 1], [0, 0, 1, 1]]]])
    candidates = find_candidates(labels, [16], [2], {16: torch.ones(1, 2, 2, 4)})
    (regions,) = to_regions(candidates, [(100, 400)])
    assert regions.boxes_xyxy.tolist() == [[0, 0, 200, 100], [200, 0, 400, 100]]
    assert regions.area.tolist() == [20000, 20000]
    assert regions.stride.tolist() == [16, 16]
    assert regions.k.tolist() == [2, 2]
    assert regions.boxes_xyxy.dtype == regions.features.dtype == np.float32
    assert regions.stride.dtype == np.int16


def regions_with(**changes):
    columns = {
        "boxes_xyxy": np.array([[0, 0, 2, 2]], np.float32),
        "features": np.ones((1, 3), np.float32),
        "area": np.ones(1, np.float32),
        "stride": np.ones(1, np.int16),
        "k": np.ones(1, np.int16),
        "cluster": np.zeros(1, np.int16),
        "score": np.ones(1, np.float32),
    }
    return Regions(**(columns | changes))


def test_regions_are_checked():
    assert len(regions_with()) == 1
    with pytest.raises(ValueError, match="boxes_xyxy: expected finite boxes with x1 > x0"):
        regions_with(boxes_xyxy=np.array([[0, 0, 0, 2]], np.float32))
    with pytest.raises(ValueError, match="boxes_xyxy: expected finite boxes"):
        regions_with(boxes_xyxy=np.array([[0, 0, np.nan, 2]], np.float32))
    with pytest.raises(ValueError, match="boxes_xyxy: expected float32 of shape"):
        regions_with(boxes_xyxy=np.array([[0, 0, 1, 2]], np.float64))
    with pytest.raises(ValueError, match="area: expected float32 of shape \\(1,\\), got float32 of shape \\(2,\\)"):
        regions_with(area=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="features: expected float32"):
        regions_with(features=np.ones((1, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# Connected components against scipy's, on the host and as other devices find them.


def spiral(side):
    """A one-cell path that winds to the middle: the longest component of its size."""
    grid = np.zeros((side, side), np.int64)
    y, x, dy, dx = 0, 0, 0, 1
    grid[y, x] = 1
    for _ in range(side * side):
        ny, nx = y + dy, x + dx
        ahead = (ny + dy, nx + dx)
        blocked = not (0 <= ny < side and 0 <= nx < side) or grid[ny, nx]
        if not blocked and 0 <= ahead[0] < side and 0 <= ahead[1] < side and grid[ahead]:
            blocked = True
        if blocked:
            dy, dx = dx, -dy
            ny, nx = y + dy, x + dx
            if not (0 <= ny < side and 0 <= nx < side) or grid[ny, nx]:
                break
        y, x = ny, nx
        grid[y, x] = 1
    return grid


@pytest.mark.parametrize("join", [connected_components, _components_on_device], ids=["host", "device"])
@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("shape", [(6, 3, 13, 17), (2, 1, 1, 40), (2, 2, 40, 1), (3, 1, 1, 1)])
def test_equals_scipy(join, connectivity, shape):
    labels = np.random.default_rng(connectivity).integers(0, 3, shape)
    found = join(torch.from_numpy(labels), connectivity=connectivity)
    np.testing.assert_array_equal(found.numpy(), scipy_components(labels, connectivity))


@pytest.mark.parametrize("connectivity", [4, 8])
def test_winding_region_is_one(connectivity):
    labels = torch.from_numpy(spiral(31))[None]
    for roots in (connected_components(labels, connectivity=connectivity), _components_on_device(labels, connectivity)):
        np.testing.assert_array_equal(roots.numpy(), scipy_components(labels.numpy(), connectivity))
        assert roots[0][labels[0] == 1].unique().tolist() == [0]


def test_diagonal_cells_join_with_eight_neighbours_only():
    labels = torch.eye(4, dtype=torch.int64)[None]
    assert len(connected_components(labels, connectivity=8).unique()) == 2
    assert len(connected_components(labels, connectivity=4).unique()) == 6


def test_other_connectivity_is_refused():
    with pytest.raises(ValueError, match="4 or 8, got 6"):
        connected_components(torch.zeros(1, 2, 2, dtype=torch.int64), connectivity=6)


@pytest.mark.parametrize("connectivity", [4, 8])
def test_masks_equal_scipy_on_host_and_device(connectivity):
    masks = np.random.default_rng(5).random((4, 9, 14)) > 0.5
    masks[2] = False
    masks[3, ::2] = np.arange(14) % 3 > 0  # parts that join further down
    expected, count = np.full(masks.shape, -1), 0
    for plane, mask in enumerate(masks):
        parts, own = ndimage.label(mask, ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2))
        expected[plane][mask] = parts[mask] - 1 + count
        count += own
    expected += 1
    grids = torch.from_numpy(masks)
    for found in (mask_components(grids, connectivity=connectivity), _number_on_device(grids, connectivity)):
        np.testing.assert_array_equal(found.numpy(), expected)


def test_masks_refuse_other_connectivity():
    with pytest.raises(ValueError, match="connectivity must be 4 or 8, got 6"):
        mask_components(torch.ones(1, 2, 2, dtype=torch.bool), connectivity=6)
