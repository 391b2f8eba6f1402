"""Level sets of clusters against hand-made images, scipy and a loop over every shape."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import norm

from simdetr.mining.level_sets import SMOOTHING, LevelSets, _erode, colours, edge_strength, find_shapes, memberships


def scene(boxes, size=(64, 96), seed=0):
    """Grey noise with one red rectangle per box, float [1, 3, H, W], and its clusters on 16 px cells."""
    image = torch.full((1, 3, *size), 0.5) + 0.01 * torch.randn(
        1, 3, *size, generator=torch.Generator().manual_seed(seed)
    )
    inside = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        inside[y0:y1, x0:x1] = True
    image[:, 0][:, inside] += 0.4
    image[:, 1:][:, :, inside] -= 0.3
    cells = inside.float().unfold(0, 16, 16).unfold(1, 16, 16).mean(dim=(2, 3))
    return image.clamp(0, 1), (cells > 0.4).long()[None]


def boxes_of(shapes, cell_px):
    return (shapes.boxes * cell_px).tolist()


def test_a_rectangle_is_found_to_the_cell_although_the_grid_is_coarser():
    image, labels = scene([(20, 12, 60, 44)])
    shapes = find_shapes(image, {(16, 2): labels}, LevelSets(erosion=0, levels=(0.5,)))
    red = shapes.cluster == 1
    assert boxes_of(shapes, 4)[int(red.nonzero()[0, 0])] == [20, 12, 60, 44]
    assert shapes.count[red].tolist() == [10 * 8]


def test_erosion_parts_shapes_that_touch_and_grows_their_boxes_back():
    image, labels = scene([(8, 8, 40, 40), (40, 20, 52, 28), (52, 8, 88, 40)])
    settings = LevelSets(erosion=2, levels=(0.5,))
    shapes = find_shapes(image, {(16, 2): labels}, settings)
    found = [box for box, cluster in zip(boxes_of(shapes, 4), shapes.cluster.tolist(), strict=True) if cluster == 1]
    assert [8, 8, 88, 40] in found
    assert [8, 8, 40, 40] in found
    assert [52, 8, 88, 40] in found


def test_memberships_are_the_posterior_of_normal_distributions():
    generator = torch.Generator().manual_seed(1)
    colour = torch.randn(2, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    found = memberships(colour, labels, 4)
    assert torch.equal(found[:, 3], torch.zeros(2, 8, 8))  # a cluster without cells
    values = colour[1].flatten(1).double().numpy()
    evidence = []
    for cluster in range(3):
        own = values[:, labels[1].flatten().numpy() == cluster]
        densities = norm(own.mean(axis=1)[:, None], own.std(axis=1)[:, None]).logpdf(values)
        evidence.append(densities.sum(axis=0) / SMOOTHING)
    expected = np.exp(np.array(evidence) - np.logaddexp.reduce(evidence, axis=0))
    np.testing.assert_allclose(found[1, :3].flatten(1).numpy(), expected, atol=1e-4)


def test_erosion_is_scipys_with_a_border_that_does_not_shrink():
    values = torch.rand(2, 3, 12, 17, generator=torch.Generator().manual_seed(2))
    expected = [
        [ndimage.grey_erosion(plane, size=(5, 5), mode="constant", cval=1.0) for plane in image]
        for image in values.numpy()
    ]
    np.testing.assert_array_equal(_erode(values, 2).numpy(), np.array(expected))


def test_shapes_equal_a_loop_over_components():
    coarse = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    image = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    labels = torch.randint(0, 4, (2, 4, 4), generator=torch.Generator().manual_seed(4))
    settings = LevelSets(levels=(0.3, 0.6), erosion=1, min_cells=3)
    shapes = find_shapes(image, {(16, 4): labels}, settings)
    colour = colours(image, 4)
    probability = memberships(colour, labels, 4)
    edges = edge_strength(colour).numpy()
    rows = []
    for b in range(2):
        for cluster in range(4):
            for grown, values in ((0, probability), (1, _erode(probability, 1))):
                for level in settings.levels:
                    mask = (values[b, cluster] > level).numpy()
                    contour = mask & ~ndimage.binary_erosion(mask, border_value=1)
                    parts, count = ndimage.label(mask)
                    for part in range(1, count + 1):
                        inside = parts == part
                        if inside.sum() < 3:
                            continue
                        y, x = inside.nonzero()
                        box = [max(x.min() - grown, 0), max(y.min() - grown, 0)]
                        box += [min(x.max() + 1 + grown, 16), min(y.max() + 1 + grown, 16)]
                        strength = edges[b][contour & inside]
                        rows.append([b, cluster, inside.sum(), *box, strength.mean() if strength.size else 0.0])
    found = torch.cat(
        [
            torch.stack([shapes.image, shapes.cluster, shapes.count], dim=1).double(),
            shapes.boxes.double(),
            shapes.edge[:, None].double(),
        ],
        dim=1,
    )
    assert len(rows) > 20
    np.testing.assert_allclose(found.numpy(), np.array(rows, float), atol=1e-5)
    sizes = torch.bincount(shapes.shape_of, shapes.lengths.double(), minlength=len(rows) + 1).long()
    assert torch.equal(sizes[:-1], shapes.count)


def test_an_image_does_not_depend_on_its_batch():
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    labels = torch.randint(0, 4, (3, 4, 4), generator=torch.Generator().manual_seed(6))
    together = find_shapes(image, {(16, 4): labels}, LevelSets())
    alone = find_shapes(image[1:2], {(16, 4): labels[1:2]}, LevelSets())
    own = together.image == 1
    torch.testing.assert_close(together.boxes[own], alone.boxes)
    torch.testing.assert_close(together.edge[own], alone.edge)


def test_a_flat_image_is_one_shape_per_level():
    shapes = find_shapes(torch.full((1, 3, 64, 64), 0.3), {(16, 2): torch.zeros(1, 4, 4).long()}, LevelSets())
    assert shapes.boxes.unique(dim=0).tolist() == [[0, 0, 16, 16]]
    assert torch.equal(shapes.edge, torch.zeros(len(shapes.edge)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell_px": 3}, "cell_px: expected 1, 2, 4, 8 or 16, got 3"),
        ({"levels": (0.5, 1.0)}, "levels: expected probabilities between 0 and 1"),
        ({"levels": ()}, "levels: expected probabilities"),
        ({"max_boxes": 0}, "expected at least 0, 1, 1 and 1"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LevelSets(**change)
