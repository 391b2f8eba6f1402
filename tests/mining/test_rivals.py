"""LOST, TokenCut and MaskCut on maps whose objects are known, and their eigenvectors against scipy's."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
from scipy import ndimage

from simdetr.data.images import open_images
from simdetr.data.quarantine import TooManyUnreadableError
from simdetr.mining import rivals
from simdetr.mining.batch import MiningConfig, encode, load_image, shrink
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.pseudo_labels import make_pseudo_labels
from simdetr.mining.regions import Regions, find_candidates
from simdetr.mining.rivals import (
    BASELINES,
    LARGEST_ASPECT,
    SMALLEST_SIDE,
    WEAK,
    baseline,
    lost,
    mask_cut,
    mine_rival,
    random_boxes,
    search_boxes,
    second_eigenvector,
    token_cut,
)
from simdetr.mining.store import ProposalStore, StoreError

METHODS = {"lost": lost, "token_cut": token_cut, "mask_cut": mask_cut}


def planted(height, width, *blocks, noise=0.0, seed=0):
    """A map [1 + number of blocks, H, W]: a ground and blocks (y0, x0, y1, x1), each with a channel of its own."""
    generator = torch.Generator().manual_seed(seed)
    features = noise * torch.randn(1 + len(blocks), height, width, generator=generator)
    kind = torch.zeros(height, width, dtype=torch.long)
    for number, (y0, x0, y1, x1) in enumerate(blocks, start=1):
        kind[y0:y1, x0:x1] = number
    return features + torch.nn.functional.one_hot(kind, 1 + len(blocks)).permute(2, 0, 1)


def mask_of(height, width, block):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[block[0] : block[2], block[1] : block[3]] = True
    return mask


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("block", "noise"),
    [((2, 3, 5, 7), 0), ((2, 3, 5, 7), 0.05), ((0, 0, 3, 4), 0), ((0, 0, 3, 4), 0.05), ((5, 1, 6, 2), 0)],
)
def test_the_one_planted_block_is_the_first_object(method, block, noise):
    found = method(planted(8, 10, block, noise=noise))
    assert torch.equal(found[0], mask_of(8, 10, block))


def test_two_apart_blocks_of_one_kind_are_cut_at_their_gap():
    # both are the prominent side; only the part around the most prominent cell is the object
    features = planted(9, 9, (1, 1, 4, 4))
    features[:, 6:8, 5:8] = features[:, 2, 2][:, None, None]
    blocks = [mask_of(9, 9, (1, 1, 4, 4)), mask_of(9, 9, (6, 5, 8, 8))]
    for method in (lost, token_cut):
        assert any(torch.equal(method(features)[0], block) for block in blocks)
    found = mask_cut(features)
    assert len(found) == 2
    assert {tuple(mask.nonzero()[0].tolist()) for mask in found} == {(1, 1), (6, 5)}
    assert torch.equal(found[0] | found[1], blocks[0] | blocks[1])


def test_mask_cut_finds_every_object_once_and_stops():
    blocks = [(1, 1, 4, 5), (6, 6, 10, 9), (9, 1, 11, 4)]
    found = mask_cut(planted(12, 12, *blocks), masks=6)
    assert len(found) == 3  # nothing is left to cut, though three more were allowed
    assert found.sum(dim=0).max() == 1
    for block in blocks:
        assert any(torch.equal(mask, mask_of(12, 12, block)) for mask in found)
    assert torch.equal(mask_cut(planted(12, 12, *blocks), masks=2), found[:2])


def test_without_centring_the_plain_cosine_counts():
    # two kinds of cells, 60 degrees apart: alike by plain cosine (0.5), opposite once the mean is subtracted
    ground, other = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3**0.5 / 2])
    features = ground[:, None, None].repeat(1, 8, 10)
    features[:, 2:5, 3:7] = other[:, None, None]
    block = mask_of(8, 10, (2, 3, 5, 7))
    for method in (token_cut, mask_cut):
        assert torch.equal(method(features, 0.4)[0], block)
        assert torch.equal(method(features, 0.6, centre=False)[0], block)
        assert len(method(features, 0.4, centre=False)) == 0


def test_mask_cut_does_not_take_a_side_with_corners():
    # a frame of fewer cells than what it encloses is the prominent side, but has all four corners
    features = planted(12, 12, (1, 1, 11, 11))
    frame = ~mask_of(12, 12, (1, 1, 11, 11))
    assert frame.sum() < (~frame).sum()
    assert torch.equal(token_cut(features)[0], frame)
    assert torch.equal(mask_cut(features)[0], ~frame)


def test_lost_grows_only_by_similar_cells_of_few_neighbours():
    # by hand: centred features of a row of cells; the seed is the cell with the fewest non-negative products
    cells = torch.tensor([[-3.0, 1.0], [1.0, -2.0], [1.0, 1.0], [1.0, 0.0]])
    assert cells.sum(dim=0).tolist() == [0, 0]
    features = cells.T.reshape(2, 1, 4)
    products = cells @ cells.T
    assert (products >= 0).sum(dim=1).tolist() == [1, 2, 2, 3]  # so the seed is cell 0, which is like no other
    assert lost(features).flatten().tolist() == [True, False, False, False]


def test_lost_is_limited_by_its_expansion():
    # a chain: the seed alone is unlike the last cell, with its neighbour it is alike
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 110.0, 225.0, 260.0, 300.0]))
    cells = torch.stack([angles.cos(), angles.sin()], dim=1)
    features = cells.T.reshape(2, 1, 6)
    centred = cells - cells.mean(dim=0)
    products = centred @ centred.T
    order = (products >= 0).sum(dim=1).argsort(stable=True)
    for expansion in range(1, 7):
        grown = [int(i) for i in order[:expansion] if products[order[0], i] >= 0]
        like = (products[:, grown].sum(dim=1) >= 0).tolist()
        seed = int(order[0])
        start, end = seed, seed + 1
        while start > 0 and like[start - 1]:
            start -= 1
        while end < 6 and like[end]:
            end += 1
        assert lost(features, expansion).flatten().nonzero().flatten().tolist() == list(range(start, end))


@pytest.mark.parametrize("nodes", [5, 60, 300])
@pytest.mark.parametrize("kind", ["random", "blocks"])
def test_second_eigenvector_is_scipys(nodes, kind):
    rng = np.random.default_rng(nodes)
    if kind == "random":
        weights = (rng.random((nodes, nodes)) < 0.3).astype(float)
    else:
        member = np.arange(nodes) < nodes // 3
        weights = (member[:, None] == member).astype(float)
    weights = np.maximum(np.maximum(weights, weights.T), np.eye(nodes)).clip(min=WEAK)
    degree = np.diag(weights.sum(axis=1))
    values, vectors = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[0, 1])
    value, vector = second_eigenvector(torch.from_numpy(weights))
    assert 1 - value == pytest.approx(values[1], abs=1e-6)
    found, expected = vector.numpy() / np.linalg.norm(vector), vectors[:, 1] / np.linalg.norm(vectors[:, 1])
    assert abs(found @ expected) == pytest.approx(1, abs=1e-6)


def test_token_cut_is_its_definition_on_random_features():
    """The graph, cut and side of the paper, written out with scipy."""
    features = torch.randn(6, 7, 9, generator=torch.Generator().manual_seed(4))
    cells = features.flatten(1).T.numpy()
    cells = cells - cells.mean(axis=0)
    cells /= np.linalg.norm(cells, axis=1, keepdims=True)
    weights = np.where(cells @ cells.T >= 0.2, 1, 1e-5)
    degree = np.diag(weights.sum(axis=1))
    vector = scipy.linalg.eigh(degree - weights, degree)[1][:, 1]
    peak = np.abs(vector).argmax()
    side = (vector > vector.mean()) == (vector[peak] > vector.mean())
    parts, _ = ndimage.label(side.reshape(7, 9))
    expected = parts == parts.flat[peak]
    np.testing.assert_array_equal(token_cut(features)[0].numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 28), (6, 6)])
def test_flat_maps_have_a_defined_result(shape):
    flat = torch.full((3, *shape), 0.7)
    assert lost(flat).all()  # everything is like everything
    assert token_cut(flat).shape == mask_cut(flat).shape == (0, *shape)


def test_precision_of_the_features_does_not_matter():
    features = planted(8, 10, (2, 3, 5, 7), noise=0.05)
    for method in METHODS.values():
        assert torch.equal(method(features), method(features.bfloat16()))


# ----------------------------------------------------------------------------------------------------------------------
# Rivals on images and maps with known objects: boxes, features, order, seeds, degenerate images.


OF_MASKS = ("lost", "token_cut", "mask_cut")


@pytest.fixture
def square():
    """A bright square on a dark ground, uint8 [3, 128, 192], and its box."""
    image = torch.full((3, 128, 192), 30, dtype=torch.uint8)
    image[:, 32:96, 64:112] = 220
    return image, [64, 32, 112, 96]


def found_by(method, image, encoder, size_hw=None, max_boxes=100, seed=0) -> Regions:
    maps = encode(image[None], encoder)
    return baseline(method)(image, maps, size_hw or tuple(image.shape[1:]), max_boxes, seed)


@pytest.mark.parametrize("method", OF_MASKS)
def test_box_of_an_object_in_pixels_of_the_original(method, square, encoder):
    image, box = square
    regions = found_by(method, image, encoder)
    assert regions.boxes_xyxy[0].tolist() == box
    assert regions.area[0] == 48 * 64
    assert (regions.stride[0], regions.k[0], regions.cluster[0], regions.score[0]) == (16, 0, 0, 1)
    twice = found_by(method, image, encoder, size_hw=(256, 96))  # the original was twice as high and half as wide
    assert twice.boxes_xyxy[0].tolist() == [32, 64, 56, 192]
    assert twice.area[0] == pytest.approx(48 * 64)


def test_selective_search_finds_the_object(square, encoder):
    pytest.importorskip("cv2.ximgproc")
    image, box = square
    regions = found_by("selective_search", image, encoder)
    off = np.abs(regions.boxes_xyxy - np.array(box)).max(axis=1)
    assert off.min() <= 192 / 128 * 2  # two pixels of the image of 128 x 128
    assert set(regions.stride.tolist()) == {0}


def test_selective_search_is_opencvs_order_and_has_a_seed(drawn_scenes):
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("cv2.ximgproc")
    image = drawn_scenes[0]
    boxes = search_boxes(image, 64, seed=1)
    np.testing.assert_array_equal(boxes, search_boxes(image, 64, seed=1))
    other = search_boxes(image, 64, seed=2)
    assert not np.array_equal(boxes, other)
    assert set(map(tuple, boxes)) == set(map(tuple, other))  # the seed orders, it does not choose
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    blue_first = image.permute(1, 2, 0).numpy()[:, :, ::-1]
    search.setBaseImage(cv2.resize(np.ascontiguousarray(blue_first), (64, 64), interpolation=cv2.INTER_AREA))
    search.switchToSelectiveSearchFast()
    expected = {(x / 64, y / 64, (x + w) / 64, (y + h) / 64) for x, y, w, h in search.process().tolist()}
    assert set(map(tuple, boxes)) == expected


def test_selective_search_without_opencv_names_the_extra(monkeypatch, square, encoder):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RuntimeError, match=r"cv2\.ximgproc.*simdetr\[bench\]"):
        found_by("selective_search", square[0], encoder)


def test_random_boxes_are_within_and_log_uniform(encoder):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    regions = found_by("random", image, encoder, size_hw=(100, 100), max_boxes=20000)
    sides = (regions.boxes_xyxy[:, 2:] - regions.boxes_xyxy[:, :2]) / 100
    assert regions.boxes_xyxy.min() >= 0 and regions.boxes_xyxy.max() <= 100 + 1e-4
    aspects, roots = np.log(sides[:, 0] / sides[:, 1]), np.log(np.sqrt(sides.prod(axis=1)))
    whole = sides.max(axis=1) < 0.999  # those that the image has not cut
    assert np.abs(aspects[whole]).max() <= np.log(LARGEST_ASPECT) + 1e-4
    assert roots.min() >= np.log(SMALLEST_SIDE) - 1e-3
    small = roots < np.log(0.5)  # below it the image cuts nothing, and every octave has its share
    octaves = np.histogram(roots[small], bins=np.log(2.0) * np.arange(-5, 0))[0] / small.sum()
    np.testing.assert_allclose(octaves, 0.25, atol=0.02)
    assert abs(np.median(aspects)) < 0.02


@pytest.mark.parametrize("method", BASELINES)
def test_result_depends_on_seed_and_image_only(method, drawn_scenes, encoder):
    if method == "selective_search":
        pytest.importorskip("cv2.ximgproc")
    images = [shrink(image, 128) for image in drawn_scenes[:1] + drawn_scenes[3:4]]  # of one shape
    maps = encode(torch.stack(images), encoder)
    for index, image in enumerate(images):
        own = {stride: level[index : index + 1] for stride, level in maps.items()}
        expected = baseline(method)(image, own, (96, 128), 20, 7)
        alone = found_by(method, image, encoder, (96, 128), 20, 7)
        np.testing.assert_array_equal(alone.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_allclose(alone.features, expected.features, atol=1e-5)
        if method in ("random", "selective_search"):
            other = found_by(method, image, encoder, (96, 128), 20, 8)
            assert not np.array_equal(other.boxes_xyxy, expected.boxes_xyxy)


@pytest.mark.parametrize("method", BASELINES)
def test_scores_give_the_order_and_boxes_are_limited(method, drawn_scenes, encoder):
    if method == "selective_search":
        pytest.importorskip("cv2.ximgproc")
    image = shrink(drawn_scenes[0], 128)
    many = found_by(method, image, encoder, (96, 128))
    assert (np.diff(many.score) < 0).all() and many.score[0] == 1 and many.score[-1] > 0
    few = found_by(method, image, encoder, (96, 128), max_boxes=2)
    assert len(few) == min(2, len(many))
    np.testing.assert_array_equal(few.boxes_xyxy, many.boxes_xyxy[: len(few)])


def test_features_of_a_mask_are_averaged_as_ours(square, encoder):
    """The same region as one of our candidates: the miner's own pooling must give the same feature."""
    image, _ = square
    noise = torch.randint(0, 25, image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    maps = encode((image + noise)[None], encoder)
    regions = baseline("token_cut")(image, maps, (128, 192), 5, 0)
    labels = torch.zeros(1, 1, 8, 12, dtype=torch.long)
    labels[..., 2:6, 4:7] = 1
    ours = find_candidates(labels, [16], [2], maps).features[0, 1]
    torch.testing.assert_close(torch.from_numpy(regions.features[0]), ours, atol=1e-5, rtol=1e-5)


def test_features_of_a_box_are_the_average_over_it():
    last = torch.arange(12.0).reshape(1, 1, 3, 4)
    regions = random_boxes(torch.zeros(3, 96, 128, dtype=torch.uint8), {32: last}, (96, 128), 50, 3)
    pixels = last[0, 0].repeat_interleave(320, 0).repeat_interleave(320, 1).double().numpy()  # a tenth of a pixel each
    for box, feature in zip(regions.boxes_xyxy, regions.features[:, 0], strict=True):
        x0, y0, x1, y1 = np.round(box * 10).astype(int)
        assert feature == pytest.approx(pixels[y0:y1, x0:x1].mean(), abs=0.1)
    assert np.ptp(regions.features) > 3


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("size_hw", [(1, 1), (1, 2000), (100, 100)])
@pytest.mark.parametrize("value", [0, 127])
def test_degenerate_images_have_a_defined_result(method, size_hw, value, encoder):
    if method == "selective_search":
        pytest.importorskip("cv2.ximgproc")
    image = torch.full((3, *size_hw), value, dtype=torch.uint8)
    regions = found_by(method, shrink(image, 128), encoder, size_hw, max_boxes=10)
    assert len(regions) == {"lost": 1, "token_cut": 0, "mask_cut": 0, "random": 10, "selective_search": 1}[method]
    assert regions.features.shape == (len(regions), 3) and np.isfinite(regions.features).all()
    if len(regions):
        assert (regions.boxes_xyxy[:, 2:] <= np.array(size_hw[::-1]) * (1 + 1e-6)).all()


def test_unknown_names_and_strides_are_named(encoder):
    with pytest.raises(ValueError, match=r"methods: expected some of selective_search, lost.*got 'boxes'"):
        baseline("boxes")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"stride: expected one of the encoder's, \[32\], got 16"):
        baseline("lost")(image, {32: torch.zeros(1, 2, 2, 2)}, (64, 64), 5, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Rivals to a store: the rows of the method itself, resume, refusals, unreadable images.


CONFIG = MiningConfig(image_size=128, shard_size=4, seed=5)


def contents(store):
    return [pq.read_table(path) for path in sorted(store.folder.glob("shard-*.parquet"))]


@pytest.mark.parametrize("method", ["lost", "mask_cut", "random"])
def test_rows_are_those_of_the_method(method, image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine_rival(method, source, encoder, CONFIG, tmp_path / method, max_boxes=7)
    rows = list(store.iter_rows())
    assert [row.image_id for row in rows] == list(source.ids)
    for row, record in zip(rows, source, strict=True):
        image = load_image(record, 128)
        maps = encode(image.pixels[None], encoder)
        expected = baseline(method)(image.pixels, maps, image.size_hw, 7, 5)
        np.testing.assert_array_equal(row.regions.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(row.regions.score, expected.score)
        np.testing.assert_allclose(row.regions.features, expected.features, atol=1e-3)  # fp16


def test_store_serves_the_rest_of_the_pipeline(image_folder, encoder, tmp_path):
    store = mine_rival("random", open_images(image_folder), encoder, CONFIG, tmp_path, max_boxes=5)
    labels = make_pseudo_labels(store, ClusteringConfig(num_classes=4))
    assert (len(labels), len(labels.classes), labels.num_classes) == (14, 70, 4)


def test_interrupted_run_ends_like_a_whole_one(image_folder, encoder, tmp_path, monkeypatch):
    source = open_images(image_folder)
    whole = mine_rival("random", source, encoder, CONFIG, tmp_path / "whole")
    real, calls = rivals.encode, []

    def stops(pixels, given):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(pixels, given)

    monkeypatch.setattr(rivals, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        mine_rival("random", source, encoder, CONFIG, tmp_path / "two")
    assert ProposalStore(tmp_path / "two").missing_shards() == [2, 3]
    monkeypatch.setattr(rivals, "encode", real)
    first = (tmp_path / "two/shard-00000.parquet").stat().st_mtime_ns
    assert contents(mine_rival("random", source, encoder, CONFIG, tmp_path / "two")) == contents(whole)
    assert (tmp_path / "two/shard-00000.parquet").stat().st_mtime_ns == first
    monkeypatch.setattr(rivals, "encode", lambda *_: pytest.fail("nothing is left to encode"))
    mine_rival("random", source, encoder, CONFIG, tmp_path / "two")


def test_methods_are_never_mixed(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    mine_rival("random", source, encoder, CONFIG, tmp_path, max_boxes=3)
    with pytest.raises(StoreError, match=r"config\.method is 'random' there and 'lost' now"):
        mine_rival("lost", source, encoder, CONFIG, tmp_path, max_boxes=3)
    with pytest.raises(StoreError, match=r"config\.max_boxes is 3 there and 4 now"):
        mine_rival("random", source, encoder, CONFIG, tmp_path, max_boxes=4)


def test_unreadable_images_have_no_row(image_folder, encoder, tmp_path):
    (image_folder / "05.png").write_text("no image")
    source = open_images(image_folder)
    store = mine_rival("random", source, encoder, replace(CONFIG, max_unreadable=0.1), tmp_path / "out", max_boxes=2)
    assert len(store) == 13
    assert "05.png" not in {row.image_id for row in store.iter_rows()}
    assert "05.png" in (tmp_path / "out/quarantine.csv").read_text()
    with pytest.raises(TooManyUnreadableError):
        mine_rival("random", source, encoder, replace(CONFIG, max_unreadable=0.01), tmp_path / "strict", max_boxes=2)


def test_bad_arguments_are_named(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    with pytest.raises(ValueError, match="got 'none'"):
        mine_rival("none", source, encoder, CONFIG, tmp_path / "a")
    with pytest.raises(ValueError, match="source: expected at least one image"):
        mine_rival("lost", source.subset([]), encoder, CONFIG, tmp_path / "a")
    assert not (tmp_path / "a").exists()
