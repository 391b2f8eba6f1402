from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.augmentation import MosaicTiles
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.data.protocols import split
from simdetr.training.datamodule import DetectionData, check_comparable_files, queries_for


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


def on_devices(made, world_size, *, epoch=0, step=0, **changes):
    """As under a trainer with so many processes."""
    made.trainer = SimpleNamespace(
        world_size=world_size,
        global_rank=0,
        current_epoch=epoch,
        global_step=step,
        max_steps=-1,
        accumulate_grad_batches=1,
        default_root_dir=".",
        lightning_module=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    vars(made.trainer).update(changes)
    return made


def test_a_resume_on_fewer_devices_goes_on_with_images_and_schedule(scenes, caplog):
    caplog.set_level(logging.WARNING)
    first = on_devices(data(scenes, batch_size=2, mosaic=0), 2, epoch=1, step=4)  # 3 steps an epoch; 1 of the second
    batches = iter(first.train_dataloader())
    next(batches)
    state = first.state_dict()
    assert state == {"epoch": 1, "served": 1, "seen": 4, "step": 4, "per_step": 4, "ahead": 0}
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()

    second = on_devices(data(scenes, batch_size=2, mosaic=0), 1, epoch=1, step=4)
    second.load_state_dict(state)
    assert "with 2 images per step" in caplog.text and "instead of 4" in caplog.text
    rest = [int(t["image_index"]) for batch in second.train_dataloader() for t in batch.targets]
    assert rest == order[4:]
    # 12 images of the first epoch and 4 of the second are 8 steps of 2, of which 4 were counted
    assert second.steps_ahead() == 4
    assert second.state_dict()["ahead"] == 4

    third = on_devices(data(scenes, batch_size=2, mosaic=0), 1, epoch=1, step=6)  # killed and resumed again
    third.load_state_dict(state | {"per_step": 2, "ahead": 4, "step": 6})
    assert third.steps_ahead() == 4
    limited = on_devices(data(scenes, batch_size=2, mosaic=0), 1, max_steps=100)  # steps count, whatever their size
    limited.load_state_dict(state)
    assert limited.steps_ahead() == 0

    caplog.clear()
    same = on_devices(data(scenes, batch_size=2, mosaic=0), 1, epoch=1, step=4, accumulate_grad_batches=2)
    same.load_state_dict(state)
    assert not caplog.records and same.steps_ahead() == 0


def test_loader_processes_live_on_and_follow_the_machine(scenes, monkeypatch):
    made = on_devices(data(scenes), 1)
    assert made.train_dataloader().num_workers == 0  # on a CPU
    made = on_devices(data(scenes, num_workers=1), 1)
    first, fresh = made.train_dataloader(), on_devices(data(scenes), 1, epoch=1)
    list(first)
    processes = [worker.pid for worker in first._iterator._workers]
    made.trainer.current_epoch = 1
    again = made.train_dataloader()
    assert again is first
    for batch, expected in zip(again, fresh.train_dataloader(), strict=True):
        assert torch.equal(batch.images, expected.images)  # the living processes know the new epoch
    assert [worker.pid for worker in first._iterator._workers] == processes
    made.setup("fit")
    assert made.train_dataloader() is not first


def crowded(*counts, crowd=0):
    """Labels of images with so many objects, and each with some crowds beside them."""
    images = [
        ImageLabels.build(
            f"{number}.png",
            (40, 60),
            [[0, 0, 9, 9]] * (count + crowd),
            [0] * (count + crowd),
            crowd=[False] * count + [True] * crowd,
        )
        for number, count in enumerate(counts)
    ]
    return Labels.from_images(images, [Category(1, "thing")])


def test_tiles_of_mosaics_are_settings_of_a_recipe(recipe):
    options = ("low_resolution=1", "scale_range=[0.25,0.25]", "canvas_px=96", "colour=light")
    config, _ = recipe(*(f"--data.mosaic_tiles.{option}" for option in options), "--data.mosaic=1").resolved()
    assert vars(config.data.mosaic_tiles) == {
        "canvas_px": 96, "low_resolution": 1.0, "scale_range": (0.25, 0.25), "colour": "light",
    }  # fmt: skip
    assert recipe().resolved()[0].data.mosaic_tiles is None


def test_tiles_reach_the_samples(scenes):
    tiles = MosaicTiles(canvas_px=96, low_resolution=1.0, scale_range=(0.25, 0.25))
    module = data(scenes, mosaic=1, mosaic_tiles=tiles)
    batch = next(iter(module.train_dataloader()))
    assert all(target["orig_size"].tolist() == [96, 96] for target in batch.targets)


@pytest.mark.parametrize(
    ("counts", "mosaic", "expected"),
    [
        ((0,), 0.0, 100),
        ((3, 50), 0.0, 100),
        ((3, 51), 0.0, 150),
        ((25, 4), 0.3, 200),
        ((60,), 0.0, 150),
        ((500,), 0, 900),
    ],
)
def test_queries_follow_the_labels(counts, mosaic, expected):
    """Twice the most objects of a sample, which has four images where there are mosaics; crowds do not count."""
    assert queries_for(crowded(*counts, crowd=70), mosaic) == expected


def test_the_detector_has_the_queries_of_the_data(recipe, tmp_path):
    cli = recipe("--data.num_queries=14").training(tmp_path)
    assert cli.model.detector.init_args["num_queries"] == 14 and len(cli.model.detector.query_embed.weight) == 14
    assert cli.datamodule.train_dataloader().dataset.dataset.max_objects == 7


def test_a_fraction_of_the_labels(scenes):
    assert len(data(scenes, label_fraction=0.25).labels) == 3


def test_fractions_are_those_of_split(scenes, tmp_path):
    drawn, larger = (
        read_labels(path)
        for path in split(scenes / "instances.json", tmp_path, "fractions", amounts=[0.25, 0.5], seeds=[3])
    )
    assert set(data(scenes, label_fraction=0.25, seed=3).labels.image_ids) == set(drawn.image_ids)
    assert set(drawn.image_ids) < set(larger.image_ids)


def test_no_validation_without_its_images(scenes):
    assert data(scenes).val_dataloader() == []
    validated = data(scenes, val_images=str(scenes), val_labels=str(scenes / "instances.json"))
    indices = [int(t["image_index"]) for batch in validated.val_dataloader() for t in batch.targets]
    assert indices == list(range(12))


def test_labels_of_other_images_are_an_error(scenes, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "other.png")
    with pytest.raises(LabelError, match=r"instances.json: none of its 12 images is in .*like 'other.png'"):
        DetectionData(str(tmp_path), str(scenes / "instances.json"))


def test_labels_may_name_the_folder_of_images_too(scenes):
    made = DetectionData(str(scenes / "images"), str(scenes / "instances.json"))
    assert all(image_id in made.source for image_id in made.labels.image_ids) and len(made.labels) == 12


def test_validation_of_other_classes_is_refused_and_names_both_files(own_scenes):
    content = json.loads((own_scenes / "instances.json").read_text())
    content["categories"] = [entry | {"id": entry["id"] + 10} for entry in content["categories"]]
    for entry in content["annotations"]:
        entry["category_id"] += 10
    (own_scenes / "val.json").write_text(json.dumps(content))
    files = {"labels": str(own_scenes / "instances.json"), "val_labels": str(own_scenes / "val.json")}
    DetectionData(str(own_scenes), val_images=str(own_scenes), **files).check_validation()  # the names agree
    content["categories"] = [entry | {"name": f"other {entry['id']}"} for entry in content["categories"]]
    (own_scenes / "val.json").write_text(json.dumps(content))
    with pytest.raises(LabelError, match=r"val.json and .*instances.json have no category in common: .*'other 11'"):
        DetectionData(str(own_scenes), val_images=str(own_scenes), **files).check_validation()
    with pytest.raises(LabelError, match="no category in common"):
        check_comparable_files(own_scenes, files["labels"], own_scenes, files["val_labels"])
    check_comparable_files(own_scenes, files["labels"], own_scenes, files["labels"])


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


def names_of(folder):
    return [row["name"] for row in json.loads((folder / "instances.json").read_text())["categories"]]


def test_names_of_the_classes(scenes):
    assert data(scenes).category_names == names_of(scenes)


def test_reference_points_of_training_and_validation(scenes):
    first, *_ = names_of(scenes)
    val = {"val_images": str(scenes), "val_labels": str(scenes / "instances.json")}
    made = data(scenes, reference_points={"default": "center", first: "bottom_right"}, crop=True, **val)
    assert made.reference_points.rules[0] == "bottom_right" and set(made.reference_points.rules[1:]) == {"center"}
    plain = data(scenes, crop=True)
    for batch, same in zip(made.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(batch.images, same.images)  # points draw nothing
        for target, other in zip(batch.targets, same.targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"]) and "points" not in other
            boxes, classes = target["boxes"], target["labels"]
            corner = (classes == 0)[:, None] * boxes[:, 2:] / 2
            assert torch.allclose(target["points"], boxes[:, :2] + corner, atol=1e-5)
    truth = made.val_labels
    low, high = truth.boxes_xyxy[:, :2], truth.boxes_xyxy[:, 2:]
    expected = np.where((truth.classes == 0)[:, None], high, (low + high) / 2)
    np.testing.assert_allclose(truth.points, expected, atol=1e-3)
    assert plain.reference_points is None and plain.labels.points is None


def test_reference_points_of_validation_go_by_name(own_scenes):
    content = json.loads((own_scenes / "instances.json").read_text())
    first, last = content["categories"][0], content["categories"][-1]
    content["categories"] = [last]
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] == last["id"]]
    (own_scenes / "val.json").write_text(json.dumps(content))
    table = {"default": "center", first["name"]: "top_left", last["name"]: "top_right"}
    made = data(own_scenes, reference_points=table, val_images=str(own_scenes), val_labels=str(own_scenes / "val.json"))
    np.testing.assert_array_equal(made.val_labels.points, made.val_labels.boxes_xyxy[:, [2, 1]])


def test_reference_points_that_do_not_fit_are_errors(scenes):
    with pytest.raises(ValueError, match="reference_points: no rule for the class"):
        data(scenes, reference_points={names_of(scenes)[0]: "center"})
    with pytest.raises(LabelError, match=r"'given' for .* needs points, and the labels have none"):
        data(scenes, reference_points={"default": "given"})
    with pytest.raises(ValueError, match="point_margin: expected a fraction"):
        data(scenes, reference_points={"default": "center"}, point_margin=-1)


def test_image_level_labels_train_on_classes_alone(scenes):
    val = {"val_images": str(scenes), "val_labels": str(scenes / "instances.json")}
    made = data(scenes, image_level=True, mosaic=0.0, crop=True, **val)
    boxed = data(scenes)
    assert made.labels.image_ids == boxed.labels.image_ids
    assert made.val_labels.boxes_xyxy.tolist() == boxed.labels.boxes_xyxy.tolist()  # they score
    for batch in made.train_dataloader():
        for target in batch.targets:
            whole = torch.tensor([0.5, 0.5, 1, 1]).expand_as(target["boxes"])
            assert torch.allclose(target["boxes"], whole, atol=1e-6)
            present = boxed.labels.image(int(target["image_index"])).classes
            assert target["labels"].tolist() == sorted(set(present.tolist()))


def test_image_level_labels_of_other_kinds(scenes, tmp_path):
    content = json.loads((scenes / "instances.json").read_text())
    name = {row["id"]: row["name"] for row in content["categories"]}
    file = {row["id"]: row["file_name"].removeprefix("images/") for row in content["images"]}
    lines = [f"{file[row['image_id']]},{name[row['category_id']]}" for row in content["annotations"]]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *lines]))
    options = {"short_sides": (48,), "max_side": 80, "batch_size": 4, "image_level": True}
    made = DetectionData(str(scenes / "images"), str(tmp_path / "labels.csv"), **options)
    assert made.category_names == sorted({name[row["category_id"]] for row in content["annotations"]})
    val = {"val_images": str(scenes), "val_labels": str(scenes / "instances.json")}
    scored = DetectionData(str(scenes / "images"), str(tmp_path / "labels.csv"), **options, **val)
    assert scored.categories == data(scenes).categories  # of the same ids, so that detections match the truth
    for class_name in ("left", "right"):
        (tmp_path / "classes" / class_name).mkdir(parents=True)
    for number, image in enumerate(sorted((scenes / "images").iterdir())):
        target = tmp_path / "classes" / ("left" if number < 5 else "right") / image.name
        target.write_bytes(image.read_bytes())
    folders = DetectionData(str(tmp_path / "classes"), **options)
    assert folders.category_names == ["left", "right"] and folders.labels.classes.tolist() == [0] * 5 + [1] * 7
    assert sum(len(batch.targets) for batch in folders.train_dataloader()) == 12


