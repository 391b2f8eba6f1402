"""The real converters of other tools on our files, and we on theirs.

They live in an environment of their own, which ``make tools`` makes, and are run there by ``PROGRAM``. FiftyOne needs a
MongoDB and cannot run here: its layouts are built by hand, as it writes them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import open_images
from simdetr.data.label_files import format_named, read_with_report
from simdetr.data.label_formats.conversion import fitting
from simdetr.data.labels import Labels

pytestmark = pytest.mark.slow

PROGRAM = r"""
import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from xml.sax.saxutils import quoteattr

warnings.simplefilter("ignore")


def relative(path, images):
    path = os.fspath(path)
    return os.path.relpath(path, images) if os.path.isabs(path) else path


def names_of(path):
    import yaml

    names = yaml.safe_load((path / "data.yaml").read_text())["names"]
    return dict(enumerate(names)) if isinstance(names, list) else names


def supervision_set(kind, path, images):
    from supervision import DetectionDataset

    images = os.fspath(images)
    if kind == "coco":
        return DetectionDataset.from_coco(images, os.fspath(path))
    if kind == "yolo":
        return DetectionDataset.from_yolo(images, os.fspath(path / "labels"), os.fspath(path / "data.yaml"))
    return DetectionDataset.from_pascal_voc(images, os.fspath(path / "Annotations"))


def read_supervision(kind, path, images):
    found = supervision_set(kind, path, images)
    return {
        relative(name, images): [
            [found.classes[index], *map(float, box)] for index, box in zip(one.class_id, one.xyxy)
        ]
        for name, one in found.annotations.items()
    }


def write_supervision(kind, path, images, out):
    found = supervision_set("coco", path, images)
    out.mkdir()
    if kind == "coco":
        found.as_coco(annotations_path=str(out / "labels.json"))
    elif kind == "yolo":
        found.as_yolo(annotations_directory_path=str(out / "labels"), data_yaml_path=str(out / "data.yaml"))
    else:
        found.as_pascal_voc(annotations_directory_path=str(out / "Annotations"))


def read_globox(kind, path, images):
    from globox import AnnotationSet

    if kind == "coco":
        found = AnnotationSet.from_coco(path)
    elif kind == "voc":
        found = AnnotationSet.from_pascal_voc(path / "Annotations")
    elif kind == "cvat":
        found = AnnotationSet.from_cvat(path)
    else:
        found = AnnotationSet.from_yolo_v5(path / "labels", image_folder=images)
    names = names_of(path) if kind == "yolo" else {}
    return {
        one.image_id: [[names[int(box.label)] if names else box.label, *map(float, box.ltrb)] for box in one.boxes]
        for one in found
    }


def write_globox(kind, path, images, out):
    from globox import AnnotationSet

    found = AnnotationSet.from_coco(path)
    out.mkdir()
    if kind == "coco":
        found.save_coco(out / "labels.json", auto_ids=True)
    elif kind == "voc":
        found.save_pascal_voc(out / "Annotations")
    elif kind == "cvat":
        found.save_cvat(out / "labels.xml")
    else:
        labels = sorted({box.label for one in found for box in one.boxes})
        found.save_yolo_v5(out / "labels", label_to_id={label: place for place, label in enumerate(labels)})
        (out / "classes.txt").write_text("\n".join(labels))


def read_datumaro(kind, path, images):
    from datumaro import AnnotationType, Dataset

    found = Dataset.import_from(os.fspath(path), kind)
    names = [one.name for one in found.categories()[AnnotationType.label]]
    rows = {}
    for item in found:
        rows[item.id] = [
            [None if one.label is None else names[one.label], one.x, one.y, one.x + one.w, one.y + one.h]
            for one in item.annotations
            if one.type.name == "bbox"
        ]
    return rows


def write_datumaro(kind, path, images, out):
    from datumaro import Dataset

    found = Dataset.import_from(os.fspath(path), "coco")
    found.export(os.fspath(out), kind, save_media=True)


def write_label_studio(kind, path, images, out):
    if kind == "import":
        from label_studio_sdk.converter.imports.coco import convert_coco_to_ls

        out.mkdir()
        convert_coco_to_ls(os.fspath(path), os.fspath(out / "tasks.json"))
        return
    from label_studio_sdk.converter import Converter

    names = dict.fromkeys(
        name
        for task in json.loads(path.read_text())
        for one in task.get("annotations", [])
        for result in one["result"]
        for name in result["value"].get("rectanglelabels", [])
    )
    listed = "".join(f"<Label value={quoteattr(name)}/>" for name in names)
    config = (
        f'<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{listed}</RectangleLabels></View>'
    )
    converter = Converter(config, os.fspath(images), download_resources=False)
    getattr(converter, f"convert_to_{kind}")(os.fspath(path), os.fspath(out), is_dir=False)


