"""Two lists of categories in, which of one is which of the other out: by name, by id only where names say nothing.

Two files of one data set may number their classes apart, spell them apart, or have one class more; a detector's classes
are those of the file it was trained on. Everything that compares two files goes by what is found here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simdetr.data.annotations import Category, LabelError

_PSEUDO_CLASS = re.compile(r"cluster \d+ of ")
_SHOWN = 8


@dataclass(frozen=True)
class CategoryMatch:
    """Which category of one list is which of another.

    Attributes:
        own: C categories of the one list.
        others: those of the other.
        positions: int64 [C], for each of ``own`` its position in ``others``, -1 where that has none.
        by_id: whether ids were compared, since no two names agree.
    """

    own: tuple[Category, ...]
    others: tuple[Category, ...]
    positions: NDArray[np.int64]
    by_id: bool = False

    def __bool__(self) -> bool:
        """Whether any category is in both lists."""
        return bool((self.positions >= 0).any())

    @property
    def missing(self) -> tuple[Category, ...]:
        """Categories of ``own`` that the other list lacks."""
        return tuple(category for category, position in zip(self.own, self.positions, strict=True) if position < 0)

    def notes(self) -> list[str]:
        """What is taken for the same though it is not spelt alike, a line each."""
        pairs = [
            f"{category.name!r} as {self.others[position].name!r}"
            for category, position in zip(self.own, self.positions.tolist(), strict=True)
            if position >= 0 and category.name != self.others[position].name
        ]
        if not pairs:
            return []
        how = "no category has the same name, so they are taken by their ids" if self.by_id else "categories respelt"
        return [f"{how}: {shortened(pairs)}"]


def match_categories(own: Sequence[Category], others: Sequence[Category]) -> CategoryMatch:
    """Match two lists of categories by `match_names`, or by their ids if no name agrees.

    Ids decide if both lists have the same ones, or if one has no names but its ids; pseudo-classes, whose names say
    which clustering made them, never go by id.
    """
    match = match_names(own, others)
    if match or not _ids_decide(own, others):
        return match
    _match_by(lambda category: category.id, own, others, match.positions)
    return replace(match, by_id=True)


def match_names(own: Sequence[Category], others: Sequence[Category]) -> CategoryMatch:
    """Match two lists of categories by their names alone.

    Same names are the same class, whatever the ids; names that occur several times in a list count only with their id.
    Then names that differ in case, spaces, hyphens and underscores alone.
    """
    positions = np.full(len(own), -1, np.int64)
    rules: tuple[Callable[[Category], Hashable], ...] = (
        lambda category: (category.name, category.id),
        lambda category: category.name,
        lambda category: re.sub(r"[\s_-]+", "", category.name).casefold(),
    )
    for rule in rules:
        _match_by(rule, own, others, positions)
    return CategoryMatch(tuple(own), tuple(others), positions)


def check_comparable(
    own: Sequence[Category], others: Sequence[Category], own_place: object, others_place: object
) -> CategoryMatch:
    """The match of the categories of two places, such as files; a LabelError that lists both if they share none."""
    match = match_categories(own, others)
    if own and others and not match:
        raise LabelError(
            f"{own_place} and {others_place} have no category in common: {own_place} has {named(own)}; {others_place} "
            f"has {named(others)}. Give the same names to the same classes in both"
        )
    return match


def are_pseudo_classes(categories: Sequence[Category]) -> bool:
    """Whether they are clusters of a pretraining, or its one class of all objects, and no classes of people."""
    if [category.name for category in categories] == ["object"]:
        return True
    return bool(categories) and all(_PSEUDO_CLASS.match(category.name) for category in categories)


def named(categories: Sequence[Category]) -> str:
    """The first few as ``1 'cat', 2 'dog'``."""
    return shortened([f"{category.id!r} {category.name!r}" for category in categories])


def shortened(words: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _match_by(
    rule: Callable[[Category], Hashable],
    own: Sequence[Category],
    others: Sequence[Category],
    positions: NDArray[np.int64],
) -> None:
    """Match what is left on both sides and alike by a rule, each once."""
    taken = set(positions[positions >= 0].tolist())
    left = [row for row in range(len(own)) if positions[row] < 0]
    free = [row for row in range(len(others)) if row not in taken]
    here = Counter(rule(own[row]) for row in left)
    there = Counter(rule(others[row]) for row in free)
    place = {rule(others[row]): row for row in free}
    for row in left:
        key = rule(own[row])
        if here[key] == 1 == there[key]:
            positions[row] = place[key]


def _ids_decide(own: Sequence[Category], others: Sequence[Category]) -> bool:
    if any(_PSEUDO_CLASS.match(category.name) for category in (*own, *others)):
        return False
    nameless = any(all(category.name == str(category.id) for category in side) for side in (own, others))
    return nameless or {category.id for category in own} == {category.id for category in others}
