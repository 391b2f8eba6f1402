"""Few-label protocols: one COCO file in, smaller ones that everybody draws alike out.

- ``fractions``: 1, 2, 5, 10 and 100 % of the images, with all of their boxes.
- ``shots``: 1, 5, 10 and 30 boxes of every class.
- ``rf20-vl-fsod``: 10 boxes of every class; the score is COCO's AP on the whole test set. Roboflow20-VL's few-shot
  protocol (Robicheaux et al., Roboflow100-VL, arXiv 2505.20612; drawn as in Madan et al., arXiv 2312.14494).
- ``classes``: base classes for pretraining with labels, novel ones to learn from few.

What is drawn depends on the seed and on file names alone: images come in the order of SHA-256 of both. So smaller draws
lie inside larger ones of the same seed (shots: along 1, 5, 10 and 30), and neither the machine nor the order of the
source file matters. Every file says in ``info.simdetr_split`` by which rule and seed it was drawn, and the hash of what
it was drawn from.

Shots are counted as in TFA (Wang et al., Frustratingly Simple Few-Shot Object Detection, 2020, section 4.1 and its
code): for each class whole images are added, until it has k boxes. An image with more boxes of the class than are
missing is passed over; crowds never count. Boxes of other classes on these images are dropped, unless the image was
drawn for their class too. Where whole images do not add up to k, the next image gives some of its boxes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from simdetr.data.coco import load_coco, with_known_ids
from simdetr.data.storage import write_json

Content = dict[str, Any]
"""A COCO annotation file: ``images``, ``annotations``, ``categories`` and whatever else it holds."""
Protocol = Literal["fractions", "shots", "classes", "rf20-vl-fsod"]

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 1.0)
SHOTS = (1, 5, 10, 30)
SEEDS = tuple(range(10))
RF20_VL_SHOTS = 10
RECORD = "simdetr_split"
"""Key within ``info``."""


def split(
    labels: str | Path,
    out: str | Path,
    protocol: Protocol,
    *,
    amounts: Sequence[float] | None = None,
    seeds: Sequence[int] = SEEDS,
    novel: Sequence[str] | int = (),
) -> list[Path]:
    """Write the files of a protocol, one per amount and seed.

    Args:
        labels: COCO JSON to draw from.
        out: Folder of the new files.
        protocol: ``fractions``, ``shots``, ``classes`` or ``rf20-vl-fsod``.
        amounts: Fractions in (0, 1], or boxes per class, in place of the protocol's.
        seeds: One draw each.
        novel: With ``classes``, the names of the novel classes, or how many to draw.

    Returns:
        The files, such as ``fraction-0.01-seed0.json``. What does not depend on the seed is written once.

    Raises:
        LabelError: ``labels`` is no COCO file.
        ValueError: An amount out of range, ``amounts`` or ``novel`` with a protocol that has none, unknown classes.
    """
    content = with_known_ids(load_coco(Path(labels)))
    if (amounts is not None and protocol in ("classes", "rf20-vl-fsod")) or (novel and protocol != "classes"):
        raise ValueError(f"protocol: {protocol} takes no {'novel' if novel else 'amounts'}; leave it out")
    source = {"source_sha256": content_hash(content), "source_images": len(content["images"])}
    paths: dict[Path, None] = {}
    for name, drawn in _draws(content, protocol, amounts, seeds, novel):
        path = Path(out) / f"{name}.json"
        if path not in paths:
            drawn["info"][RECORD] |= source
            write_json(path, drawn, sort_keys=True)
        paths[path] = None
    return list(paths)


def _draws(
    content: Content,
    protocol: Protocol,
    amounts: Sequence[float] | None,
    seeds: Sequence[int],
    novel: Sequence[str] | int,
) -> Iterator[tuple[str, Content]]:
    """Names and contents of a protocol's files."""
    for seed in seeds:
        if protocol == "fractions":
            for fraction in amounts or FRACTIONS:
                suffix = f"-seed{seed}" if fraction < 1 else ""
                yield f"fraction-{fraction:g}{suffix}", label_fraction(content, fraction, seed)
        elif protocol == "shots":
            for shots in amounts or SHOTS:
                yield f"shots-{shots:g}-seed{seed}", k_shot(content, shots, seed)
        elif protocol == "rf20-vl-fsod":
            yield f"{protocol}-seed{seed}", k_shot(content, RF20_VL_SHOTS, seed, protocol=protocol)
        else:
            suffix = f"-seed{seed}" if isinstance(novel, int) else ""
            for part, drawn in base_and_novel(content, novel, seed).items():
                yield f"{part}{suffix}", drawn