def main():
    action, tool, kind, path, images, *out = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        if action == "read":
            rows = globals()[f"read_{tool.replace('-', '_')}"](kind, Path(path), Path(images))
        else:
            rows = globals()[f"write_{tool.replace('-', '_')}"](kind, Path(path), Path(images), Path(*out))
    print(json.dumps(rows))


main()
"""
"""Its words are ``read TOOL FORMAT PATH IMAGES``, which prints {image: [[class, x0, y0, x1, y1], …]}, or ``write TOOL
FORMAT FROM IMAGES OUT``; FROM is COCO, or our tasks for Label Studio's exports."""

OURS = 1e-3  # pixels: what we promise of every format
TWO_DECIMALS = 0.006  # datumaro rounds every coordinate to hundredths of a pixel
FIVE_DECIMALS = 0.005  # supervision writes shares of the image with five decimals; the images here have up to 300 px
WHOLE = 0.501  # supervision rounds VOC's corners to whole pixels
CUT_OFF = 1.0  # Label Studio cuts VOC's corners to whole pixels

TRUTH = {
    "a.jpg": ((40, 60), [("cat", 0, 0, 60, 40), ("große Eule", 59, 39, 60, 40), ("cat", 1, 2, 11, 22)]),
    "b b.jpg": ((33, 47), [("große Eule", 1 / 3, 10.1234, 36.98765, 32.9)]),
    "empty.jpg": ((17, 31), []),
    "große.jpg": ((300, 200), [("große Eule", 10, 20, 30, 40), ("cat", 0.5, 0.25, 199.5, 299.75)]),
}
FILES = {"coco": "labels.json", "cvat": "labels.xml", "label-studio": "tasks.json"}


@pytest.fixture(scope="session")
def tools():
    """The interpreter that has the tools."""
    path = Path(os.environ.get("SIMDETR_TOOLS", Path(__file__).parents[3] / ".venv-tools/bin/python"))
    if not path.is_file():
        message = f"no tools: {path} does not exist (`make tools` makes it; SIMDETR_TOOLS names another one)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    return path


@pytest.fixture
def run(tools, photos):
    """Runs ``PROGRAM`` and gives what it prints."""

    def run(action, tool, kind, path, *out):
        command = [tools, "-c", PROGRAM, action, tool, kind, path, photos, *out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def labels():
    names = ("cat", "große Eule")
    images = [
        ImageLabels.build(name, size, [row[1:] for row in rows], [names.index(row[0]) for row in rows])
        for name, (size, rows) in TRUTH.items()
    ]
    return Labels.from_images(images, [Category(1, names[0]), Category(7, names[1])])


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, ((height, width), _) in TRUTH.items():
        Image.new("RGB", (width, height)).save(folder / name)
    return folder


@pytest.fixture
def ours(labels, tmp_path):
    """Writes the labels in one of our formats."""

    def write(kind):
        out = tmp_path / "ours" / FILES.get(kind, kind)
        out.parent.mkdir(exist_ok=True)
        known = format_named(kind)
        known.write(fitting(labels, known)[0], out, None)
        return out

    return write


def read(path, photos, **options):
    """What we read: as the program prints it, and the report."""
    found, report = read_with_report(path, images=open_images(photos), **options)
    assert not report.counts
    rows = {
        one: [
            [found.categories[index].name, *map(float, box)]
            for index, box in zip(found.image(place).classes, found.image(place).boxes_xyxy, strict=True)
        ]
        for place, one in enumerate(found.image_ids)
    }
    return rows, report


def assert_truth(rows, tolerance, without=(), moved=(0, 0, 0, 0)):
    """Images by name or stem, boxes in any order, within a tolerance in pixels and after a shift of their corners."""
    rows = {f"{name.removesuffix('.jpg')}.jpg": boxes for name, boxes in rows.items()}
    assert rows.keys() == TRUTH.keys() - set(without)
    for name, boxes in rows.items():
        expected = sorted(TRUTH[name][1])
        assert [box[0] for box in sorted(boxes)] == [box[0] for box in expected], name
        for got, want in zip(sorted(boxes), expected, strict=True):
            wanted = [value + shift for value, shift in zip(want[1:], moved, strict=True)]
            assert got[1:] == pytest.approx(wanted, abs=tolerance, rel=0), name


# ----------------------------------------------------------------------------------------------------------------------
# supervision 0.31.2


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_supervision_reads_ours(run, ours, kind):
    assert_truth(run("read", "supervision", kind, ours(kind)), OURS)


def test_supervision_takes_our_corners_for_vocs(run, ours):
    # supervision 0.31.2 reads VOC by its rule whatever the file says: from 1, so that minimum corners come one lower
    assert_truth(run("read", "supervision", "voc", ours("voc")), OURS, moved=(-1, -1, 0, 0))


@pytest.mark.parametrize(("kind", "tolerance"), [("coco", OURS), ("yolo", FIVE_DECIMALS), ("voc", WHOLE)])
def test_we_read_supervisions(run, ours, photos, tmp_path, kind, tolerance):
    run("write", "supervision", kind, ours("coco"), tmp_path / "out")
    rows, report = read(tmp_path / "out", photos)
    assert report.format == kind and not report.unlabelled
    assert_truth(rows, tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# globox 2.9.0


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "cvat"])
def test_globox_reads_ours(run, ours, kind):
    # globox 2.9.0 reads VOC's corners as edges from 0, as we write them
    assert_truth(run("read", "globox", kind, ours(kind)), OURS)


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "cvat"])
def test_we_read_globox(run, ours, photos, tmp_path, kind):
    run("write", "globox", kind, ours("coco"), tmp_path / "out")
    rows, report = read(tmp_path / "out", photos)
    assert report.format == kind and not report.unlabelled
    assert_truth(rows, OURS)


