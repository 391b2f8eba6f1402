import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels

CATEGORIES = (Category(7, "cat"), Category("d", "dog"), Category(30, "owl"))


def example(stage=2):
    return Labels.from_images(
        [
            ImageLabels.build("a.png", (40, 60), [[1, 2, 11, 22], [0, 0, 60, 40]], [2, 0], scores=[0.25, 1]),
            ImageLabels.build("empty.png", (10, 20), [], []),
            ImageLabels.build("sub/b.png", (30, 30), [[3.5, 4, 9, 5]], [1], crowd=[True], areas=[5]),
        ],
        CATEGORIES,
        stage,
    )


def assert_same(one, two):
    assert one.image_ids == two.image_ids and one.categories == two.categories and one.stage == two.stage
    for name in ("sizes_hw", "offsets", "boxes_xyxy", "classes", "scores", "areas", "crowd"):
        left, right = getattr(one, name), getattr(two, name)
        assert left.dtype == right.dtype and left.shape == right.shape and (left == right).all(), name


def test_columns_of_stacked_images():
    labels = example()
    assert len(labels) == 3 and labels.num_classes == 3
    assert labels.offsets.tolist() == [0, 2, 2, 3]
    assert labels.sizes_hw.tolist() == [[40, 60], [10, 20], [30, 30]]
    assert labels.classes.tolist() == [2, 0, 1]
    assert labels.areas.tolist() == [200, 2400, 5]  # the box's where none is given
    assert labels.scores.tolist() == [0.25, 1, 1]
    assert labels.crowd.tolist() == [False, False, True]
    assert labels.boxes_xyxy.dtype == np.float32 and labels.classes.dtype == np.int64


def test_labels_of_one_image():
    labels = example()
    first = labels.image(0)
    assert first.image_id == "a.png" and first.size_hw == (40, 60) and len(first) == 2
    assert first.boxes_xyxy.tolist() == [[1, 2, 11, 22], [0, 0, 60, 40]] and first.scores.tolist() == [0.25, 1]
    assert len(labels.of("empty.png")) == 0 and labels.of("empty.png").boxes_xyxy.shape == (0, 4)
    assert labels.of("sub/b.png").crowd.tolist() == [True] and labels.of("sub/b.png").areas.tolist() == [5]
    assert "a.png" in labels and "b.png" not in labels and labels.row_of("sub/b.png") == 2
    with pytest.raises(LabelError, match=r"'b.png' is not among the 3 labelled images"):
        labels.of("b.png")


def test_select_follows_the_given_order():
    labels = example()
    chosen = labels.select(["sub/b.png", "a.png"])
    assert chosen.offsets.tolist() == [0, 1, 3] and chosen.classes.tolist() == [1, 2, 0]
    assert chosen.boxes_xyxy.tolist() == [[3.5, 4, 9, 5], [1, 2, 11, 22], [0, 0, 60, 40]]
    assert_same(labels.select(labels.image_ids), labels)
    assert len(labels.select([])) == 0 and labels.select(["empty.png"]).boxes_xyxy.shape == (0, 4)
    with pytest.raises(LabelError, match="not among"):
        labels.select(["a.png", "c.png"])


def test_class_agnostic_keeps_all_but_the_class():
    labels = example().class_agnostic()
    assert labels.num_classes == 1 and labels.classes.tolist() == [0, 0, 0]
    assert labels.boxes_xyxy.tolist() == example().boxes_xyxy.tolist()


def test_other_categories_are_matched_by_name():
    labels = example()
    wider = [Category(1, "ant"), Category(30, "dog"), Category("x", "Cat"), Category(7, "owl")]
    assert labels.with_categories(wider).classes.tolist() == [3, 2, 1]
    assert labels.with_categories(wider).categories == tuple(wider)
    narrower = [Category(30, "owl"), Category(7, "cat")]
    assert labels.select(["a.png"]).with_categories(narrower).classes.tolist() == [0, 1]
    with pytest.raises(LabelError, match="boxes of dog have no class among owl, cat"):
        labels.with_categories(narrower)


