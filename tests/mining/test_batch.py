"""The computation on images in memory: degenerate images, batches, settings."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from simdetr.data.images import open_images
from simdetr.mining import batch
from simdetr.mining.batch import UNLIMITED, MiningConfig, cluster_maps, images_ahead, mine_batch, mine_maps, shrink
from simdetr.mining.encoders import TimmEncoder
from simdetr.mining.level_sets import LevelSets

SMALL = MiningConfig(image_size=128)


def assert_same_regions(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a.boxes_xyxy, b.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(a.features, b.features, atol=1e-4)
        np.testing.assert_array_equal(a.k, b.k)


def test_boxes_lie_on_the_image_and_are_few(drawn_scenes, encoder):
    for image, regions in zip(drawn_scenes, mine_batch(drawn_scenes, encoder, SMALL), strict=True):
        height, width = image.shape[-2:]
        assert 1 <= len(regions) <= 25
        assert regions.boxes_xyxy.min() >= 0
        assert (regions.boxes_xyxy[:, 2::2] <= width + 1e-3).all()
        assert (regions.boxes_xyxy[:, 3::2] <= height + 1e-3).all()
        assert regions.features.shape[1] == 3
        assert set(regions.stride.tolist()) <= {16, 32}


def test_a_rectangle_is_found(encoder):
    image = torch.full((3, 256, 256), 200, dtype=torch.uint8)
    image[:, 64:128, 96:224] = torch.tensor([20, 90, 10], dtype=torch.uint8)[:, None, None]
    (regions,) = mine_batch([image], encoder, MiningConfig(image_size=256))
    assert [96, 64, 224, 128] in regions.boxes_xyxy.tolist()


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("size", [(96, 128), (1, 1), (1, 2000), (3, 5)])
@pytest.mark.parametrize("level_sets", [SMALL.level_sets, None])
def test_an_image_of_one_colour_has_no_regions(level_sets, value, size, encoder):
    image = torch.full((3, *size), value, dtype=torch.uint8)
    image[0] //= 2
    (regions,) = mine_batch([image], encoder, replace(SMALL, level_sets=level_sets))
    assert len(regions) == 0
    assert regions.features.shape == (0, 3)


def test_one_colour_beside_others_takes_nothing_from_them(drawn_scenes, encoder):
    plain = torch.full_like(drawn_scenes[0], 90)
    together = mine_batch([drawn_scenes[0], plain], encoder, SMALL)
    assert_same_regions(together[:1], mine_batch(drawn_scenes[:1], encoder, SMALL))


def test_thin_image_with_content(encoder):
    image = torch.randint(0, 256, (3, 1, 2000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (regions,) = mine_batch([image], encoder, MiningConfig(image_size=448))
    assert len(regions) >= 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(drawn_scenes, encoder, batch_size):
    config = MiningConfig(image_size=128, batch_size=batch_size)
    assert_same_regions(mine_batch(drawn_scenes, encoder, config), mine_batch(drawn_scenes, encoder, SMALL))


def test_batch_size_does_not_matter_on_photographs(photographs):
    maps = TimmEncoder("resnet18", random_weights=True)(photographs[:4] / 255)
    sizes = [(448, 448)] * 4
    together = mine_maps(maps, sizes, MiningConfig())
    alone = [mine_maps({s: m[i : i + 1] for s, m in maps.items()}, sizes[:1], MiningConfig())[0] for i in range(4)]
    assert_same_regions(together, alone)
    assert len(together[0]) > 1


def test_order_of_the_images_does_not_matter(drawn_scenes, encoder):
    assert_same_regions(mine_batch(drawn_scenes[::-1], encoder, SMALL)[::-1], mine_batch(drawn_scenes, encoder, SMALL))


def test_tensor_of_equal_images_is_taken_too(drawn_scenes, encoder):
    equal = [image for image in drawn_scenes if image.shape == drawn_scenes[0].shape]
    assert_same_regions(mine_batch(torch.stack(equal), encoder, SMALL), mine_batch(equal, encoder, SMALL))


def test_every_clustering_is_a_candidate(drawn_scenes, encoder):
    candidates = cluster_maps(encoder(drawn_scenes[0][None] / 255), SMALL)
    assert candidates.strides == (32, 32, 32, 16, 16)
    assert candidates.ks == (2, 4, 8, 8, 16)
    for clustering, k in enumerate(candidates.ks):
        assert candidates.labels[0, clustering].max() < k


def test_nan_features_stop_with_their_level(drawn_scenes):
    def broken(images):
        return {16: torch.ones(len(images), 2, 8, 8), 32: torch.full((len(images), 2, 4, 4), torch.nan)}

    with pytest.raises(FloatingPointError, match="stride 32 has NaN or infinity"):
        mine_batch(drawn_scenes[:1], broken, SMALL)


def test_unknown_stride_is_named(drawn_scenes, encoder):
    with pytest.raises(ValueError, match=r"expected strides out of \[16, 32\], which the encoder has, got \[8\]"):
        mine_batch(drawn_scenes[:1], encoder, MiningConfig(image_size=128, clusters={8: [2]}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 100}, "image_size must be a multiple of 32, got 100; try 96"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"clusters": {}}, "clusters must name numbers of clusters"),
        ({"clusters": {16: []}}, "clusters must name numbers of clusters"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        MiningConfig(**change)


def test_settings_come_from_yaml():
    parser = ArgumentParser()
    parser.add_class_arguments(MiningConfig, "mining")
    text = "mining: {image_size: 224, clusters: {32: [2], 16: [8]}, filters: {keep_most_diverse: 10}}"
    built = MiningConfig(**vars(parser.instantiate(parser.parse_string(text)).mining))
    assert built == MiningConfig(image_size=224, clusters={32: [2], 16: [8]}, filters={"keep_most_diverse": 10})


def test_most_boxes_are_those_of_the_settings_in_use():
    assert MiningConfig().most_boxes == 25
    assert MiningConfig(level_sets=LevelSets(max_boxes=100)).most_boxes == 100
    assert MiningConfig(level_sets=None, filters={"keep_most_diverse": 7}).most_boxes == 7
    assert MiningConfig(level_sets=None, filters={"drop_duplicate_boxes": 0.9}).most_boxes == UNLIMITED


def test_strides_of_the_ranking_that_the_encoder_lacks_are_named(encoder):
    config = replace(SMALL, level_sets=LevelSets(distance_powers={8: 1.0}))
    with pytest.raises(ValueError, match=r"distance_powers, angle_powers: expected strides out of \[16, 32\].*\[8\]"):
        mine_batch([torch.zeros(3, 64, 64, dtype=torch.uint8)], encoder, config)


# ----------------------------------------------------------------------------------------------------------------------
# Loading ahead in threads: order, sizes, unreadable files, a bounded number ahead.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (320, 448)),
        ((640, 480), (448, 320)),
        ((448, 448), (448, 448)),
        ((1, 1), (448, 448)),
        ((1, 2000), (32, 448)),
        ((90, 100), (416, 448)),
    ],
)
def test_long_side_is_given_and_short_side_a_multiple_of_32(size, expected):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shrunk = shrink(image, 448)
    assert shrunk.shape == (3, *expected)
    assert shrunk.dtype == torch.uint8


def test_shrinking_keeps_a_flat_colour():
    image = torch.tensor([0, 127, 255], dtype=torch.uint8)[:, None, None].expand(3, 100, 77)
    assert shrink(image, 64).flatten(1).unique(dim=1).tolist() == [[0], [127], [255]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_come_in_order(image_folder, workers):
    source = open_images(image_folder)
    with images_ahead(source, [3, 1, 12, 1], 64, workers, ahead=2) as loading:
        found = list(loading)
    assert [image.image_id for image in found] == ["03.png", "01.png", "12.png", "01.png"]
    assert [image.size_hw for image in found] == [(128, 96), (128, 96), (96, 128), (128, 96)]


def test_unreadable_file_gives_its_reason(image_folder):
    (image_folder / "03.png").write_bytes(b"")
    with images_ahead(open_images(image_folder), [3, 4], 64, 1, ahead=2) as loading:
        bad, good = loading
    assert bad.pixels is None
    assert bad.reason == "empty file"
    assert good.pixels is not None


def test_few_images_are_held_ahead(image_folder, monkeypatch):
    started = []
    lock = threading.Lock()
    load = batch.load_image

    def counted(record, image_size):
        with lock:
            started.append(record.id)
        return load(record, image_size)

    monkeypatch.setattr(batch, "load_image", counted)
    with images_ahead(open_images(image_folder), range(14), 64, 2, ahead=3) as loading:
        next(loading)
    assert len(started) <= 4
