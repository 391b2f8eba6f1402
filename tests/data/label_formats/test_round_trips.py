"""Every format to every other one and back: images, boxes to a thousandth of a pixel, classes by name."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simdetr.data import masks as mask_codes
from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import open_images
from simdetr.data.label_files import FORMATS, format_named, read_with_report
from simdetr.data.label_formats.conversion import convert, fitting
from simdetr.data.label_formats.known_images import KnownImages
from simdetr.data.labels import Labels
from tests.data.label_formats.conftest import images_of

NAMES = [kind.name for kind in FORMATS]
FILES = {"simdetr": "a.parquet", "coco": "a.json", "label-studio": "tasks.json", "cvat": "a.xml", "csv": "a.csv"}
CATEGORIES = [Category(0, "cat"), Category(7, "große Eule, 'so'"), Category(30, '犬 "x" & <y>')]


def written(labels: Labels, name: str, folder: Path) -> Path:
    out = folder / FILES.get(name, name)
    kind = format_named(name)
    kind.write(fitting(labels, kind)[0], out, None)
    return out


def assert_alike(one: Labels, two: Labels) -> None:
    assert sorted(one.image_ids) == sorted(two.image_ids)
    two = two.select(one.image_ids)
    assert one.offsets.tolist() == two.offsets.tolist() and one.sizes_hw.tolist() == two.sizes_hw.tolist()
    np.testing.assert_allclose(one.boxes_xyxy, two.boxes_xyxy, rtol=0, atol=1e-3)
    names = [[labels.categories[index].name for index in labels.classes] for labels in (one, two)]
    assert names[0] == names[1]


@pytest.mark.parametrize("second", NAMES)
@pytest.mark.parametrize("first", NAMES)
def test_every_format_to_every_other(odd_labels, odd_images, tmp_path, first, second):
    source = written(odd_labels, first, tmp_path)
    out = tmp_path / "out" / FILES.get(second, second)
    done = convert(source, out, target_format=second, images=odd_images)
    assert done.report.format == first and not done.report.counts and not done.report.unlabelled
    back, report = read_with_report(out, images=odd_images)
    assert report.format == second and not report.counts
    assert_alike(odd_labels, back)


@pytest.mark.parametrize("name", ["simdetr", "coco"])
def test_category_ids_stay_where_a_format_has_them(odd_labels, tmp_path, name):
    assert read_with_report(written(odd_labels, name, tmp_path))[0].categories == odd_labels.categories


sides = st.one_of(st.integers(1, 3), st.integers(1, 4000))
shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
texts = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=8)
names_of_files = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "Zs"), include_characters="-_'\"&"), min_size=1
)


@st.composite
def sets_of_labels(draw: st.DrawFn) -> Labels:
    """Labels of a few images in folders; boxes of at least a hundredth of a pixel."""
    names = draw(st.lists(texts.map(str.strip).filter(bool), min_size=1, max_size=3, unique_by=str.casefold))
    categories = [Category(id_, name) for id_, name in zip(draw(st.permutations([0, 3, 8])), names, strict=False)]
    files = names_of_files.map(lambda name: name.strip()[:20]).filter(bool)
    stems = draw(
        st.lists(st.tuples(st.sampled_from(["", "sub/", "sub/b c/"]), files), min_size=1, max_size=4, unique=True)
    )
    images = []
    for folder, stem in stems:
        height, width = draw(sides), draw(sides)
        boxes = []
        for _ in range(draw(st.integers(0, 3))):
            x = sorted(np.float32(draw(shares)) * width for _ in range(2))
            y = sorted(np.float32(draw(shares)) * height for _ in range(2))
            if x[1] - x[0] > 0.01 and y[1] - y[0] > 0.01:
                boxes.append([x[0], y[0], x[1], y[1]])
        classes = [draw(st.integers(0, len(categories) - 1)) for _ in boxes]
        images.append(ImageLabels.build(f"{folder}{stem}.jpg", (height, width), boxes, classes))
    return Labels.from_images(images, sorted(categories, key=lambda category: category.id))


@pytest.mark.parametrize("name", NAMES)
@given(labels=sets_of_labels())
def test_what_is_written_reads_back(name, labels):
    with TemporaryDirectory() as folder:
        place = written(labels, name, Path(folder))
        back, report = read_with_report(place, images=KnownImages.of_labels(labels))
    assert report.format == name and not report.counts and not report.unlabelled
    assert_alike(labels, back)


@pytest.mark.parametrize("name", ["simdetr", "coco", "cvat"])
def test_masks_stay_as_they_are(tmp_path, name):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 2, (3, 20, 30), dtype=np.uint8)
    pixels[:, :, :2] = 0
    boxes = [[2, 0, 30, 20]] * 3
    image = ImageLabels.build("a.png", (20, 30), boxes, [0, 0, 1], masks=mask_codes.encode(pixels))
    labels = Labels.from_images([image], CATEGORIES[:2])
    kind = format_named(name)
    fit, changes = fitting(labels, kind, masks=True)
    assert not +changes or set(+changes) == {"category id, which cvat does not hold"}
    kind.write(fit, tmp_path / FILES[name], None)
    back, _ = read_with_report(tmp_path / FILES[name], masks=True)
    assert (mask_codes.decode(back.masks, (20, 30)) == pixels).all()


def test_polygons_of_yolo_are_masks_without_their_holes(tmp_path):
    pixels = np.zeros((2, 20, 30), np.uint8)
    pixels[0, 2:9, 3:15] = 1
    pixels[0, 4:6, 5:8] = 0  # a hole
    pixels[1, 0:3, 0:3] = pixels[1, 15:20, 25:30] = 1  # two parts
    image = ImageLabels.build(
        "a.png", (20, 30), [[3, 2, 15, 9], [0, 0, 30, 20]], [0, 1], masks=mask_codes.encode(pixels)
    )
    labels = Labels.from_images([image], CATEGORIES[:2])
    kind = format_named("yolo")
    kind.write(fitting(labels, kind, masks=True)[0], tmp_path / "y", None)
    back, report = read_with_report(tmp_path / "y", images=KnownImages.of_labels(labels), masks=True)
    pixels[0, 4:6, 5:8] = 1
    assert (mask_codes.decode(back.masks, (20, 30)) == pixels).all()
    assert back.boxes_xyxy.tolist() == labels.boxes_xyxy.tolist()
    assert report.notes["polygon, the box around it taken"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aquarium", "bccd", "coco256", "traffic_lights", "neu_det"])
def test_real_sets_go_through_all_formats_and_come_back(shared_data, tmp_path, name):
    folder = shared_data / name
    images = open_images(folder / "val")
    source = folder / "instances_val.json"
    truth = read_with_report(source, images=images)[0]
    crowds = truth.crowd.any()
    if crowds:
        truth = truth.rows(np.flatnonzero(~truth.crowd))
        truth = truth.select(name for row, name in enumerate(truth.image_ids) if len(truth.image(row)))
    before = source
    for place, kind in enumerate(["yolo", "voc", "label-studio", "cvat", "csv", "simdetr", "coco"]):
        out = tmp_path / f"{place}" / FILES.get(kind, kind)
        convert(before, out, target_format=kind, images=images)
        before = out
    back = read_with_report(before, images=images)[0]
    if crowds:
        back = back.select(truth.image_ids)
    assert_alike(truth, back)


def test_masks_go_through_cvat_and_yolo_with_the_boxes_around_them(tmp_path):
    generator = np.random.default_rng(0)
    height, width = 90, 120
    ys, xs = np.mgrid[:height, :width]
    blobs = [((xs - x) / a) ** 2 + ((ys - y) / b) ** 2 < 1 for x, y, a, b in generator.uniform(10, 40, (6, 4))]
    masks = mask_codes.encode(np.stack(blobs))
    boxes = [[0, 0, width, height]] * 6
    image = ImageLabels.build("a.png", (height, width), boxes, [0, 1, 0, 1, 0, 1], masks=masks)
    labels = Labels.from_images([image], CATEGORIES[:2])
    source = written(labels, "coco", tmp_path)
    images = open_images(images_of(labels, tmp_path / "photos"))
    done = convert(source, tmp_path / "b.xml", images=images, masks=True)
    assert done.changes["box replaced by that around its mask"] == 6
    convert(tmp_path / "b.xml", tmp_path / "c.json", images=images)
    done = convert(tmp_path / "c.json", tmp_path / "y", target_format="yolo", images=images, masks=True)
    assert not any("hole" in kind and count for kind, count in done.changes.items())
    back = read_with_report(tmp_path / "y", masks=True, images=images)[0]
    assert back.masks.tolist() == masks.tolist()
    rows, columns = np.nonzero(blobs[0])
    assert back.boxes_xyxy[0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
