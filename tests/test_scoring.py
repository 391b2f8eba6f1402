"""One reading of outputs for all scores: validation during training and ``evaluate`` give the same numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from simdetr.boxes import clip, denormalise
from simdetr.exchange.weights import checkpoint_config, save_detector
from simdetr.training.datamodule import DetectionData
from simdetr.training.detection_task import CocoValidation, DetectionTask
from simdetr.training.inference import evaluate, predict

BATCH = {"batch_size": 8, "short_sides": [64], "max_side": 80}


def data_of(scenes, labels, detector):
    data = DetectionData(str(scenes), str(labels), str(scenes), str(labels), **BATCH)
    data.follow(detector.normalisation)  # as a training does before anything is saved
    return data


@pytest.fixture(scope="module")
def detector(make_detector):
    """Random weights; its queries find something everywhere, and are of two classes about as much as of the third."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make_detector(3, num_queries=60, dropout=0.0).eval()


@pytest.fixture(scope="module")
def truth(detector, scenes, tmp_path_factory):
    """Labels that the detector can find: boxes of some queries, a little smaller, with their best or second class."""
    labels = scenes / "instances.json"
    content = json.loads(labels.read_text())
    data = data_of(scenes, labels, detector)
    generator = torch.Generator().manual_seed(0)
    content["annotations"] = []
    for batch in data.val_dataloader():
        with torch.no_grad():
            outputs = detector(batch.images, batch.mask)
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], batch.targets, strict=True):
            size_hw = tuple(target["orig_size"].tolist())
            image = content["images"][int(target["image_index"])]
            for number, query in enumerate(torch.randperm(60, generator=generator)[:6].tolist()):
                inwards = torch.rand(4, generator=generator) * torch.tensor([0.6, 0.6, -0.6, -0.6])
                x0, y0, x1, y1 = (clip(denormalise(boxes[query, None], size_hw), size_hw)[0] + inwards).tolist()
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image["id"],
                        "category_id": content["categories"][int(logits[query].argsort()[-1 - number % 2])]["id"],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                    }
                )
    path = tmp_path_factory.mktemp("truth") / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def data(scenes, truth, detector):
    return data_of(scenes, truth, detector)


@pytest.fixture(scope="module")
def saved(detector, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "detector"
    save_detector(detector, checkpoint_config(detector, data), folder)
    return folder


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_evaluate_equals_validate(class_agnostic, detector, data, saved, scenes, truth, tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[CocoValidation(class_agnostic)],
    )
    (validated,) = trainer.validate(DetectionTask(detector), data, verbose=False)
    evaluated = evaluate(scenes, truth, saved, device="cpu")
    assert validated["val/AR@100" if class_agnostic else "val/AR100"] > 0.3
    names = [name.removeprefix("val/") for name in validated]
    assert len(names) >= 8 and set(names) <= set(evaluated)
    assert {name: evaluated[name] for name in names} == pytest.approx(
        {name: validated[f"val/{name}"] for name in names}, abs=1e-6, nan_ok=True
    )


def test_a_box_of_two_classes_takes_no_place_in_recall_whatever_the_class(saved, scenes, truth):
    """All 60 queries are among the 100 objects, while the 100 best pairs are not of all."""
    pairs, objects = (predict(scenes, saved, device="cpu", one_class=value) for value in (False, True))
    assert set(np.diff(pairs.offsets)) == {100} and set(np.diff(objects.offsets)) == {60}
    distinct = [len(np.unique(pairs.image(row).boxes_xyxy, axis=0)) for row in range(len(pairs))]
    assert min(distinct) < 60
    assert all(len(np.unique(objects.image(row).boxes_xyxy, axis=0)) == 60 for row in range(len(objects)))
    scores = evaluate(scenes, truth, saved, device="cpu")
    assert scores["recall50@100"] == 1


def test_the_library_scores_as_pycocotools_does_from_raw_outputs(detector, data, saved, scenes, truth):
    """The 100 best of all pairs of query and class, by NumPy and pycocotools alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco, rows = COCO(str(truth)), []
    names = {image["file_name"]: image for image in coco.dataset["images"]}
    for batch in data.val_dataloader():
        with torch.no_grad():
            outputs = detector(batch.images, batch.mask)
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], batch.targets, strict=True):
            image = names[data.val_labels.image_ids[int(target["image_index"])]]
            scores = 1 / (1 + np.exp(-logits.double().numpy()))
            for place in np.argsort(-scores, axis=None)[:100]:
                query, label = divmod(int(place), scores.shape[1])
                x, y, w, h = boxes[query].double().numpy() * ([image["width"], image["height"]] * 2)
                x0, x1 = np.clip([x - w / 2, x + w / 2], 0, image["width"])
                y0, y1 = np.clip([y - h / 2, y + h / 2], 0, image["height"])
                category = data.categories[label].id
                box = [x0, y0, x1 - x0, y1 - y0]
                score = scores[query, label]
                rows.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = dict(zip(("AP", "AP50", "AP75"), evaluation.stats[:3], strict=True))
    expected |= dict(zip(("AR1", "AR10", "AR100"), evaluation.stats[6:9], strict=True))
    found = evaluate(scenes, truth, saved, device="cpu")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