@pytest.mark.parametrize("labels", [example(), example(-1).select(["empty.png"]), example().select([])])
def test_parquet_round_trip(tmp_path, labels):
    write_labels(labels, tmp_path / "deep" / "labels.parquet")
    read = read_labels(tmp_path / "deep" / "labels.parquet")
    assert_same(read, labels)
    read.boxes_xyxy[:] = 1  # writable: torch.from_numpy warns otherwise
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["labels.parquet"]


def test_parquet_round_trip_over_many_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("simdetr.data.label_files._ROWS_PER_GROUP", 7)
    generator = np.random.default_rng(0)
    images = []
    for number in range(50):
        corners = np.sort(generator.uniform(0, 30, (generator.integers(0, 4), 2, 2)), axis=1).reshape(-1, 4)
        images.append(ImageLabels.build(f"{number}", (30, 30), corners, generator.integers(0, 3, len(corners))))
    labels = Labels.from_images(images, CATEGORIES, stage=0)
    write_labels(labels, tmp_path / "a.parquet")
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 8
    assert_same(read_labels(tmp_path / "a.parquet"), labels)


def test_parquet_is_one_row_per_image_that_others_can_read(tmp_path):
    write_labels(example(), tmp_path / "a.parquet")
    row = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert row["image_id"] == "a.png" and (row["height"], row["width"]) == (40, 60)
    assert row["boxes_xyxy"] == [[1, 2, 11, 22], [0, 0, 60, 40]] and row["classes"] == [2, 0]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_labels(example(), path)
    before = path.read_bytes()

    def fail(table, temporary, **options):
        temporary.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="no space"):
        write_labels(example(), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "text.parquet").write_text("no")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "list.parquet")
    with pytest.raises(LabelError, match=r"missing.parquet does not exist"):
        read_labels(tmp_path / "missing.parquet")
    with pytest.raises(LabelError, match=r"text.parquet begins with b'no', which looks like none of the formats"):
        read_labels(tmp_path / "text.parquet")
    (tmp_path / "photo.jpg").write_text("no")
    with pytest.raises(LabelError, match=r"photo.jpg begins with b'no', .* none of the formats simdetr, coco"):
        read_labels(tmp_path / "photo.jpg")
    with pytest.raises(LabelError, match=r"list.parquet holds no labels.*columns \['path'\]"):
        read_labels(tmp_path / "list.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"boxes_xyxy": [[0, 0, 5, 5], [9, 0, 3, 5], [0, 0, 1, 1]]},
            r"x0 <= x1.*\[9.0, 0.0, 3.0, 5.0\] in image 'a.png'",
        ),
        ({"boxes_xyxy": [[0, 0, 5, 5], [0, 0, 3, 5], [0, 0, np.nan, 1]]}, "finite.*in image 'sub/b.png'"),
        ({"boxes_xyxy": [[0, 0, 5]]}, "boxes_xyxy: expected shape"),
        ({"classes": [0, 1]}, r"classes: expected shape \(3,\), got \(2,\)"),
        ({"classes": [0, 3, 0]}, "classes: expected 0 to 2, got 3 in image 'a.png'"),
        ({"classes": [0, -1, 0]}, "classes: expected 0 to 2, got -1"),
        ({"scores": [0, 1.5, 1]}, "scores: expected 0 to 1, got 1.5"),
        ({"scores": [0, np.nan, 1]}, "scores: expected 0 to 1, got nan"),
        ({"areas": [1, 1, -1]}, "areas: expected finite and >= 0, got -1.0"),
        ({"offsets": [0, 2, 1, 3]}, "offsets: expected to rise from 0 to 3"),
        ({"offsets": [0, 2, 2, 2]}, "offsets: expected to rise from 0 to 3"),
        ({"offsets": [0, 3]}, "offsets: expected shape"),
        ({"sizes_hw": [[40, 60], [0, 20], [30, 30]]}, "sizes_hw: expected > 0.*'empty.png'"),
        ({"image_ids": ("a", "b", "a")}, "image_ids: expected each id once, got 1 repeated"),
        ({"categories": (*CATEGORIES, Category(7, "again"))}, "categories: expected each id once"),
    ],
)
def test_broken_columns_are_refused(change, message):
    columns = {name: getattr(example(), name) for name in Labels.__dataclass_fields__}
    with pytest.raises(LabelError, match=message):
        Labels(**(columns | change))


