"""Vectors of masks against scipy, against shapes of known area and against torchvision's own crops (T21)."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torchvision.ops import roi_align

from simdetr.detectors import mask_vectors
from simdetr.detectors.mask_vectors import (
    CROP_PX,
    crop_masks,
    decode_crops,
    decode_masks,
    encode_crops,
    zigzag,
)


def encode_masks(masks, boxes, coefficients=256):
    return encode_crops(crop_masks(masks, boxes), coefficients)


def overlap(one, two):
    return float((one & two).sum() / (one | two).sum())


def coordinates(height=240, width=320):
    return np.indices((height, width)) + 0.5


def disc(x, y, radius):
    rows, columns = coordinates()
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def shapes():
    """Masks [N, 240, 320] and their boxes: two discs, a turned rectangle, a triangle, a rectangle."""
    rows, columns = coordinates()
    along, across = (columns - 150) + (rows - 120), (columns - 150) - (rows - 120)
    turned = (np.abs(along) <= 110) & (np.abs(across) <= 50)
    triangle = (rows >= 30) & (rows <= 200) & (np.abs(columns - 160) <= (rows - 30) * 0.6)
    rectangle = (columns > 40) & (columns < 260) & (rows > 100) & (rows < 140)
    masks = np.stack([disc(100, 90, 60), disc(200, 150, 20), turned, triangle, rectangle])
    boxes = []
    for mask in masks:
        y, x = np.nonzero(mask)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return torch.from_numpy(masks), torch.tensor(boxes, dtype=torch.float32)


def test_zigzag_is_jpegs_and_meets_every_place_once():
    assert zigzag(128)[:10].tolist() == [0, 1, 128, 256, 129, 2, 3, 130, 257, 384]
    assert sorted(zigzag(128).tolist()) == list(range(128 * 128))
    # the table of the JPEG standard (ITU-T T.81, figure 5), by its first rows and its end
    order = torch.empty(64, dtype=torch.int64)
    order[zigzag(8)] = torch.arange(64)
    assert order.view(8, 8)[0].tolist() == [0, 1, 5, 6, 14, 15, 27, 28]
    assert order.view(8, 8)[1].tolist() == [2, 4, 7, 13, 16, 26, 29, 42]
    assert order.view(8, 8)[7].tolist() == [35, 36, 48, 49, 57, 58, 62, 63]


def test_coefficients_are_scipys():
    crops = torch.rand(3, CROP_PX, CROP_PX, generator=torch.Generator().manual_seed(0)) > 0.5
    expected = np.stack([dctn(crop, norm="ortho") for crop in crops.double().numpy()])
    everything = encode_crops(crops, CROP_PX**2)
    found = np.empty((3, CROP_PX**2))
    found[:, zigzag(CROP_PX)] = everything
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)  # of up to 64: 1.5e-6 of it
    assert np.abs(found.reshape(expected.shape) - expected).max() / np.abs(expected).max() < 1e-5
    assert torch.equal(encode_crops(crops), everything[:, :256])
    assert torch.equal(decode_crops(everything), crops)  # nothing is lost with all of them


def test_shapes_survive_their_vectors():
    masks, boxes = shapes()
    vectors = encode_masks(masks, boxes)
    assert vectors.shape == (5, 256) and vectors.dtype == torch.float32
    decoded = decode_masks(vectors, boxes, (240, 320))
    assert decoded.dtype == torch.bool and decoded.shape == masks.shape
    assert min(overlap(one, two) for one, two in zip(decoded, masks, strict=True)) >= 0.97


def test_an_object_that_fills_its_box_and_one_that_is_hidden():
    masks = torch.zeros(3, 60, 80, dtype=torch.bool)
    masks[0] = True
    masks[1, 10:50, 20:30] = True
    boxes = torch.tensor([[0.0, 0, 80, 60], [20, 10, 30, 50], [5, 5, 40, 40]])
    vectors = encode_masks(masks, boxes)
    assert torch.equal(decode_masks(vectors, boxes, (60, 80)), masks)
    noise = 0.3 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))  # as a detector would err
    crops = decode_crops(vectors + noise)
    assert crops[:2].float().mean() > 0.99 and crops[2].float().mean() < 0.01


def test_timid_coefficients_keep_the_shape():
    masks, boxes = shapes()
    vectors = encode_masks(masks, boxes)
    assert torch.equal(decode_crops(0.6 * vectors), decode_crops(vectors))


def test_crops_are_those_of_roi_align_whatever_is_done_at_once(monkeypatch):
    masks, boxes = shapes()
    regions = [box[None] + 0.3 for box in boxes]
    covered = roi_align(masks[:, None].double(), [box.double() for box in regions], 128, 1.0, 0, True)
    unsure = (covered[:, 0] - 0.5).abs() < 1e-4
    expected = covered[:, 0] >= 0.5
    found = crop_masks(masks, boxes + 0.3)
    assert found.dtype == torch.bool and torch.equal(found[~unsure], expected[~unsure])
    vectors, decoded = encode_masks(masks, boxes), decode_masks(encode_masks(masks, boxes), boxes, (240, 320))
    monkeypatch.setattr(mask_vectors, "_PIXELS_AT_ONCE", 2 * 240 * 320)
    torch.testing.assert_close(encode_masks(masks.to(torch.uint8), boxes), vectors)
    assert torch.equal(decode_masks(vectors, boxes, (240, 320)), decoded)


def test_masks_lie_in_their_boxes():
    vectors = encode_crops(torch.ones(3, CROP_PX, CROP_PX))
    boxes = torch.tensor([[10.0, 20, 30, 25], [-8, -4, 6, 3], [40, 10, 40, 30]])  # the second leaves the image
    decoded = decode_masks(vectors, boxes, (32, 48))
    expected = torch.zeros(2, 32, 48, dtype=torch.bool)
    expected[0, 20:25, 10:30] = True
    expected[1, :3, :6] = True
    assert torch.equal(decoded[:2], expected)
    assert not decoded[2].any()  # a box without width


def test_no_masks_and_half_precision():
    nothing = torch.zeros(0, 4)
    assert encode_masks(torch.zeros(0, 10, 12, dtype=torch.bool), nothing).shape == (0, 256)
    assert decode_masks(torch.zeros(0, 256), nothing, (10, 12)).shape == (0, 10, 12)
    masks, boxes = shapes()
    exact = encode_masks(masks, boxes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encode_masks(masks, boxes), exact)
        assert torch.equal(decode_masks(exact, boxes, (240, 320)), decode_masks(exact, boxes, (240, 320)))
    rounded = decode_masks(exact.bfloat16(), boxes.bfloat16(), (240, 320))
    assert min(overlap(one, two) for one, two in zip(rounded, masks, strict=True)) >= 0.95


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu():
    masks, boxes = shapes()
    vectors = encode_masks(masks.cuda(), boxes.cuda())
    torch.testing.assert_close(vectors.cpu(), encode_masks(masks, boxes), atol=0.05, rtol=0)
    decoded = decode_masks(vectors, boxes.cuda(), (240, 320)).cpu()
    assert min(overlap(one, two) for one, two in zip(decoded, masks, strict=True)) >= 0.97
