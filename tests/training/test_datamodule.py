from __future__ import annotations

import json

import pytest
import torch

from simdetr.data.labels import LabelError
from simdetr.training.datamodule import DetectionData


def data(folder, **options):
    settings = {"batch_size": 4, "short_sides": (48, 64), "max_side": 80, "crop": False, "mosaic": 0.5, **options}
    return DetectionData(str(folder), str(folder / "instances.json"), **settings)


def test_classes_and_settings_come_from_the_data(scenes):
    made = data(scenes)
    categories = json.loads((scenes / "instances.json").read_text())["categories"]
    assert made.num_classes == len(categories)
    assert [category.name for category in made.categories] == [row["name"] for row in categories]
    assert made.image_settings["short_side"] == 64
    assert made.image_id(0) == "images/000000.jpg"


def test_batches_depend_on_the_seed_alone(scenes):
    def pixels(**options):
        return torch.cat([batch.images.sum().reshape(1) for batch in data(scenes, **options).train_dataloader()])

    assert torch.equal(pixels(), pixels(num_workers=2))
    assert not torch.equal(pixels(), pixels(seed=1))


def test_position_survives_in_its_state(scenes):
    first = data(scenes)
    batches = iter(first.train_dataloader())
    next(batches)
    second = data(scenes)
    second.load_state_dict(first.state_dict())
    rest = [[int(t["image_index"]) for t in batch.targets] for batch in second.train_dataloader()]
    assert rest == [[int(t["image_index"]) for t in batch.targets] for batch in batches]
    second.teardown("fit")
    assert len(list(second.train_dataloader())) == 3


def test_a_fraction_of_the_labels(scenes):
    assert len(data(scenes, label_fraction=0.25).labels) == 3


def test_no_validation_without_its_images(scenes):
    assert data(scenes).val_dataloader() == []
    validated = data(scenes, val_images=str(scenes), val_labels=str(scenes / "instances.json"))
    indices = [int(t["image_index"]) for batch in validated.val_dataloader() for t in batch.targets]
    assert indices == list(range(12))


def test_labels_of_other_images_are_an_error(scenes, tmp_path):
    made = DetectionData(str(scenes / "images"), str(scenes / "instances.json"))
    with pytest.raises(LabelError, match="12 of 12 labelled images are not in"):
        made.train_dataloader()


def test_problems_of_labels_are_counted_or_errors(own_scenes, caplog):
    path = own_scenes / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 999
    path.write_text(json.dumps(content))
    data(own_scenes)
    assert "1" in caplog.text
    assert "instances.json" in caplog.text
    with pytest.raises(LabelError):
        data(own_scenes, strict=True)


def test_masks_when_asked_for_and_where_there_are_some(own_scenes, caplog):
    folder = own_scenes
    made = data(folder, masks=True)
    assert "has no masks: training goes on with boxes alone" in caplog.text
    assert "masks" not in next(iter(made.train_dataloader())).targets[0]
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
    path.write_text(json.dumps(content))
    for options in ({"masks": True}, {"masks": True, "mosaic": 0.0, "crop": True}):
        for batch in data(folder, **options).train_dataloader():
            for target in batch.targets:
                assert target["masks"].dtype == torch.bool
                assert target["masks"].shape == (len(target["boxes"]), *target["size"].tolist())
    assert data(folder).labels.masks is None
