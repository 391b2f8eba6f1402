"""Every box filter by hand-drawn cases; the last one also against the rule written out as a loop."""

import numpy as np
import pytest
import torch

from simdetr.mining.filters import (
    FILTERS,
    apply_filters,
    drop_duplicate_boxes,
    drop_fragmented_clusters,
    drop_similar_subsets,
    keep_most_diverse,
    merge_similar_clusters,
)
from simdetr.mining.regions import find_candidates


def draw(*clusterings, directions=None, connectivity=4):
    """Candidates of one image from drawings of digits; ``directions`` has the feature of a cell by its first digit."""
    grids = [np.array([[int(c) for c in row] for row in rows.split()]) for rows in clusterings]
    labels = torch.from_numpy(np.stack(grids))[None]
    table = torch.eye(10) if directions is None else torch.tensor(directions, dtype=torch.float32)
    maps = {16: table[labels[0, 0]].permute(2, 0, 1)[None]}
    ks = [int(g.max()) + 1 for g in grids]
    return find_candidates(labels, [16] * len(grids), ks, maps, connectivity=connectivity, centre=False)


def boxes(candidates, image=0):
    return candidates.boxes[image][candidates.valid[image]].tolist()


def test_a_merges_similar_clusters_only():
    drawing = "0011 0011 2222"
    alike = [[1, 0, 0], [0.99, 0.1, 0], [0, 0, 1]]
    merged = merge_similar_clusters(draw(drawing, directions=alike), 0.95)
    assert boxes(merged) == [[0, 0, 4, 2], [0, 2, 4, 3]]
    assert len(boxes(merge_similar_clusters(draw(drawing, directions=alike), 0.999))) == 3


def test_a_merging_is_transitive_and_joins_regions():
    angles = np.deg2rad([0, 20, 40, 120])
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist()
    merged = merge_similar_clusters(draw("0123 0123", directions=directions), np.cos(np.deg2rad(25)))
    assert boxes(merged) == [[0, 0, 3, 2], [3, 0, 4, 2]]


def test_a_acts_per_clustering():
    directions = [[1, 0], [1, 0.01]]
    merged = merge_similar_clusters(draw("0011 0011", "0000 1111", directions=directions), 0.99)
    assert boxes(merged) == [[0, 0, 4, 2], [0, 0, 4, 2]]


def test_a_must_come_first():
    candidates = draw("0011 0011", "0000 1111")
    with pytest.raises(ValueError, match="must be the first filter"):
        merge_similar_clusters(candidates.where(candidates.cells > 99), 0.9)


def test_b_drops_clusters_in_many_pieces():
    drawing = "0101010 1111111 0101010"  # cluster 0 has 8 pieces, cluster 1 has 1
    assert boxes(drop_fragmented_clusters(draw(drawing), 7)) == [[0, 0, 7, 3]]
    assert len(boxes(drop_fragmented_clusters(draw(drawing), 8))) == 9


def test_b_counts_per_clustering():
    candidates = draw("0101 1111", "0000 0101")  # 2 pieces of cluster 0 here, 1 there
    assert len(boxes(drop_fragmented_clusters(candidates, 2))) == 6
    assert boxes(drop_fragmented_clusters(candidates, 1)) == [[0, 0, 4, 2], [0, 0, 4, 2]]


def test_c_drops_the_smaller_region_of_equal_boxes():
    ring = "0000 0110 0110 0000"  # region 0 and the whole image have the same box
    whole = "0000 0000 0000 0000"
    left = drop_duplicate_boxes(draw(ring, whole), 0.95)
    assert boxes(left) == [[1, 1, 3, 3], [0, 0, 4, 4]]
    assert left.cells[0].tolist() == [4, 16]


def test_c_keeps_the_first_of_equal_regions_and_boxes_below_the_limit():
    left = drop_duplicate_boxes(draw("0001 0001", "0001 0001", "0011 0011"), 0.95)
    assert left.clustering[0].tolist() == [0, 0, 2, 2]
    assert len(boxes(drop_duplicate_boxes(draw("0001 0001", "0011 0011"), 0.6))) == 3  # IoU 2/3 is above 0.6


def test_d_drops_similar_subsets_only():
    small, large = "0000 0110 0110 0000", "0000 0000 0000 1111"
    same = [[1, 0], [1, 0.01]]
    left = drop_similar_subsets(draw(small, large, directions=same), 0.9)
    assert boxes(left) == [[0, 0, 4, 4], [0, 0, 4, 3]]  # the inner square and the lowest row lie in larger regions
    other = [[1, 0], [0, 1]]
    kept = boxes(drop_similar_subsets(draw(small, large, directions=other), 0.9))
    assert [1, 1, 3, 3] in kept