def test_settings_that_image_level_labels_rule_out(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"mosaic: expected 0 with image_level, got 0.5"):
        data(scenes, image_level=True)
    with pytest.raises(ValueError, match="reference_points: expected none with image_level"):
        data(scenes, image_level=True, mosaic=0.0, reference_points={"default": "center"})
    (tmp_path / "labels.csv").write_text("image,label\n")
    with pytest.raises(LabelError, match=r"labels.csv has no boxes; classes of whole images, as a CSV"):
        DetectionData(str(scenes), str(tmp_path / "labels.csv"))


def test_images_follow_the_detector_wherever_the_user_left_it_open(scenes):
    of_a_detector = {"short_side": 400, "max_side": 500, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    opened = DetectionData(str(scenes), str(scenes / "instances.json"))
    assert (max(opened.short_sides), min(opened.short_sides), opened.max_side) == (800, 480, 1333)
    opened.follow(of_a_detector)
    assert opened.image_settings == of_a_detector
    assert min(opened.short_sides) == 240  # as 480 is to 800

    chosen = data(scenes, mean=(0.5, 0.5, 0.5))
    chosen.follow(of_a_detector)
    assert (chosen.short_sides, chosen.max_side) == ([48, 64], 80)
    assert (chosen.image_settings["mean"], chosen.image_settings["std"]) == ([0.5] * 3, [0.4, 0.5, 0.6])
    half_chosen = DetectionData(str(scenes), str(scenes / "instances.json"), short_sides=(640,))
    half_chosen.follow(of_a_detector)
    assert (half_chosen.short_sides, half_chosen.max_side) == ([640], 1333)


def test_the_normalisation_reaches_the_pixels(scenes):
    options = {"crop": False, "colour": "none", "mosaic": 0.0, "flip": False, "short_sides": (64,), "batch_size": 1}
    val = {"val_images": str(scenes), "val_labels": str(scenes / "instances.json")}
    made, plain = data(scenes, **options, **val), data(scenes, **options, **val, mean=(0.0,) * 3, std=(1.0,) * 3)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.125])
    made.follow({"mean": mean.tolist(), "std": std.tolist()})
    for name in ("train_dataloader", "val_dataloader"):
        found, raw = (next(iter(getattr(each, name)())).images for each in (made, plain))
        torch.testing.assert_close(found, (raw - mean[:, None, None]) / std[:, None, None], atol=1e-5, rtol=1e-5)


