import json
import shutil

import numpy as np
import pytest
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.doctor import examine, summary
from simdetr.data.images import open_images
from simdetr.data.label_files import write_labels
from simdetr.data.labels import Labels
from simdetr.training.datamodule import read_training_labels


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
    folder = image_folder(25)
    path = coco_file(
        [entry(1, "000.png"), entry(2, "001.png", 60, 40), entry(3, "002.png", 10, 10), entry(4, "lost.png")]
        + [entry(number + 2, f"{number:03d}.png") for number in range(3, 25)],
        [box(1, 1), box(2, 1, bbox=(50, 2, 30, 10)), box(3, 1, category_id=9), box(4, 99)],
        [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    )
    report = examine(folder, labels=path)
    assert not report.fatal and report.label_problems.total == 5
    found = {(finding.kind, finding.image_id) for finding in report.findings}
    assert found == {("label size differs", "002.png"), ("labelled image missing", "lost.png")}
    text = summary(report)
    assert "2 boxes of 2 categories on 26 images, 25 images without boxes" in text
    assert "1 × height and width exchanged" in text and "1 × labels are of an image of another size: 002.png" in text
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


CROWD = {"iscrowd": "1"}
TWENTY = [entry(number + 1, f"{number:03d}.png") for number in range(20)]
FRACTIONS, CORNERS = (0.1, 0.2, 0.3, 0.4), (30, 20, 55, 35)
STOPPING = {
    "every one of its 20 boxes is a crowd": (TWENTY, [box(n, n) | CROWD for n in range(1, 21)]),
    "there is no usable box": (TWENTY, [box(n, n, category_id=7) for n in range(1, 21)]),
    "bbox looks like fractions of the image; COCO's are pixels": (TWENTY, [box(n, n, 1, FRACTIONS) for n in (1, 2)]),
    "bbox looks like corners": (TWENTY, [box(n, n, 1, CORNERS) for n in range(1, 4)]),
    "2 of its 22 images are not in": ([*TWENTY, entry(21, "x.png"), entry(22, "y.png")], [box(1, 1)]),
    "labels are of an image of another size": ([entry(n, f"{n:03d}.png", 400, 600) for n in (1, 2)], [box(1, 1)]),
}


@pytest.mark.parametrize("reason", STOPPING)
def test_doctor_and_training_stop_for_the_same_reason(image_folder, coco_file, reason):
    folder, path = image_folder(20), coco_file(*STOPPING[reason], [{"id": 1, "name": "cat"}])
    (said,) = examine(folder, labels=path).fatal_reasons
    assert reason in said
    with pytest.raises(LabelError) as raised:
        read_training_labels(path, open_images(folder))
    assert str(raised.value) == said


def test_few_missing_images_stop_neither(image_folder, coco_file, caplog):
    folder, path = image_folder(20), coco_file([*TWENTY, entry(21, "x.png")], [box(1, 1)], [{"id": 1, "name": "cat"}])
    report = examine(folder, labels=path)
    assert not report.fatal and report.counts == {"labelled image missing": 1}
    assert len(read_training_labels(path, open_images(folder))) == 20
    assert "1 of its 21 images are not in" in caplog.text and "left out" in caplog.text


def test_images_alone_have_no_labels_to_be_wrong(image_folder, coco_file):
    image_folder(2)
    for annotations in ({"annotations": []}, {}):
        path = coco_file([entry(1, "000.png")], [], [], "images/test.json")
        path.write_text(json.dumps({"images": [entry(1, "000.png")], **annotations}))
        report = examine(path)
        assert not report.fatal and report.labels is None and report.total == 1


def test_files_of_several_pages_and_dark_images_are_named(tmp_path):
    pages = [Image.fromarray(np.full((40, 60), value, np.uint8)) for value in (0, 90, 200)]
    pages[1].paste(255, (5, 5, 20, 20))
    for name in ("pages.tif", "moving.gif"):
        pages[1].save(tmp_path / name, save_all=True, append_images=pages[2:])
    twelve = np.random.default_rng(0).integers(0, 4096, (40, 60)).astype(np.uint16)
    Image.fromarray(twelve).save(tmp_path / "twelve.tif")
    found = {(finding.kind, finding.image_id): finding.detail for finding in examine(tmp_path).findings}
    assert set(found) == {("more pages", "pages.tif"), ("more pages", "moving.gif"), ("dark", "twelve.tif")}
    assert "2 pages" in found["more pages", "pages.tif"] and "12 bits in 16" in found["dark", "twelve.tif"]


def test_coco_path_is_its_own_labels_and_parquet_labels_are_read(image_folder, coco_file, tmp_path):
    image_folder(2)
    path = coco_file([entry(1, "000.png"), entry(2, "001.png")], [box(1, 1)], [{"id": 1}], "images/instances.json")
    report = examine(path)
    assert not report.fatal and report.labels is not None and len(report.labels) == 2
    source = open_images(tmp_path / "images")
    images = [ImageLabels.build(image_id, (40, 60), [[0, 0, 9, 9]], [0]) for image_id in source.ids]
    write_labels(Labels.from_images(images, [Category(1, "thing")], stage=0), tmp_path / "labels.parquet")
    report = examine(tmp_path / "images", labels=tmp_path / "labels.parquet")
    assert not report.fatal and report.label_problems.total == 0 and "2 boxes of 1 categories" in summary(report)


def test_real_set_is_healthy(shared_data):
    report = examine(shared_data / "bccd" / "instances_val.json")
    assert not report.fatal and report.readable == report.total == 72 and report.label_problems.total == 0
