"""Which category of one list is which of another."""

from __future__ import annotations

import pytest

from simdetr.data.annotations import Category, LabelError
from simdetr.data.category_matching import are_pseudo_classes, check_comparable, match_categories


def categories(*pairs):
    return tuple(Category(*pair) for pair in pairs)


OWN = categories((1, "red"), (2, "green"), (3, "blue"))


@pytest.mark.parametrize(
    ("others", "positions"),
    [
        (categories((1, "red"), (2, "green"), (3, "blue")), [0, 1, 2]),
        (categories((1, "blue"), (2, "red"), (3, "green")), [1, 2, 0]),  # the ids say otherwise
        (categories(("a", "green"), ("b", "blue"), ("c", "red")), [2, 0, 1]),
        (categories((0, "black"), (1, "red"), (2, "green"), (3, "blue")), [1, 2, 3]),
        (categories((1, "red"), (2, "blue")), [0, -1, 1]),
        (categories((1, "red"), (2, "green"), (3, "azure")), [0, 1, -1]),  # an id alone is no reason
        (categories((7, "Red"), (8, "GREEN "), (9, "blue")), [0, 1, 2]),
        (categories((7, "red"), (8, "Red"), (9, "blue")), [0, -1, 2]),
        (categories((7, "RED"), (8, "Red"), (9, "blue")), [-1, -1, 2]),  # which of the two?
        (categories((1, "red"), (2, "red"), (3, "blue")), [0, -1, 2]),  # of two of a name the one with the id
        (categories((1, "rouge"), (2, "vert"), (3, "bleu")), [0, 1, 2]),  # no name agrees, all ids do
        (categories((3, "3"), (1, "1")), [1, -1, 0]),  # a file without names
        (categories((1, "rouge"), (2, "vert")), [-1, -1, -1]),
        (categories(*((n, f"cluster {n:04d} of ab") for n in (1, 2, 3))), [-1, -1, -1]),
        ((), [-1, -1, -1]),
    ],
)
def test_names_come_before_ids(others, positions):
    match = match_categories(OWN, others)
    assert match.positions.tolist() == positions and bool(match) == any(place >= 0 for place in positions)
    assert match.missing == tuple(own for own, place in zip(OWN, positions, strict=True) if place < 0)
    back = match_categories(others, OWN).positions.tolist()
    assert all(back[place] == row for row, place in enumerate(positions) if place >= 0)


def test_what_is_not_spelt_alike_is_said():
    assert match_categories(OWN, OWN[::-1]).notes() == []
    (line,) = match_categories(OWN, categories((1, "Red"), (2, "green"))).notes()
    assert "'red' as 'Red'" in line and "green" not in line
    (line,) = match_categories(OWN, categories((1, "rouge"), (2, "vert"), (3, "bleu"))).notes()
    assert "by their ids" in line and "'blue' as 'bleu'" in line


def test_nothing_in_common_names_both():
    with pytest.raises(LabelError, match=r"val.json and train.json .*has 1 'red', 2 'green', 3 'blue'; .* 5 'x'"):
        check_comparable(OWN, categories((5, "x")), "val.json", "train.json")
    assert check_comparable(OWN, (), "a", "b").missing == OWN  # an empty list contradicts nobody


def test_pseudo_classes_are_known_by_their_names():
    assert are_pseudo_classes(categories((1, "cluster 0000 of ab"), (2, "cluster 0001 of ab")))
    assert are_pseudo_classes(categories((1, "object")))
    assert not are_pseudo_classes(OWN) and not are_pseudo_classes(())
