"""Score maps and their boxes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simdetr.heads.score_maps import chosen_classes, class_activation, score_map_boxes, stretched, upsampled_map


def random_maps(batch=2, size=(4, 6), seed=0):
    return torch.rand(batch, *size, generator=torch.Generator().manual_seed(seed))


def test_upsampling_is_bicubic_and_stretched():
    maps = random_maps()
    found = upsampled_map(maps, torch.zeros_like(maps, dtype=torch.bool), 24)
    bicubic = F.interpolate(maps[:, None], (24, 24), mode="bicubic")[:, 0]
    low, high = bicubic.amin((1, 2), keepdim=True), bicubic.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found, (bicubic - low) / (high - low))
    assert found.amin() == 0 and found.amax() == 1


def test_the_map_covers_the_valid_image_alone():
    maps = random_maps(1)
    alone = upsampled_map(maps, torch.zeros_like(maps, dtype=torch.bool), 16)
    padded = F.pad(maps, (0, 2, 0, 3), value=1e4)
    found = upsampled_map(padded, F.pad(torch.zeros_like(maps, dtype=torch.bool), (0, 2, 0, 3), value=True), 16)
    torch.testing.assert_close(found, alone, rtol=0, atol=0)


def test_a_constant_map_is_zero_and_its_box_has_no_area():
    flat = torch.full((1, 3, 3), 0.7)
    found = upsampled_map(flat, torch.zeros_like(flat, dtype=torch.bool), 8)
    assert not found.any() and score_map_boxes(found, 0.2).tolist() == [[0, 0, 0, 0]]


def test_boxes_are_tight_around_the_largest_part():
    maps = torch.zeros(2, 10, 10)
    maps[0, 2:5, 1:9] = 0.5
    maps[0, 3, 4] = 1.0
    maps[0, 8:, 8:] = 0.9
    maps[0, 6, 6] = 0.15
    maps[1, :5, 5:] = 1.0
    boxes = score_map_boxes(maps, 0.2)
    torch.testing.assert_close(boxes, torch.tensor([[0.5, 0.35, 0.8, 0.3], [0.75, 0.25, 0.5, 0.5]]))
    torch.testing.assert_close(score_map_boxes(maps, 0.6)[0], torch.tensor([0.9, 0.9, 0.2, 0.2]))


def test_class_activation_is_the_weighted_sum_of_channels():
    features, weights = random_maps(2, (3, 4, 5)), random_maps(2, (3,))[:, :]
    expected = (features * weights[:, :, None, None]).sum(dim=1)
    torch.testing.assert_close(class_activation(features, weights), expected)


def test_stretched_twice_is_stretched_once():
    once = stretched(3 * random_maps() - 2)
    assert (once.amin(), once.amax()) == (0, 1)
    assert torch.equal(stretched(once), once)


def test_classes_are_predicted_or_given():
    logits = torch.tensor([[0.1, 0.3], [2.0, -1.0]])
    assert chosen_classes(logits, None).tolist() == [1, 0]
    assert chosen_classes(logits, torch.tensor([0, 0])).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"labels: expected one per image \[2\], got \[1\]"):
        chosen_classes(logits, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels: expected 0 to 1, got 2"):
        chosen_classes(logits, torch.tensor([0, 2]))
