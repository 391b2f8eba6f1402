"""Boxes of cells, worked out by hand on two levels with padding (specification T16)."""

import torch

from simdetr.detectors.deformable_transformer import cell_boxes


def test_boxes_of_two_levels_with_padding():
    first = torch.zeros(1, 4, 6, dtype=torch.bool)
    first[:, 3:] = True
    first[:, :, 5:] = True
    second = torch.zeros(1, 2, 3, dtype=torch.bool)
    logits, usable = cell_boxes([first, second])
    assert logits.shape == (1, 30, 4)
    for level, (height, width, valid_h, valid_w, start) in enumerate([(4, 6, 3, 5, 0), (2, 3, 2, 3, 24)]):
        for row in range(height):
            for column in range(width):
                index = start + row * width + column
                if row >= valid_h or column >= valid_w:
                    assert not usable[0, index]
                    assert (logits[0, index] == torch.inf).all()
                    continue
                assert usable[0, index]
                side = 0.05 * 2**level
                expected = torch.tensor([(column + 0.5) / valid_w, (row + 0.5) / valid_h, side, side])
                torch.testing.assert_close(logits[0, index].sigmoid(), expected)


def test_cells_at_the_border_may_not_propose():
    # 60 cells on a side: the first centre is 0.5 / 60 < 0.01
    _, usable = cell_boxes([torch.zeros(1, 60, 60, dtype=torch.bool)])
    grid = usable.view(60, 60)
    assert grid[1:-1, 1:-1].all()
    assert not grid[0].any() and not grid[-1].any() and not grid[:, 0].any() and not grid[:, -1].any()


def test_levels_whose_boxes_fill_the_image_may_not_propose():
    cells = torch.zeros(1, 2, 2, dtype=torch.bool)
    _, usable = cell_boxes([cells] * 6)
    # 0.05 · 2^4 = 0.8 is allowed, 0.05 · 2^5 = 1.6 is not
    assert usable.view(6, 4).all(dim=1).tolist() == [True] * 5 + [False]