# ----------------------------------------------------------------------------------------------------------------------
# datumaro 1.13.12


def datumaros(kind, path, photos, folder):
    """Our file where datumaro looks for it, with the images, and what else it wants."""
    if kind == "coco":
        (folder / "annotations").mkdir(parents=True)
        shutil.copy(path, folder / "annotations" / "instances_train.json")
        shutil.copytree(photos, folder / "images" / "train")
    elif kind == "roboflow_coco":
        shutil.copytree(photos, folder / "train")
        shutil.copy(path, folder / "train" / "_annotations.coco.json")
    elif kind == "cvat":
        shutil.copytree(photos, folder / "images")
        shutil.copy(path, folder)
    elif kind == "voc":
        shutil.copytree(path, folder)
        shutil.copytree(photos, folder / "JPEGImages")
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        (folder / "ImageSets" / "Main" / "train.txt").write_text("\n".join(Path(name).stem for name in TRUTH))
        # datumaro 1.13.12 knows VOC's twenty classes alone, unless a file names others
        (folder / "labelmap.txt").write_text("background:0,0,0::\ncat:1,0,0::\ngroße Eule:0,1,0::\n")
    elif kind == "yolo":
        shutil.copytree(path, folder)
        shutil.copytree(photos, folder / "images")
    else:
        shutil.copytree(path / "labels", folder / "train" / "labels")
        shutil.copytree(photos, folder / "train" / "images")
        shutil.copy(path / "data.yaml", folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "our_kind"),
    [
        ("coco", "coco"),
        ("roboflow_coco", "coco"),
        ("voc", "voc"),
        ("cvat", "cvat"),
        ("yolo", "yolo"),
        ("roboflow_yolo", "yolo"),
    ],
)
def test_datumaro_reads_ours(run, ours, photos, tmp_path, kind, our_kind):
    # datumaro 1.13.12 passes over images with an empty text file in Roboflow's layout alone
    without = ["empty.jpg"] if kind == "roboflow_yolo" else []
    folder = datumaros(kind, ours(our_kind), photos, tmp_path / "theirs")
    assert_truth(run("read", "datumaro", kind, folder), TWO_DECIMALS, without)


@pytest.mark.parametrize("kind", ["coco", "voc", "cvat", "yolo"])
def test_we_read_datumaros(run, ours, photos, tmp_path, kind):
    out = tmp_path / "out"
    run("write", "datumaro", kind, datumaros("coco", ours("coco"), photos, tmp_path / "theirs"), out)
    rows, report = read(out / "annotations" / "instances_train.json" if kind == "coco" else out, photos)
    assert report.format == kind
    if kind == "yolo":  # darknet's layout: the images lie beside their text files
        rows = {name.removeprefix("obj_train_data/"): boxes for name, boxes in rows.items()}
    # datumaro 1.13.12 writes no XML for an image without objects, so that it is unlabelled
    without = ["empty.jpg"] if kind == "voc" else []
    assert_truth(rows, TWO_DECIMALS, without)
    assert report.unlabelled == without


