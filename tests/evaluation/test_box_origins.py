from dataclasses import replace

import numpy as np
import pytest

from simdetr.data.annotations import Lineage
from simdetr.reports.report import birth_colour, birth_colours, births, origin_rows

BOX = (0, 0, 9, 9, 0)


@pytest.fixture
def stages(make_labels):
    """Six mined boxes on two images; stage 2 keeps three of them, one twice, and has three finds of its detectors."""
    mined = make_labels({"a": [BOX] * 4, "b": [BOX] * 2})
    later = make_labels({"a": [BOX] * 3, "b": [BOX] * 4})
    first = Lineage(
        born=[0] * 6,
        born_row=[0, 1, 2, 3, 0, 1],
        stride=[16, 32, 32, 32, 32, 16],
        k=[8, 8, 2, 2, 2, 16],
        cluster=[0] * 6,
    )
    last = Lineage(
        born=[0, 0, 1, 0, 2, 0, 2],
        born_row=[2, 2, 0, 0, 1, 1, 2],
        stride=[32, 32, 0, 32, 0, 16, 0],
        k=[2, 2, 0, 2, 0, 16, 0],
        cluster=[0, 0, -1, 0, -1, 0, -1],
    )
    return {0: replace(mined, stage=0, lineage=first), 2: replace(later, stage=2, lineage=last)}


def test_shares_of_every_stage(stages):
    assert origin_rows(stages) == [
        {
            "stage": "mined", "boxes": 6, "mined_left": 6, "mined": 6,
            "shares": {
                "stride 32, K 2": 3 / 6, "stride 32, K 8": 1 / 6, "stride 16, K 8": 1 / 6, "stride 16, K 16": 1 / 6,
            },
        },
        {
            "stage": "stage 2", "boxes": 7, "mined_left": 3, "mined": 6,
            "shares": {"stride 32, K 2": 3 / 7, "stride 16, K 16": 1 / 7, "stage 1": 1 / 7, "stage 2": 2 / 7},
        },
    ]  # fmt: skip
    assert list(origin_rows(stages)[0]["shares"]) == [  # coarsest first
        "stride 32, K 2", "stride 32, K 8", "stride 16, K 8", "stride 16, K 16",
    ]  # fmt: skip


def test_stages_without_lineage_or_boxes(stages, make_labels):
    old = replace(stages[0], lineage=None)
    assert origin_rows({0: old}) == []
    assert [row["stage"] for row in origin_rows({0: old, 2: stages[2]})] == ["stage 2"]
    assert origin_rows({2: stages[2]})[0]["mined"] is None
    mined = replace(old, lineage=Lineage.first_seen(0, old.offsets))
    assert origin_rows({0: mined})[0]["shares"] == {"mined": 1}
    empty = make_labels({"a": []})
    rows = origin_rows({0: replace(empty, stage=0, lineage=Lineage.first_seen(0, empty.offsets))})
    assert rows == [{"stage": "mined", "boxes": 0, "mined_left": 0, "mined": 0, "shares": {}}]


def test_legend_names_what_is_drawn(stages):
    shown = births(stages, truth=True)
    assert [title for title, _ in shown] == ["mined", "stage 1", "stage 2", "labelled by people"]
    assert len({colour for _, colour in shown}) == 4
    assert births({0: stages[0]}, truth=False) == [("mined", birth_colour(0))]
    boxes = stages[2].image(1)
    assert birth_colours(boxes, np.array([1, 0])) == [birth_colour(2), birth_colour(0)]
    assert birth_colours(replace(boxes, lineage=None), np.array([0])) == [birth_colour(-1)]