def hash_order(names: Iterable[str], seed: int) -> list[str]:
    """Names in an order that looks random and depends on them and the seed alone."""
    return sorted(set(names), key=lambda name: (hashlib.sha256(f"{seed}\0{name}".encode()).digest(), name))


def first_images(names: Iterable[str], fraction: float, seed: int) -> list[str]:
    """The first part of the images in the seed's order, at least one of them; ``fraction`` is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number in (0, 1], got {fraction}; 0.01 is 1 %.")
    order = hash_order(names, seed)
    if not order:
        raise ValueError("labels: expected at least one image, got none")
    return order[: max(1, round(fraction * len(order)))]


def label_fraction(content: Content, fraction: float, seed: int) -> Content:
    """Some of the images as ``first_images`` draws them, with all of their boxes."""
    chosen = set(first_images({image["file_name"] for image in content["images"]}, fraction, seed))
    kept = {image["id"] for image in content["images"] if image["file_name"] in chosen}
    annotations = [entry for entry in content["annotations"] if entry.get("image_id") in kept]
    rule = {"protocol": "fractions", "fraction": fraction, "rule": "first images in the order of SHA-256(seed, name)"}
    return _made(content, kept, annotations, content["categories"], rule | {"seed": seed})


def k_shot(content: Content, shots: float, seed: int, *, protocol: str = "shots") -> Content:
    """Boxes of every class until it has ``shots``, as the module's docstring says; images without a box are left out.

    A draw holds those of the smaller numbers in ``SHOTS``. Classes that have fewer boxes give what they have; their
    names and counts stand in ``info.simdetr_split.short_classes``.

    Raises:
        ValueError: ``shots`` is no whole number above 0.
    """
    if shots < 1 or shots != int(shots):
        raise ValueError(f"amounts: expected whole numbers of boxes per class, at least 1, got {shots}")
    shots = int(shots)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    order = {name: place for place, name in enumerate(hash_order(names.values(), seed))}
    boxes: dict[Any, list[Content]] = {category["id"]: [] for category in content["categories"]}
    for entry in content["annotations"]:
        if entry.get("image_id") in names and entry.get("category_id") in boxes and not entry.get("iscrowd"):
            boxes[entry["category_id"]].append(entry)
    annotations: list[Content] = []
    for own in boxes.values():
        images: dict[str, list[Content]] = {}
        for entry in sorted(own, key=lambda entry: (order[names[entry["image_id"]]], _content_key(entry))):
            images.setdefault(names[entry["image_id"]], []).append(entry)
        annotations += _first_boxes(list(images.values()), shots)
    counts = Counter(entry["category_id"] for entry in annotations)
    short = {c["name"]: counts[c["id"]] for c in content["categories"] if counts[c["id"]] < shots}
    rule = {"protocol": protocol, "shots": shots, "rule": "whole images per class (TFA), in the order of SHA-256"}
    if protocol == "rf20-vl-fsod":
        rule["score"] = "COCO AP on the whole test set"
    record = rule | {"seed": seed, "short_classes": dict(sorted(short.items()))}
    kept = {entry["image_id"] for entry in annotations}
    return _made(content, kept, annotations, content["categories"], record)


def _first_boxes(images: Sequence[Sequence[Content]], shots: int) -> list[Content]:
    """``shots`` boxes of one class from its boxes by image; built up over the smaller ``SHOTS``, so that those nest."""
    taken = [0] * len(images)  # boxes of each image, its first ones
    for wanted in (*(smaller for smaller in SHOTS if smaller < shots), shots):
        missing = wanted - sum(taken)
        for whole in (True, False):
            for place, own in enumerate(images):
                more = len(own) - taken[place]
                if whole and more > missing:
                    continue
                taken[place] += min(more, missing)
                missing -= min(more, missing)
    return [entry for own, count in zip(images, taken, strict=True) for entry in own[:count]]


def base_and_novel(content: Content, novel: Sequence[str] | int, seed: int = 0) -> dict[str, Content]:
    """Two files, ``base`` and ``novel``: each has its own classes and boxes, and the images that have one of them.

    An image with both is in both files, each time with the boxes of that file's classes alone, as in TFA.

    Args:
        content: A COCO file.
        novel: Names of the novel classes, or how many to draw in the order of SHA-256 of seed and name.
        seed: Of the draw.

    Raises:
        ValueError: Names that are no classes; no class left on one of the two sides.
    """
    classes = [str(category["name"]) for category in content["categories"]]
    record: Content = {"protocol": "classes", "rule": "named classes"}
    if isinstance(novel, int):
        record |= {"rule": "first classes in the order of SHA-256(seed, name)", "seed": seed}
        novel = hash_order(classes, seed)[: max(novel, 0)]
    unknown = sorted(set(novel) - set(classes))
    if unknown:
        raise ValueError(f"novel: {', '.join(unknown)} are not among the classes {', '.join(sorted(classes))}")
    if not 0 < len(set(novel)) < len(set(classes)):
        raise ValueError(
            f"novel: expected 1 to {len(set(classes)) - 1} of the {len(set(classes))} classes, got {len(set(novel))}; "
            "name them, or say how many to draw"
        )
    files, images = {}, {image["id"] for image in content["images"]}
    for part in ("base", "novel"):
        own = [c for c in content["categories"] if (str(c["name"]) in novel) == (part == "novel")]
        ids = {category["id"] for category in own}
        annotations = [e for e in content["annotations"] if e.get("category_id") in ids and e.get("image_id") in images]
        kept = {entry["image_id"] for entry in annotations}
        files[part] = _made(content, kept, annotations, own, record | {"part": part})
    return files


def content_hash(content: Content) -> str:
    """SHA-256 of the images, boxes and classes of a COCO file, in whatever order and under whatever ids they stand."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    classes = {category["id"]: str(category["name"]) for category in content["categories"]}
    facts = [
        sorted([image["file_name"], image.get("height"), image.get("width")] for image in content["images"]),
        sorted(classes.values()),
        sorted(
            _text([names.get(e.get("image_id")), classes.get(e.get("category_id")), e.get("bbox"), e.get("iscrowd", 0)])
            for e in content["annotations"]
        ),
    ]
    return hashlib.sha256(_text(facts).encode()).hexdigest()


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _content_key(entry: Content) -> tuple[str, str]:
    """An order of an image's boxes that the order of the file does not change."""
    return _text({name: value for name, value in entry.items() if name != "id"}), _text(entry.get("id"))


def _made(
    content: Content, kept: set[Any], annotations: list[Content], categories: list[Content], record: Content
) -> Content:
    """A file of some images and boxes, sorted by file name, that says how it was drawn; ids stay as they are."""
    images = sorted(
        (image for image in content["images"] if image["id"] in kept),
        key=lambda image: (image["file_name"], _text(image["id"])),
    )
    place = {image["id"]: number for number, image in enumerate(images)}
    return {
        **content,
        "info": {**(content.get("info") or {}), RECORD: record},
        "images": images,
        "annotations": sorted(annotations, key=lambda entry: (place[entry["image_id"]], _content_key(entry))),
        "categories": sorted(categories, key=lambda c: (isinstance(c["id"], str), c["id"])),
    }