def test_d_keeps_similar_regions_that_only_touch():
    left = drop_similar_subsets(draw("0011 0011", "0111 0111", directions=[[1, 0], [1, 0]]), 0.9)
    assert boxes(left) == [[0, 0, 2, 2], [1, 0, 4, 2]]


def test_e_by_hand():
    # 4x4 image: its left 3 columns, its left half, and a corner cell
    candidates = draw("0001 0001 0001 0001", "0011 0011 0011 0011", "1000 0000 0000 0000")
    assert len(boxes(candidates)) == 6
    five = keep_most_diverse(candidates, 5)
    # the highest overlap is between 12 cells on the left and 15 of 16 cells: boxes 12/16, masks 11/16
    assert [0, 0, 3, 4] not in boxes(five)
    assert len(boxes(keep_most_diverse(candidates, 6))) == 6
    assert boxes(keep_most_diverse(candidates, 1)) == [[0, 0, 4, 4]]


def test_e_drops_the_smallest_when_nothing_overlaps():
    assert boxes(keep_most_diverse(draw("00012 00013"), 2)) == [[0, 0, 3, 2], [3, 0, 4, 2]]


def plain_rule(candidates, image, limit):
    """While more than ``limit`` remain: the pair with the highest overlap; drop its smaller region."""
    rows = candidates.valid[image].nonzero()[:, 0].tolist()
    size = {r: int(candidates.cells[image, r]) for r in rows}
    rank = {r: i for i, r in enumerate(sorted(rows, key=lambda r: (size[r], -r)))}  # 0 is the smallest
    masks = candidates.masks[image].numpy()

    def overlap(a, b):
        xa, ya, wa, ha = candidates.boxes[image, a].tolist()
        xb, yb, wb, hb = candidates.boxes[image, b].tolist()
        shared = max(0, min(wa, wb) - max(xa, xb)) * max(0, min(ha, hb) - max(ya, yb))
        box = np.float32(shared) / np.float32((wa - xa) * (ha - ya) + (wb - xb) * (hb - yb) - shared)
        both = (masks[a] & masks[b]).sum()
        return (box + np.float32(both) / np.float32((masks[a] | masks[b]).sum())) / np.float32(2)

    while len(rows) > limit:
        pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
        a, b = max(pairs, key=lambda p: (overlap(*p), -min(rank[p[0]], rank[p[1]])))
        rows.remove(a if rank[a] < rank[b] else b)
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_e_equals_the_rule_as_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 3, (2, 3, 3, 4), generator=generator)
    labels = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels[:, 1] = labels[:, 1].roll(1, dims=2)
    candidates = find_candidates(labels, [16] * 3, [3] * 3, {16: torch.randn(2, 4, 6, 8, generator=generator)})
    for limit in (1, 3, 7, 12):
        left = keep_most_diverse(candidates, limit)
        for image in range(2):
            expected = candidates.ids[image, plain_rule(candidates, image, limit)]
            assert left.ids[image][left.valid[image]].tolist() == expected.tolist()


@pytest.mark.parametrize("name", list(FILTERS))
def test_an_image_does_not_feel_its_batch(name):
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 4, (4, 2, 4, 4), generator=generator)
    blocks[1] = 0  # few regions beside many
    labels = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)
    maps = {16: torch.randn(4, 5, 8, 8, generator=generator)}
    limit = {"drop_fragmented_clusters": 2, "keep_most_diverse": 5, "drop_duplicate_boxes": 0.5}.get(name, 0.0)
    together = FILTERS[name](find_candidates(labels, [16] * 2, [4] * 2, maps), limit)
    changed = 0
    for image in range(4):
        one = find_candidates(labels[image : image + 1], [16] * 2, [4] * 2, {16: maps[16][image : image + 1]})
        changed += len(boxes(one)) - len(boxes(FILTERS[name](one, limit)))
        assert boxes(FILTERS[name](one, limit)) == boxes(together, image)
    assert changed > 0


def test_filters_run_in_the_given_order():
    candidates = draw("0101 1111", "0011 0011")
    limits = {"drop_fragmented_clusters": 1, "keep_most_diverse": 1}
    assert boxes(apply_filters(candidates, limits)) == [[0, 0, 4, 2]]
    assert boxes(apply_filters(candidates, {})) == boxes(candidates)


def test_unknown_filter_is_named():
    with pytest.raises(ValueError, match="got 'drop_everything'"):
        apply_filters(draw("01"), {"drop_everything": 1})
