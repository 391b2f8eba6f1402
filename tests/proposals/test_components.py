"""Connected components against scipy's, on the host and as other devices find them."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from simdetr.mining.regions import _components_on_device, _number_on_device, connected_components, mask_components


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
    found = (
        join(torch.from_numpy(labels), connectivity=connectivity)
        if join is connected_components
        else join(torch.from_numpy(labels), connectivity)
    )
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
