import json
from dataclasses import replace

import pytest

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.coco import read_coco, write_detections
from simdetr.data.labels import Labels


def detections():
    images = [
        ImageLabels.build("b.png", (30, 20), [[1, 2, 4, 8], [0, 0, 5, 5]], [1, 0], scores=[0.9, 0.3]),
        ImageLabels.build("none.png", (30, 20), [], []),
        ImageLabels.build("a.png", (40, 60), [[10, 10, 30, 20]], [0], scores=[0.5]),
    ]
    return Labels.from_images(images, [Category(3, "cat"), Category(90, "owl")], stage=1)


def truth_file(coco_file):
    images = [
        {"id": 100, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 7, "file_name": "b.png", "height": 30, "width": 20},
    ]
    annotations = [
        {"id": 1, "image_id": 100, "category_id": 3, "bbox": [10, 10, 20, 10], "area": 200, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 6], "area": 18, "iscrowd": 0},
    ]
    return coco_file(images, annotations, [{"id": 3, "name": "cat"}, {"id": 90, "name": "owl"}], "truth.json")


def test_results_carry_the_ids_of_the_truth(tmp_path, coco_file):
    write_detections(detections(), tmp_path / "out.json", truth_file(coco_file))
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.9},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.3},
        {"image_id": 100, "category_id": 3, "bbox": [10, 10, 20, 10], "score": 0.5},
    ]


def test_pycocotools_scores_the_results(tmp_path, coco_file):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    path = truth_file(coco_file)
    write_detections(detections(), tmp_path / "out.json", path)
    truth = coco.COCO(str(path))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "out.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_pycocotools_scores_the_masks_of_the_results(tmp_path, coco_file):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    content = json.loads(truth_file(coco_file).read_text())
    content["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 10, 20]]  # half of its box
    content["annotations"][1]["segmentation"] = [[1, 2, 4, 2, 4, 8, 1, 8]]
    path = coco_file(content["images"], content["annotations"], content["categories"], "truth.json")
    labels, _ = read_coco(path, masks=True)
    write_detections(labels, tmp_path / "out.json", path)
    truth = coco.COCO(str(path))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "out.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    write_detections(replace(labels, masks=None), tmp_path / "boxes.json", path)
    assert "segmentation" not in (tmp_path / "boxes.json").read_text()


def test_without_truth_images_are_numbered_and_named(tmp_path):
    write_detections(detections(), tmp_path / "out.json")
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [(entry["image_id"], entry["file_name"]) for entry in entries] == [
        (1, "b.png"),
        (1, "b.png"),
        (3, "a.png"),
    ]


def test_image_that_the_truth_lacks_is_an_error(tmp_path, coco_file):
    image = {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
    path = coco_file([image], [], [{"id": 3, "name": "cat"}], "truth.json")
    with pytest.raises(LabelError, match=r"'b.png' has detections but is not in"):
        write_detections(detections(), tmp_path / "out.json", path)
    assert not (tmp_path / "out.json").exists()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(LabelError, match=r"coco_truth: .*broken.json"):
        write_detections(detections(), tmp_path / "out.json", tmp_path / "broken.json")


def test_scores_are_the_shortest_decimals_that_read_back_equal(tmp_path, coco_file):
    image = ImageLabels.build("a.png", (40, 60), [[0, 0, 5, 5]] * 3, [0] * 3, scores=[0.1, 1 / 3, 1e-7])
    labels = Labels.from_images([image], [Category(3, "cat")])
    write_detections(labels, tmp_path / "out.json")
    assert '"score": 0.1,' in (tmp_path / "out.json").read_text()
    read, _ = read_coco(
        coco_file(
            [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
            [{"id": n, **entry} for n, entry in enumerate(json.loads((tmp_path / "out.json").read_text()))],
            [{"id": 3}],
        )
    )
    assert (read.scores == labels.scores).all()


def test_results_carry_points(tmp_path, coco_file):
    labels = replace(detections(), points=[[1.5, 2], [float("nan")] * 2, [30, 20]])
    write_detections(labels, tmp_path / "out.json", truth_file(coco_file))
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [entry["keypoints"] for entry in entries] == [[1.5, 2, 2], [0, 0, 0], [30, 20, 2]]
    write_detections(detections(), tmp_path / "plain.json")
    assert "keypoints" not in (tmp_path / "plain.json").read_text()
