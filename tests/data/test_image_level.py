"""Classes of whole images: what is left of boxes, and where they can be read from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels, LabelError, Lineage
from simdetr.data.augmentation import train_transforms
from simdetr.data.dataset import DetectionDataset
from simdetr.data.image_level import image_level, read_image_level
from simdetr.data.images import open_images
from simdetr.data.labels import Labels

CATEGORIES = (Category(7, "cat"), Category("d", "dog"), Category(30, "owl"))


def boxes_of(seed):
    """Labels with the same classes per image whatever the seed, and all else by it."""
    generator = np.random.default_rng(seed)
    images = []
    for name, classes in (("a.png", [2, 0]), ("none.png", []), ("b.png", [1])):
        rows = generator.permutation(np.repeat(classes, generator.integers(1, 4))).astype(int)
        corners = np.sort(generator.uniform(0, 40, (len(rows), 2, 2)), axis=1).reshape(-1, 4)
        image = ImageLabels.build(name, (40, 60), corners, rows, crowd=generator.random(len(rows)) > 0.5)
        codes = masks.of_boxes(corners.astype(np.float32), (40, 60))
        images.append(replace(image, masks=codes, points=corners[:, :2].astype(np.float32)))
    labels = Labels.from_images(images, CATEGORIES, stage=3)
    return replace(labels, lineage=Lineage.first_seen(0, labels.offsets))


def test_one_whole_box_per_class():
    labels = image_level(boxes_of(0))
    assert labels.image_ids == ("a.png", "none.png", "b.png") and labels.offsets.tolist() == [0, 2, 2, 3]
    assert labels.classes.tolist() == [0, 2, 1] and labels.boxes_xyxy.tolist() == [[0, 0, 60, 40]] * 3
    assert labels.areas.tolist() == [2400] * 3 and labels.categories == CATEGORIES and labels.stage == 3
    assert not labels.crowd.any() and labels.boxes_xyxy.dtype == np.float32


def test_nothing_of_the_boxes_survives():
    one, two = image_level(boxes_of(1)), image_level(boxes_of(2))
    assert boxes_of(1).boxes_xyxy.tolist() != boxes_of(2).boxes_xyxy.tolist()
    for name in Labels.__dataclass_fields__:
        left, right = getattr(one, name), getattr(two, name)
        assert (left is None and right is None) or np.array_equal(left, right), name
    assert one.masks is None and one.points is None and one.lineage is None


def test_the_best_score_of_a_class_is_kept_and_empty_sets_stay_empty():
    image = ImageLabels.build("a.png", (40, 60), [[0, 0, 9, 9]] * 4, [1, 0, 1, 1], scores=[0.5, 0.25, 0.75, 0.1])
    assert image_level(Labels.from_images([image], CATEGORIES)).scores.tolist() == [0.25, 0.75]
    nothing = Labels.from_images([ImageLabels.build("a.png", (40, 60), [], [])], [])
    assert len(image_level(nothing)) == 1 and len(image_level(nothing).classes) == 0
    assert len(image_level(boxes_of(0).select([]))) == 0


def test_the_whole_image_stays_whole_through_the_augmentation(image_folder):
    source = open_images(image_folder(2, size_hw=(47, 61)))
    boxes = ImageLabels.build("000.png", (47, 61), [[3, 4, 9, 9], [20, 20, 30, 30]], [0, 2])
    labels = image_level(Labels.from_images([boxes], CATEGORIES))
    dataset = DetectionDataset(source, labels, train_transforms([37, 48, 64], 90))
    sizes = set()
    for epoch in range(30):
        dataset.set_epoch(epoch)
        _, target = dataset[0]
        assert target["labels"].tolist() == [0, 2]
        assert torch.allclose(target["boxes"], torch.tensor([0.5, 0.5, 1, 1]).repeat(2, 1), atol=1e-6)
        sizes.add(tuple(target["size"].tolist()))
    assert len(sizes) > 5  # it was cut in different ways


def csv_file(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_a_csv_of_image_labels(image_folder, tmp_path):
    source = open_images(image_folder(4))
    text = "split,Label,image\nx,owl,002.png\nx, cat ,002.png\n\nx,cat,000.png\nx,owl,002.png\nx,,001.png\n"
    labels = read_image_level(csv_file(tmp_path, text), source)
    assert labels.image_ids == ("002.png", "000.png", "001.png") and labels.offsets.tolist() == [0, 2, 3, 3]
    assert labels.categories == (Category(1, "cat"), Category(2, "owl")) and labels.classes.tolist() == [0, 1, 0]
    assert labels.sizes_hw.tolist() == [[40, 60]] * 3 and labels.boxes_xyxy.tolist() == [[0, 0, 60, 40]] * 3
    known = read_image_level(csv_file(tmp_path, text), source, CATEGORIES)
    assert known.categories == CATEGORIES and known.classes.tolist() == [0, 2, 0]


def test_paths_and_classes_may_be_spelt_otherwise(image_folder, tmp_path):
    text = "image,label\nimages\\000.png,CAT\n./001.png,owl\n"
    labels = read_image_level(csv_file(tmp_path, text), open_images(image_folder(2)), CATEGORIES)
    assert labels.image_ids == ("000.png", "001.png") and labels.categories == CATEGORIES
    assert [labels.categories[own].name for own in labels.classes] == ["cat", "owl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a first line with the columns image and label, got \[\]"),
        ("000.png,cat\n", r"columns image and label, got \['000.png', 'cat'\]"),
        ("image,label\n,cat\n", r"labels.csv: line 2 names no image: \['', 'cat'\]"),
        ("label,image\ncat\n", "line 2 names no image"),
        (
            "image,label\n000.png,cat\nother.png,cat\n",
            "1 of 2 images are not in .*first: 'other.png'.*ids like '000.png'",
        ),
        ("image,label\n000.png,cow\n001.png,ant\n", "the class 'ant', 'cow' is none of 'cat', 'dog', 'owl'"),
    ],
)
def test_what_is_wrong_in_a_csv_is_named(image_folder, tmp_path, text, message):
    with pytest.raises(LabelError, match=message):
        read_image_level(csv_file(tmp_path, text), open_images(image_folder(2)), CATEGORIES)


def test_files_that_are_no_csv(image_folder, tmp_path):
    source = open_images(image_folder(1))
    with pytest.raises(LabelError, match=r"missing.csv cannot be read as CSV"):
        read_image_level(tmp_path / "missing.csv", source)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00image")
    with pytest.raises(LabelError, match=r"bytes.csv cannot be read as CSV"):
        read_image_level(tmp_path / "bytes.csv", source)


def test_a_folder_per_class(image_folder):
    root = image_folder(2, "images/cat").parent
    image_folder(1, "images/dog/deep")
    labels = read_image_level(root, open_images(root))
    assert labels.image_ids == ("cat/000.png", "cat/001.png", "dog/deep/000.png")
    assert labels.classes.tolist() == [0, 0, 1] and [c.name for c in labels.categories] == ["cat", "dog"]
    (root / "stray.png").write_bytes((root / "cat/000.png").read_bytes())
    with pytest.raises(LabelError, match=r"stray.png lies in no class folder"):
        read_image_level(root, open_images(root))


def test_class_folders_beside_the_images_may_share_them(image_folder, tmp_path):
    source = open_images(image_folder(3))
    image_folder(2, "classes/cat"), image_folder(1, "classes/dog")
    labels = read_image_level(tmp_path / "classes", source)
    assert labels.image_ids == ("000.png", "001.png") and labels.classes.tolist() == [0, 1, 0]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(LabelError, match="expected one folder of images per class, got no images"):
        read_image_level(tmp_path / "nothing", source)


def test_sizes_are_those_of_the_upright_image_and_broken_images_are_left_out(image_folder, tmp_path, caplog):
    folder = image_folder(2)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(folder / "lying.jpg", exif=exif)
    (folder / "001.png").write_bytes(b"no image")
    text = "image,label\n000.png,cat\n001.png,cat\nlying.jpg,owl\n"
    labels = read_image_level(csv_file(tmp_path, text), open_images(folder))
    assert labels.image_ids == ("000.png", "lying.jpg") and labels.sizes_hw.tolist() == [[40, 60], [60, 40]]
    assert "1 images cannot be opened and are left out, the first is 001.png" in caplog.text


def test_an_image_whose_metadata_is_damaged_counts_as_upright(tmp_path):
    """Its pixels can be read, so it is no reason to leave it out."""
    folder = tmp_path / "cat"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01")
    labels = read_image_level(tmp_path, open_images(tmp_path))
    assert labels.sizes_hw.tolist() == [[20, 30]] and labels.boxes_xyxy.tolist() == [[0, 0, 30, 20]]