def test_unlabelled_images_fill_as_much_of_a_batch(scenes):
    made = data(scenes, unlabelled=str(scenes), label_fraction=0.5, mosaic=0.0)
    assert len(made.labels) + len(made.unlabelled) == 12 and len(made.labels) == 6
    assert not set(made.unlabelled.ids) & set(made.labels.image_ids)
    batches = list(made.train_dataloader())
    assert [len(batch.targets) for batch in batches] == [8, 8]
    names = [made.image_id(int(target["image_index"])) for target in batches[0].targets]
    assert set(names[:4]) <= set(made.labels.image_ids) and set(names[4:]) <= set(made.unlabelled.ids)
    assert [target.get("labelled", True) for target in batches[0].targets] == [True] * 4 + [False] * 4
    assert made.images_per_step == 4, "an epoch is one of the labelled images"


def test_unlabelled_images_of_another_folder_are_all_taken(scenes, own_scenes):
    assert len(data(scenes, unlabelled=str(own_scenes)).unlabelled) == 6
    with pytest.raises(ValueError, match=r"unlabelled: expected images without labels, got 12 of .* all are labelled"):
        data(scenes, unlabelled=str(scenes))


def test_unlabelled_images_need_a_head_that_learns_from_them(scenes):
    made = data(scenes, unlabelled=str(scenes), label_fraction=0.5)
    task = SimpleNamespace(detector=SimpleNamespace(takes_unlabelled=False), image_settings={})
    made.trainer = SimpleNamespace(lightning_module=task)
    with pytest.raises(ValueError, match=r"unlabelled: SimpleNamespace would learn that there is nothing on images"):
        made.setup("fit")
    task.detector.takes_unlabelled = True
    made.setup("fit")


@pytest.mark.parametrize(("num_queries", "warned"), [(None, False), (40, False), (38, True), (2, True)])
def test_more_objects_than_queries_learn_are_told_with_counts(num_queries, warned, own_scenes, caplog):
    path = own_scenes / "instances.json"
    content = json.loads(path.read_text())
    first = content["annotations"][0]
    content["annotations"] = [{**first, "id": number} for number in range(1, 21)]
    path.write_text(json.dumps(content))
    data(own_scenes, num_queries=num_queries)
    assert ("1 of 6 images have more than" in caplog.text) == warned
    assert ("up to 20" in caplog.text and "Raise --data.num_queries, to 40 for all" in caplog.text) == warned