def test_labels_survive_pickling():
    labels = example()
    assert labels.row_of("sub/b.png") == 2
    assert_same(pickle.loads(pickle.dumps(labels)), labels)


def with_masks():
    """The example, with a mask of random pixels for each of its boxes."""
    generator = np.random.default_rng(0)
    images = [example().image(row) for row in range(3)]
    codes = [masks.encode(generator.random((len(image), *image.size_hw)) > 0.5) for image in images]
    return Labels.from_images(
        [replace(image, masks=code) for image, code in zip(images, codes, strict=True)], CATEGORIES, stage=2
    )


def test_masks_follow_their_boxes_everywhere(tmp_path):
    labels = with_masks()
    assert labels.masks.shape == (3,) and all(isinstance(code, bytes) for code in labels.masks)
    assert labels.image(0).masks.tolist() == labels.masks[:2].tolist() and len(labels.of("empty.png").masks) == 0
    assert masks.decode(labels.of("sub/b.png").masks, (30, 30)).shape == (1, 30, 30)
    assert labels.select(["sub/b.png", "a.png"]).masks.tolist() == labels.masks[[2, 0, 1]].tolist()
    assert labels.class_agnostic().masks.tolist() == labels.masks.tolist()
    assert labels.with_categories([*reversed(CATEGORIES)]).masks.tolist() == labels.masks.tolist()
    assert pickle.loads(pickle.dumps(labels)).masks.tolist() == labels.masks.tolist()
    again = Labels.from_images([labels.image(row) for row in range(3)], CATEGORIES, 2)
    assert again.masks.tolist() == labels.masks.tolist()
    write_labels(labels, tmp_path / "labels.parquet")
    read = read_labels(tmp_path / "labels.parquet")
    assert_same(read, labels)
    assert read.masks.dtype == object and read.masks.tolist() == labels.masks.tolist()


def test_labels_without_masks_stay_without(tmp_path):
    assert example().masks is None and example().select(["a.png"]).masks is None and example().image(0).masks is None
    write_labels(example(), tmp_path / "labels.parquet")
    assert "masks" not in pq.read_schema(tmp_path / "labels.parquet").names
    assert read_labels(tmp_path / "labels.parquet", masks=True).masks is None
    nothing = with_masks().select([])
    write_labels(nothing, tmp_path / "none.parquet")
    assert read_labels(tmp_path / "none.parquet").masks.shape == (0,)


@pytest.mark.parametrize(
    ("codes", "message"),
    [([b"0"], "masks: expected those of 3 boxes, got 1"), ([b"0", b"0", "0"], "as bytes, got '0' in row 2")],
)
def test_broken_masks_are_refused(codes, message):
    with pytest.raises(LabelError, match=message):
        replace(example(), masks=codes)


def with_points():
    """The example, with a point for two of its three boxes."""
    images = [example().image(row) for row in range(3)]
    columns = [[[1.5, 2.25], [np.nan, np.nan]], [], [[-3, 30.5]]]
    return Labels.from_images(
        [
            replace(image, points=np.array(c, np.float32).reshape(-1, 2))
            for image, c in zip(images, columns, strict=True)
        ],
        CATEGORIES,
        stage=2,
    )


