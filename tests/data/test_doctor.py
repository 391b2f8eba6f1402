import shutil

import numpy as np
import pytest
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.doctor import examine, summary
from simdetr.data.images import open_images
from simdetr.data.label_files import write_labels
from simdetr.data.labels import Labels


def entry(number, name, height=40, width=60):
    return {"id": number, "file_name": name, "height": height, "width": width}


def box(number, image_id, category_id=1, bbox=(1, 2, 10, 20)):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(bbox)}


def test_healthy_folder(image_folder):
    steps = []
    report = examine(image_folder(5), progress=lambda done, total: steps.append((done, total)))
    assert not report.fatal and report.findings == () and (report.total, report.readable) == (5, 5)
    assert report.suffixes == {".png": 5} and report.sizes_hw == ((40, 60),) * 5
    assert steps == [(number, 5) for number in range(1, 6)]
    text = summary(report)
    assert "5 images, 5 readable" in text and "height: 40 to 40 px, median 40" in text
    assert text.endswith("nothing here would stop a run")


def test_odd_images_are_found_and_are_not_fatal(image_folder, monkeypatch):
    monkeypatch.setattr("simdetr.data.doctor.HUGE_PIXELS", 5000)
    folder = image_folder(25)
    shutil.copy(folder / "003.png", folder / "z_copy.png")
    shutil.copy(folder / "003.png", folder / "z_copy2.png")
    Image.fromarray(np.full((40, 60), 7, np.uint8)).save(folder / "flat.png")
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.png")
    Image.fromarray(noise[:31, :40]).save(folder / "small.png")
    Image.fromarray(noise[:9, :]).save(folder / "strip.png")
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:300])
    report = examine(folder, threads=3)
    assert not report.fatal and (report.total, report.readable) == (32, 31)
    found = {(finding.kind, finding.image_id) for finding in report.findings}
    assert found == {
        ("duplicate", "z_copy.png"),
        ("duplicate", "z_copy2.png"),
        ("one colour", "flat.png"),
        ("huge", "large.png"),
        ("tiny", "small.png"),
        ("tiny", "strip.png"),
        ("extreme aspect", "strip.png"),
        ("unreadable", "broken.png"),
    }
    assert report.counts["duplicate"] == 2
    text = summary(report)
    assert "z_copy.png: same content as 003.png" in text and "small.png: 40×31 px" in text and "truncated" in text


def test_many_findings_are_shortened_in_the_summary(image_folder):
    folder = image_folder(1)
    for number in range(12):
        shutil.copy(folder / "000.png", folder / f"copy{number:02d}.png")
    text = summary(examine(folder))
    assert "duplicate: 12" in text and "and 7 more" in text and "copy11" not in text


@pytest.mark.parametrize(("bad", "fatal"), [(1, False), (2, True), (20, True)])
def test_fatal_past_five_percent_unreadable(image_folder, bad, fatal):
    folder = image_folder(20)
    for number in range(bad):
        (folder / f"{number:03d}.png").write_bytes(b"")
    report = examine(folder)
    assert report.fatal is fatal and report.counts["unreadable"] == bad
    assert ("FATAL" in summary(report)) is fatal
    if bad == 20:
        assert report.fatal_reasons == ("none of the 20 images can be read",)


def test_empty_folder_and_missing_path_are_fatal(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images" in examine(tmp_path / "empty").fatal_reasons[0]
    assert "does not exist" in examine(tmp_path / "nowhere").fatal_reasons[0]
    assert summary(examine(tmp_path / "empty")).endswith("a run would stop here")


def test_label_problems_are_counted_and_are_not_fatal(image_folder, coco_file):
    folder = image_folder(3)
    path = coco_file(
        [entry(1, "000.png"), entry(2, "001.png", 60, 40), entry(3, "002.png", 10, 10), entry(4, "lost.png")],
        [box(1, 1), box(2, 1, bbox=(50, 2, 30, 10)), box(3, 1, category_id=9), box(4, 99)],
        [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    )
    report = examine(folder, labels=path)
    assert not report.fatal and report.label_problems.total == 3
    details = {(finding.kind, finding.image_id): finding.detail for finding in report.findings}
    assert set(details) == {
        ("label size differs", "001.png"),
        ("label size differs", "002.png"),
        ("labelled image missing", "lost.png"),
    }
    assert "turned by its EXIF" in details["label size differs", "001.png"]
    assert "EXIF" not in details["label size differs", "002.png"]
    text = summary(report)
    assert "2 boxes of 2 categories on 4 images, 3 images without boxes" in text
    assert "categories without boxes: dog (1)" in text and "unknown category, dropped: annotation 3" in text


def test_unusable_labels_are_fatal(image_folder, coco_file, tmp_path):
    folder = image_folder(2)
    (tmp_path / "broken.json").write_text("{")
    elsewhere = coco_file([entry(1, "x/000.png")], [box(1, 1)], [{"id": 1}], "elsewhere.json")
    nothing = coco_file([entry(1, "000.png")], [box(1, 1, category_id=5)], [{"id": 1}], "nothing.json")
    for path, message in {
        tmp_path / "broken.json": "cannot be read as JSON",
        tmp_path / "missing.parquet": "does not exist",
        elsewhere: "none of its 1 images is in",
        nothing: "no usable box",
    }.items():
        report = examine(folder, labels=path)
        assert report.fatal and message in report.fatal_reasons[0] and report.readable == 2
        assert message in summary(report)


def test_coco_path_is_its_own_labels_and_parquet_labels_are_read(image_folder, coco_file, tmp_path):
    image_folder(2)
    path = coco_file([entry(1, "000.png"), entry(2, "001.png")], [box(1, 1)], [{"id": 1}], "images/instances.json")
    report = examine(path)
    assert not report.fatal and report.labels is not None and len(report.labels) == 2
    source = open_images(tmp_path / "images")
    images = [ImageLabels.build(image_id, (40, 60), [[0, 0, 9, 9]], [0]) for image_id in source.ids]
    write_labels(Labels.from_images(images, [Category(1, "thing")], stage=0), tmp_path / "labels.parquet")
    report = examine(tmp_path / "images", labels=tmp_path / "labels.parquet")
    assert not report.fatal and report.label_problems is None and "2 boxes of 1 categories" in summary(report)


def test_real_set_is_healthy(shared_data):
    report = examine(shared_data / "bccd" / "instances_val.json")
    assert not report.fatal and report.readable == report.total == 72 and report.label_problems.total == 0