def test_datumaro_takes_coco_class_0_for_background(run, ours, photos, tmp_path):
    content = json.loads(ours("coco").read_text())
    for entry in (*content["annotations"], *content["categories"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = {1: 0, 7: 7}[entry[key]]
    (tmp_path / "zero.json").write_text(json.dumps(content))
    folder = datumaros("coco", tmp_path / "zero.json", photos, tmp_path / "theirs")
    # datumaro 1.13.12 drops the class of boxes whose category has the id 0
    names = [box[0] for boxes in run("read", "datumaro", "coco", folder).values() for box in boxes]
    assert sorted(map(str, names)) == ["None"] * 3 + ["große Eule"] * 3


# ----------------------------------------------------------------------------------------------------------------------
# label-studio-sdk 2.1.2


@pytest.fixture
def with_untouched(ours, tmp_path):
    """Our tasks, one of them an upload, and two more: one that nobody touched, one that was skipped."""
    tasks = json.loads(ours("label-studio").read_text())
    tasks[0]["data"]["image"] = "/data/upload/1/1a2b3c4d-a.jpg"
    for name, drawn in {"new": [], "skipped": [{"id": 99, "was_cancelled": True, "result": []}]}.items():
        data = {"image": f"/data/local-files/?d={name}.jpg"}
        tasks.append({"id": len(tasks) + 1, "data": data, "annotations": drawn})
    path = tmp_path / "more.json"
    path.write_text(json.dumps(tasks))
    return path


@pytest.fixture
def all_photos(photos, tmp_path):
    folder = tmp_path / "all"
    shutil.copytree(photos, folder)
    for name in ("new", "skipped"):
        Image.new("RGB", (9, 9)).save(folder / f"{name}.jpg")
    return folder


@pytest.mark.parametrize(("kind", "tolerance"), [("coco", OURS), ("yolo", OURS), ("voc", CUT_OFF)])
def test_what_label_studio_exports_of_ours(run, with_untouched, all_photos, tmp_path, kind, tolerance):
    run("write", "label-studio", kind, with_untouched, tmp_path / "out")
    if kind == "coco":
        # label-studio-sdk 2.1.2 names images as its server does, and gives those without boxes no size: the finished
        # one and the untouched one alike
        images = json.loads((tmp_path / "out" / "result.json").read_text())["images"]
        names = {image["file_name"]: image["width"] for image in images}
        assert names["/data/upload/1/1a2b3c4d-a.jpg"] == 60 and names["/data/local-files/?d=b%20b.jpg"] == 47
        assert names["/data/local-files/?d=empty.jpg"] is names["/data/local-files/?d=new.jpg"] is None
        assert "/data/local-files/?d=skipped.jpg" not in names
    if kind == "yolo":  # …and writes an empty text file for both
        files = [tmp_path / "out" / "labels" / f"?d={name}.txt" for name in ("empty", "new")]
        assert [path.read_text() for path in files] == ["", ""]
    rows, report = read(tmp_path / "out", all_photos)
    assert_truth(rows, tolerance, ["empty.jpg"])
    assert set(report.unlabelled) >= {"empty.jpg", "new.jpg"} and "skipped.jpg" not in rows


def test_label_studios_corners_of_voc_count_from_0(run, labels, photos, tmp_path):
    inner = labels.rows([2, 4])  # nothing at the border that would show it
    format_named("label-studio").write(inner, tmp_path / "tasks.json", None)
    run("write", "label-studio", "voc", tmp_path / "tasks.json", tmp_path / "out")
    rows, _ = read(tmp_path / "out", photos)
    assert rows == {"a.jpg": [["cat", 1, 2, 11, 22]], "große.jpg": [["große Eule", 10, 20, 30, 40]]}


def test_we_read_what_label_studio_imports_from_coco(run, ours, photos, tmp_path):
    run("write", "label-studio", "import", ours("coco"), tmp_path / "out")
    rows, report = read(tmp_path / "out", photos)
    assert report.format == "label-studio" and not report.unlabelled
    assert_truth(rows, OURS)


def test_label_studios_json_min(run, with_untouched, all_photos, tmp_path):
    run("write", "label-studio", "json_min", with_untouched, tmp_path / "out")
    rows, report = read(tmp_path / "out", all_photos)
    # label-studio-sdk 2.1.2 writes the untouched task too, without any word on who annotated it
    assert report.format == "label-studio" and "new.jpg" not in rows and "skipped.jpg" not in rows
    assert_truth(rows, OURS)


# ----------------------------------------------------------------------------------------------------------------------
# FiftyOne 1.x, by hand


def fiftyones(kind, photos, out):
    """A data set as FiftyOne exports it, where the last image has no labels at all."""
    rows = list(TRUTH.items())
    if kind == "coco":
        shutil.copytree(photos, out / "data")
        names = ["cat", "große Eule"]
        entries = [(place, row) for place, (_, (_, boxes)) in enumerate(rows, start=1) for row in boxes]
        content = {
            "info": {"year": "", "version": "", "description": "Exported from FiftyOne", "contributor": "", "url": ""},
            "licenses": [],
            "categories": [{"id": place, "name": name, "supercategory": None} for place, name in enumerate(names)],
            "images": [
                {"id": place, "file_name": name, "height": h, "width": w, "license": None, "coco_url": None}
                for place, (name, ((h, w), _)) in enumerate(rows, start=1)
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": image,
                    "category_id": names.index(name),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
                for number, (image, (name, x0, y0, x1, y1)) in enumerate(entries, start=1)
            ],
        }
        (out / "labels.json").write_text(json.dumps(content))
    elif kind == "yolo":
        shutil.copytree(photos, out / "images" / "val")
        (out / "labels" / "val").mkdir(parents=True)
        (out / "dataset.yaml").write_text("names:\n  0: cat\n  1: große Eule\npath: .\nval: ./images/val/\n")
        for name, ((h, w), boxes) in rows[:-1]:
            lines = [
                f"{['cat', 'große Eule'].index(one)} {(x0 + x1) / 2 / w} {(y0 + y1) / 2 / h} {(x1 - x0) / w} "
                f"{(y1 - y0) / h}"
                for one, x0, y0, x1, y1 in boxes
            ]
            (out / "labels" / "val" / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    elif kind == "voc":
        shutil.copytree(photos, out / "data")
        (out / "labels").mkdir()
        for name, ((h, w), boxes) in rows[:-1]:
            objects = "".join(
                f"<object><name>{one}</name><bndbox><xmin>{round(x0)}</xmin><ymin>{round(y0)}</ymin>"
                f"<xmax>{round(x1)}</xmax><ymax>{round(y1)}</ymax></bndbox><pose></pose></object>"
                for one, x0, y0, x1, y1 in boxes
            )
            (out / "labels" / f"{Path(name).stem}.xml").write_text(
                f"<annotation><folder></folder><filename>{name}</filename><path>/elsewhere/{name}</path><source>"
                f"<database></database></source><size><width>{w}</width><height>{h}</height><depth>3</depth></size>"
                f"<segmented></segmented>{objects}</annotation>"
            )
    else:
        shutil.copytree(photos, out / "data")
        listed = "".join(
            f'<image id="{place}" name="{name}" width="{w}" height="{h}">'
            + "".join(
                f'<box label="{one}" occluded="0" xtl="{round(x0)}" ytl="{round(y0)}" xbr="{round(x1)}" '
                f'ybr="{round(y1)}"></box>'
                for one, x0, y0, x1, y1 in boxes
            )
            + "</image>"
            for place, (name, ((h, w), boxes)) in enumerate(rows)
        )
        (out / "labels.xml").write_text(
            "<?xml version='1.0' encoding='utf-8'?><annotations><version>1.1</version><meta><task><size>4</size>"
            "<mode>annotation</mode><labels><label><name>cat</name><attributes></attributes></label><label>"
            f"<name>große Eule</name><attributes></attributes></label></labels></task></meta>{listed}</annotations>"
        )
    return out


@pytest.mark.parametrize(("kind", "tolerance"), [("coco", OURS), ("yolo", OURS), ("voc", WHOLE), ("cvat", WHOLE)])
def test_fiftyones_layouts(photos, tmp_path, kind, tolerance):
    folder = fiftyones(kind, photos, tmp_path / "set")
    rows, report = read(folder, photos)
    assert report.format == kind
    without = ["große.jpg"] if kind in ("yolo", "voc") else []  # no file at all
    assert report.unlabelled == without
    assert_truth(rows, tolerance, without)