def test_points_follow_their_boxes_everywhere(tmp_path):
    labels = with_points()
    expected = np.array([[1.5, 2.25], [np.nan, np.nan], [-3, 30.5]], np.float32)
    assert labels.points.dtype == np.float32
    np.testing.assert_array_equal(labels.points, expected)
    np.testing.assert_array_equal(labels.image(0).points, expected[:2])
    assert labels.of("empty.png").points.shape == (0, 2)
    np.testing.assert_array_equal(labels.select(["sub/b.png", "a.png"]).points, expected[[2, 0, 1]])
    np.testing.assert_array_equal(labels.class_agnostic().points, expected)
    np.testing.assert_array_equal(labels.with_categories([*reversed(CATEGORIES)]).points, expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(labels)).points, expected)
    write_labels(labels, tmp_path / "labels.parquet")
    read = read_labels(tmp_path / "labels.parquet")
    assert_same(read, labels)
    assert read.points.dtype == np.float32
    np.testing.assert_array_equal(read.points, expected)
    rows = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    assert rows[0]["points"][0] == [1.5, 2.25] and rows[2]["points"] == [[-3, 30.5]]  # that others can read


def test_labels_without_points_stay_without(tmp_path):
    assert example().points is None and example().select(["a.png"]).points is None and example().image(0).points is None
    write_labels(example(), tmp_path / "labels.parquet")
    assert "points" not in pq.read_schema(tmp_path / "labels.parquet").names
    assert read_labels(tmp_path / "labels.parquet").points is None
    write_labels(with_points().select([]), tmp_path / "none.parquet")
    assert read_labels(tmp_path / "none.parquet").points.shape == (0, 2)


def test_points_are_built_from_anything_array_like():
    image = ImageLabels.build("a", (40, 60), [[0, 0, 9, 9]], [0], points=[[3, 4]])
    assert image.points.dtype == np.float32 and image.points.tolist() == [[3, 4]]
    assert ImageLabels.build("a", (40, 60), [], [], points=[]).points.shape == (0, 2)


def test_sharpened_drops_the_uncertain_and_keeps_all_images():
    rows = [
        ImageLabels.build("a", (10, 10), [[0, 0, 4, 4], [1, 1, 5, 5]], [0, 1], [0.5, 0.1]),
        ImageLabels.build("b", (10, 10), [[2, 2, 6, 6]], [1], [0.14]),
        ImageLabels.build("c", (10, 10), [[3, 3, 7, 7]], [1], [0.15]),
    ]
    labels = Labels.from_images(rows, (Category(1, "x"), Category(2, "y"))).sharpened(0.15, 2.0)
    assert labels.image_ids == ("a", "b", "c") and labels.offsets.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(labels.scores, [0.25, 0.0225], rtol=1e-6)
    assert labels.classes.tolist() == [0, 1] and labels.boxes_xyxy[:, 0].tolist() == [0, 3]


def test_a_fingerprint_is_of_all_that_is_learned_from(make_labels):
    boxes = {"a": [(0, 0, 9, 9, 0), (1, 1, 5, 5, 1)], "b": []}
    labels = make_labels(boxes, (1, 2))
    assert labels.fingerprint() == make_labels(boxes, (1, 2)).fingerprint()
    others = [
        make_labels(boxes | {"a": boxes["a"][::-1]}, (1, 2)),
        make_labels({"a": boxes["a"]}, (1, 2)),
        make_labels({"a": [(0, 0, 9, 9, 0), (1, 1, 5, 5, 0)], "b": []}, (1, 2)),
        make_labels({"a": [(0, 0, 9, 9, 0), (1, 1, 5, 5, 1, 0.5)], "b": []}, (1, 2)),
        make_labels(boxes, (1, 3)),
        make_labels(boxes, (1, 2, 3)),
        make_labels(boxes, (1, 2), crowd=[True, False]),
        replace(labels, points=np.zeros((2, 2), np.float32)),
        replace(labels, masks=np.array([b"1", b"2"], object)),
    ]
    assert len({other.fingerprint() for other in (labels, *others)}) == 1 + len(others)
