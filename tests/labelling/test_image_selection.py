"""Orders against hand-computed ones, brute force, and what must not change them."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import special_ortho_group

from simdetr.labelling.image_selection import (
    STRATEGIES,
    Pool,
    SelectionSettings,
    box_shares,
    entropy,
    image_uncertainty,
    image_vectors,
    k_center,
    label_conflicts,
    order_images,
)


@pytest.fixture
def pool_of(make_labels):
    """A pool from {image id: vector}, without boxes unless given."""

    def make(vectors, boxes=None, **options):
        labels = make_labels({image_id: (boxes or {}).get(image_id, []) for image_id in vectors}, (1, 2))
        rows = np.array([np.atleast_1d(vector) for vector in vectors.values()], np.float32)
        return Pool(labels, rows.reshape(len(vectors), -1), **options)

    return make


def on_a_line(*places):
    return {str(place): float(place) for place in places}


def test_two_clusters_on_a_line(pool_of):
    settings = SelectionSettings(clusters=2)
    order = order_images(pool_of(on_a_line(11, 10, 1, 0)), "cluster", settings)
    assert order.image_ids == ("0", "1", "10", "11")  # all at .5, so by id, not by place in the pool
    assert order.priorities.tolist() == [-0.5] * 4
    first = order_images(pool_of({**on_a_line(0, 1, 10, 11), "x": 0.5}), "cluster", settings)
    assert first.image_ids[0] == "x"
    assert first.priorities[0] == 0
    assert first.reasons[0] == "0 from the centre of cluster 1 of 2, which has 3 images"


def blobs(rng, *counts, dims=3, spread=0.1):
    centres = np.eye(dims) * 10
    return {
        f"{blob}-{index:03d}": centres[blob] + spread * rng.normal(size=dims)
        for blob, count in enumerate(counts)
        for index in range(count)
    }


@pytest.mark.parametrize("strategy", ["cluster", "interleave", "k_center"])
def test_rotation_and_translation_change_nothing(pool_of, strategy):
    rng = np.random.default_rng(0)
    vectors = {str(i): rng.normal(size=4) for i in range(60)}
    turn, shift = special_ortho_group.rvs(4, random_state=1), rng.normal(size=4)
    moved = {image_id: turn @ vector + shift for image_id, vector in vectors.items()}
    settings = SelectionSettings(clusters=5, budget=60)
    before, after = (order_images(pool_of(given), strategy, settings) for given in (vectors, moved))
    assert before.image_ids == after.image_ids
    np.testing.assert_allclose(before.priorities, after.priorities, atol=1e-5)


def test_interleave_shows_every_blob_within_three_picks(pool_of):
    pool = pool_of(blobs(np.random.default_rng(2), 100, 10, 1))
    settings = SelectionSettings(clusters=3)
    order = order_images(pool, "interleave", settings)
    assert [image_id[0] for image_id in order.image_ids[:5]] == ["0", "1", "2", "0", "1"]
    assert order.reasons[1].startswith("turn 1: ")
    assert "cluster 2 of 3, which has 10 images" in order.reasons[1]
    near = order_images(pool, "cluster", settings)
    alone = [image_id for image_id in near.image_ids if image_id.startswith("0")]
    assert [image_id for image_id in order.image_ids if image_id.startswith("0")] == alone
    assert near.image_ids[0] == "2-000"  # alone, it is its own centre
    assert sorted(order.image_ids) == sorted(pool.labels.image_ids)


def test_size_decides_between_equal_distances(pool_of):
    small, large = [(0, 0, 64, 64, 0)], [(0, 0, 320, 320, 0)]
    pool = pool_of(on_a_line(0, 1, 10, 11), {"0": small, "11": large})
    order = order_images(pool, "cluster_size", SelectionSettings(clusters=2))
    assert order.image_ids == ("11", "0", "1", "10")
    nearer = pool_of({**on_a_line(0, 1, 10, 11), "x": 0.5}, {"11": large})
    assert order_images(nearer, "cluster_size", SelectionSettings(clusters=2)).image_ids[:2] == ("x", "11")


def test_sizes_of_boxes_by_hand(make_labels):
    labels = make_labels({"a": [(0, 0, 320, 320, 0), (0, 0, 64, 64, 0)], "b": [(-320, 0, 320, 640, 0)], "c": []})
    np.testing.assert_allclose(box_shares(labels, "mean"), [0.13, 0.5, 0])  # b is cut to the image
    np.testing.assert_allclose(box_shares(labels, "max"), [0.25, 0.5, 0])
    np.testing.assert_allclose(box_shares(labels, "sum"), [0.26, 0.5, 0])
    order = order_images(Pool(labels), "box_size", SelectionSettings(size="max"))
    assert order.image_ids == ("b", "a", "c")
    assert order.reasons[1] == "the largest box takes 25.00% of the image"
    assert order.flags == (frozenset(), frozenset(), frozenset({"no_box"}))


def test_entropies_by_hand():
    np.testing.assert_allclose(entropy([[0.5], [0.9], [0.99], [0.0]]), [0.693147, 0.325083, 0.056002, 0], atol=5e-7)
    np.testing.assert_allclose(entropy([[0.5, 0.9]]), [0.693147 + 0.325083], atol=1e-6)
    np.testing.assert_allclose(entropy(np.full((1, 3), 1 / 3), "softmax"), [1.098612], atol=5e-7)
    np.testing.assert_allclose(entropy([[1.0, 0, 0]], "softmax"), [0])


def test_uncertainty_of_images(make_labels):
    boxes = {
        "a": [(0, 0, 1, 1, 0, score) for score in (0.9, 0.04, 0.5, 0.3)],
        "b": [(0, 0, 1, 1, 0, 0.05)],
        "c": [(0, 0, 1, 1, 0, 0.8)],
    }
    pool = Pool(make_labels(boxes), entropies=np.array([0.2, 9.0, 0.6, 1.0, 5.0, 0.3]))
    by = {"top": [0.4, 0, 0.3], "mean": [0.6, 0, 0.3], "max": [1, 0, 0.3], "sum": [1.8, 0, 0.3]}
    for aggregate, expected in by.items():
        values, counts = image_uncertainty(pool, SelectionSettings(aggregate=aggregate, top=2))
        np.testing.assert_allclose(values, expected)
        assert counts.tolist() == [2 if aggregate == "top" else 3, 0, 1]
    order = order_images(pool, "entropy", SelectionSettings(top=2))
    assert order.image_ids == ("a", "c", "b")
    assert order.reasons[0] == "uncertain: mean entropy 0.400 of 2 boxes"
    assert order.reasons[2] == "no box above score 0.05 to be uncertain of"


def test_k_center_by_hand(pool_of):
    order = order_images(pool_of(on_a_line(0, 1, 10, 11), labelled={"0"}), "k_center")
    assert order.image_ids == ("11", "1", "10")
    assert order.priorities.tolist() == [11, 1, 1]
    assert order_images(pool_of(on_a_line(0, 1, 10, 11)), "k_center").image_ids == ("0", "11", "1", "10")


def test_k_center_goes_on_by_distance_beyond_the_budget(pool_of):
    pool = pool_of(on_a_line(0, 1, 2, 3, 10), labelled={"0"})
    order = order_images(pool, "k_center", SelectionSettings(budget=1))
    assert order.image_ids == ("10", "3", "2", "1")
    assert order.priorities.tolist() == [10, 3, 2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_k_center_covers_within_twice_the_optimum(pool_of, seed):
    points = np.random.default_rng(seed).normal(size=(10, 2)).astype(np.float32)
    pool = pool_of({f"{i}": point for i, point in enumerate(points)})
    picks = [int(i) for i in order_images(pool, "k_center", SelectionSettings(budget=3)).image_ids[:3]]

    def radius(centres):
        return np.linalg.norm(points[:, None] - points[list(centres)][None], axis=2).min(axis=1).max()

    best = min(radius(centres) for centres in itertools.combinations(range(10), 3))
    assert best <= radius(picks) <= 2 * best


def test_k_center_equals_a_plain_greedy_search(pool_of):
    rng = np.random.default_rng(5)
    points = rng.normal(size=(40, 3)).astype(np.float32)
    pool = pool_of({f"{i:02d}": point for i, point in enumerate(points)}, labelled={"00", "01", "02"})
    covered, expected = [0, 1, 2], []
    while len(covered) < 40:
        distances = np.linalg.norm(points[:, None] - points[covered][None], axis=2).min(axis=1)
        covered.append(int(distances.argmax()))
        expected.append(f"{covered[-1]:02d}")
    assert order_images(pool, "k_center", SelectionSettings(budget=100)).image_ids == tuple(expected)


def test_k_center_takes_no_square_of_memory(pool_of):
    points = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    pool = pool_of({f"{i}": point for i, point in enumerate(points)}, labelled={"0", "1"})
    candidates = pool.candidates()
    tracemalloc.start()
    k_center(pool, candidates, SelectionSettings())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 1000  # a kilobyte per image; all pairs would be 3.2 GB


def test_mixed_spreads_over_the_most_uncertain(make_labels):
    places = [0, 1, 2, 3, 4, 5, 6, 7, 50, 60]  # the last two are far off, but certain
    labels = make_labels({f"{i}": [(0, 0, 1, 1, 0, 0.5)] for i in range(10)})
    uncertain = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.69, 0.68, 0.67, 0.1, 0.2])
    pool = Pool(labels, np.array(places, np.float32)[:, None], uncertain, labelled={"0"})
    order = order_images(pool, settings=SelectionSettings(budget=1))
    assert order.strategy == "mixed"
    # kept are 1, 2, 5, 6; of these 6 is the farthest from 0; the others by uncertainty
    assert order.image_ids == ("6", "1", "2", "5", "7", "3", "4", "9", "8")
    assert order.reasons[0] == (
        "uncertain: mean entropy 0.680 of 1 box; 6 from the nearest image that is labelled or chosen before"
    )


def test_the_first_round_interleaves(pool_of):
    assert order_images(pool_of(on_a_line(0, 1))).strategy == "interleave"


def test_random_orders_follow_the_seed_alone(pool_of):
    pool, turned = pool_of(on_a_line(*range(30))), pool_of(on_a_line(*reversed(range(30))))
    orders = [order_images(pool, "random", SelectionSettings(seed=seed)).image_ids for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert order_images(turned, "random").image_ids == orders[0]
    first = [order_images(pool, "random", SelectionSettings(seed=seed)).image_ids[0] for seed in range(200)]
    assert len(set(first)) > 25


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_order_is_a_permutation_with_falling_priorities(make_labels, strategy):
    rng = np.random.default_rng(7)
    ids = [f"image {i}" for i in rng.permutation(50)]
    boxes = {
        image_id: [(0, 0, 64 * (1 + i % 5), 64, 0, rng.random()) for _ in range(i % 4)]
        for i, image_id in enumerate(ids)
    }
    labels = make_labels(boxes)
    vectors = rng.normal(size=(50, 3)).astype(np.float32)
    vectors[:10] = vectors[10]  # duplicates
    vectors[20] = np.nan
    pool = Pool(labels, vectors, rng.random(len(labels.scores)), labelled=ids[40:], unreadable={ids[30], "lost"})
    order = order_images(pool, strategy)
    assert sorted(order.image_ids) == sorted(set(ids[:40]) - {ids[30]})
    assert order.excluded == tuple(sorted((ids[30], "lost")))
    assert len(order) == len(order.reasons) == len(order.flags) == len(order.priorities) == 39
    assert np.isfinite(order.priorities).all()
    assert (np.diff(order.priorities) <= 0).all()
    flagged = {i for i, flags in zip(order.image_ids, order.flags, strict=True) if "no_feature" in flags}
    assert flagged == {ids[20]}
    if strategy not in ("box_size", "entropy", "random"):
        assert order.image_ids[-1] == ids[20]
        assert order.reasons[-1] == "no features to compare it by, so it comes last"
    turned = np.argsort(rng.random(50))
    entropies = [pool.entropies[labels.offsets[i] : labels.offsets[i + 1]] for i in turned]
    mirrored = Pool(
        labels.select([ids[i] for i in turned]),
        vectors[turned],
        np.concatenate(entropies),
        labelled=ids[40:],
        unreadable={ids[30], "lost"},
    )
    assert order_images(mirrored, strategy).image_ids == order.image_ids


def test_duplicates_stay_in_the_order_of_their_ids(pool_of):
    pool = pool_of(dict.fromkeys("cabd", (1.0, 2.0)))
    for strategy in ("cluster", "interleave", "cluster_size", "k_center"):
        assert order_images(pool, strategy).image_ids == tuple("abcd")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_pool_has_an_empty_order(make_labels, strategy):
    order = order_images(Pool(make_labels({}), np.zeros((0, 3), np.float32), np.zeros(0)), strategy)
    assert (len(order), order.reasons, order.priorities.shape) == (0, (), (0,))
    seen = Pool(make_labels({"a": []}), np.zeros((1, 3), np.float32), np.zeros(0), labelled={"a"})
    assert len(order_images(seen, strategy)) == 0


def test_one_image_without_features(pool_of):
    order = order_images(pool_of({"a": math.nan}), "interleave")
    assert (order.image_ids, order.flags) == (("a",), (frozenset({"no_feature", "no_box"}),))


def test_centres_of_labelled_images_alone(pool_of):
    pool = pool_of(on_a_line(0, 1, 5, 10, 100), labelled={"0", "100"})
    settings = SelectionSettings(clusters=2, centres_from="labelled")
    order = order_images(pool, "cluster", settings)
    assert order.image_ids == ("1", "5", "10")
    assert order.priorities.tolist() == [-1, -5, -10]
    with pytest.raises(ValueError, match="centres_from: no labelled image has features; use 'pool'"):
        order_images(pool_of(on_a_line(0, 1)), "cluster", settings)


def test_more_clusters_than_images(pool_of, caplog):
    order = order_images(pool_of(on_a_line(0, 1, 2)), "cluster", SelectionSettings(clusters=9))
    assert "clusters: 9 were asked for, but there are 3 images; it is 3" in caplog.text
    assert order.priorities.tolist() == [0, 0, 0]


def test_number_of_clusters_follows_the_pool(pool_of):
    vectors = {f"{i:03d}": vector for i, vector in enumerate(np.random.default_rng(0).normal(size=(128, 2)))}
    assert "of 8, which" in order_images(pool_of(vectors), "cluster").reasons[0]


def test_conflicts_are_shown_again(pool_of):
    pool = pool_of(on_a_line(0, 1, 2), labelled={"0", "1"}, conflicts={"1"})
    order = order_images(pool, "random")
    assert set(order.image_ids) == {"1", "2"}
    assert dict(zip(order.image_ids, order.flags, strict=True))["1"] == {"conflict", "no_box"}


def test_what_counts_as_a_conflict(make_labels):
    truth = {image_id: [(0, 0, 100, 100, 0)] for image_id in "abcdef"}
    inspected = make_labels(truth, (7, 8))
    found = make_labels(
        {
            "a": [(0, 0, 100, 90, 0)],  # another class: 7 is the second one here
            "b": [(0, 0, 100, 90, 1)],
            "c": [(0, 0, 100, 50, 0)],  # exactly half
            "d": [],
            "e": [(0, 0, 100, 50.01, 0)],
        },
        (8, 7),
    )
    assert label_conflicts(inspected, found) == ("a", "e")
    crowd = make_labels(truth, (7, 8), crowd=[True] * 6)
    assert label_conflicts(crowd, found) == ()


def test_vectors_of_images_by_hand():
    features = [(1, 0), (0, 1), (3, 4), (1, 0), (-1, 0), (np.nan, 0)]
    scores = [0.75, 0.25, 0, 0.5, 0.5, 1]
    vectors = image_vectors(features, scores, [0, 2, 3, 3, 5, 6], np.array([(0, 0), (0, 0), (0, 2), (1, 1), (0, 0)]))
    assert vectors.dtype == np.float32
    expected = [(3 / 10**0.5, 1 / 10**0.5), (0.6, 0.8), (0, 1), (np.nan, np.nan), (np.nan, np.nan)]
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    assert np.isnan(image_vectors(features[:1], scores[:1], [0, 1, 1])[1]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0], [0, 1]), r"features: expected \[M, d\] with scores \[M\], got \[1\] and \[1\]"),
        (([[1.0]], [-1.0], [0, 1]), r"scores: expected finite and >= 0, got -1.0 at \[0\]"),
        (([[1.0]], [np.inf], [0, 1]), r"scores: expected finite and >= 0, got inf at \[0\]"),
        (([[1.0]], [1.0], [0, 2]), "offsets: expected to rise from 0 to 1, the number of boxes"),
        (([[1.0]], [1.0], [0, 1], [[1.0, 1.0]]), r"whole_images: expected \[1, 1\], got \[1, 2\]"),
    ],
)
def test_vectors_of_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_vectors(*arguments)


@pytest.mark.parametrize(
    ("probabilities", "outputs", "message"),
    [
        ([0.5], "sigmoid", r"probabilities: expected \[M, C\], got \[1\]"),
        ([[0.5, 1.5]], "sigmoid", r"expected 0 to 1, got 1.5 at \[0, 1\]; apply sigmoid first"),
        ([[np.nan]], "softmax", r"expected 0 to 1, got nan at \[0, 0\]"),
        ([[0.5, 0.1]], "softmax", "expected rows that sum to 1, got 0.6; use outputs='sigmoid'"),
        ([[0.5]], "logits", "outputs: expected one of 'sigmoid', 'softmax', got 'logits'"),
    ],
)
def test_entropy_of_bad_input(probabilities, outputs, message):
    with pytest.raises(ValueError, match=message):
        entropy(probabilities, outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": np.zeros((3, 2))}, r"vectors: expected \[2, d\], a row per image of labels, got \[3, 2\]"),
        ({"entropies": [0.1, 0.2]}, r"entropies: expected \[1\], one per box of labels, got \[2\]"),
        ({"entropies": [-0.1]}, r"entropies: expected finite and >= 0, got -0.1 at \[0\]"),
        ({"labelled": {"a", "z"}}, r"labelled: 1 images are not among the 2 of the pool \(first: 'z'\)"),
        ({"conflicts": {"b"}}, "conflicts: expected labelled images, got 'b', which is not"),
    ],
)
def test_pools_of_bad_input(make_labels, options, message):
    with pytest.raises(ValueError, match=message):
        Pool(make_labels({"a": [(0, 0, 1, 1, 0)], "b": []}), **options)


def test_orders_that_lack_what_they_go_by(make_labels):
    pool = Pool(make_labels({"a": []}))
    for strategy in ("cluster", "interleave", "cluster_size", "k_center"):
        with pytest.raises(ValueError, match=r"vectors: this order compares features of images; give image_vectors"):
            order_images(pool, strategy)
    for strategy in ("entropy", "mixed"):
        with pytest.raises(ValueError, match=r"entropies: this order goes by uncertainty; give entropy"):
            order_images(pool, strategy)
    with pytest.raises(ValueError, match=r"strategy: expected one of 'interleave', 'cluster', .*, got 'best'"):
        order_images(pool, "best")
