"""Position encodings against scalar re-derivations (specification T17)."""

import math

import pytest
import torch

from simdetr.detectors.position_encoding import LearnedEncoding, SineEncoding, sine_box_positions, sine_cell_positions


def scalar_features(radians, count):
    values = []
    for index in range(count):
        phase = radians / 10_000 ** (2 * (index // 2) / count)
        values.append(math.sin(phase) if index % 2 == 0 else math.cos(phase))
    return values


@pytest.mark.parametrize("centred", [True, False])
def test_cells_of_a_padded_map(centred):
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[1, 3:] = True
    mask[1, :, 4:] = True
    found = sine_cell_positions(mask, 16, centred)
    assert found.shape == (2, 16, 5, 7)
    shift = 0.5 if centred else 0.0
    for image, (height, width) in enumerate([(5, 7), (3, 4)]):
        for row in range(height):
            for column in range(width):
                y = (row + 1 - shift) / (height + 1e-6) * 2 * math.pi
                x = (column + 1 - shift) / (width + 1e-6) * 2 * math.pi
                expected = torch.tensor(scalar_features(y, 8) + scalar_features(x, 8))
                torch.testing.assert_close(found[image, :, row, column], expected, rtol=0, atol=1e-6)


def test_module_is_the_centred_flavour():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(SineEncoding(8)(mask), sine_cell_positions(mask, 8, centred=True), rtol=0, atol=0)


def test_known_box():
    box = [0.3, 0.6, 0.25, 0.5]
    found = sine_box_positions(torch.tensor(box).view(1, 1, 4), 128)
    expected = [feature for value in box for feature in scalar_features(value * 2 * math.pi, 128)]
    assert found.shape == (1, 1, 512)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_learned_positions_put_columns_first():
    encoding = LearnedEncoding(6, max_cells=5)
    found = encoding(torch.zeros(2, 3, 4, dtype=torch.bool))
    assert found.shape == (2, 6, 3, 4)
    torch.testing.assert_close(found[1, :3, 2, 1], encoding.col_embed.weight[1])
    torch.testing.assert_close(found[1, 3:, 2, 1], encoding.row_embed.weight[2])
    assert 0 <= encoding.row_embed.weight.min() and encoding.row_embed.weight.max() <= 1


def test_learned_positions_have_an_end():
    with pytest.raises(ValueError, match=r"6 x 2 cells.*5 per side"):
        LearnedEncoding(4, max_cells=5)(torch.zeros(1, 6, 2, dtype=torch.bool))
