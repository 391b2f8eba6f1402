import multiprocessing
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from simdetr.data import masks
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.augmentation import Mosaic, MosaicTiles, eval_transforms, train_transforms
from simdetr.data.dataset import DetectionDataset, WithUnlabelled, collate, collate_pairs, item_seed
from simdetr.data.images import UnreadableImageError, open_images
from simdetr.data.labels import Labels
from simdetr.data.quarantine import Quarantine, TooManyUnreadableError

PLAIN = partial(eval_transforms, mean=(0, 0, 0), std=(1, 1, 1))


def labels_for(source, boxes=((6, 4, 30, 24),), size_hw=(40, 60)):
    images = [ImageLabels.build(image_id, size_hw, boxes, [0] * len(boxes)) for image_id in source.ids]
    return Labels.from_images(images, [Category(1, "thing")])


def test_sample_has_the_form_of_the_contract(image_folder):
    source = open_images(image_folder(2))
    image, target = DetectionDataset(source, labels_for(source), PLAIN(80, 200))[1]
    assert type(image) is torch.Tensor and image.dtype == torch.float32 and image.shape == (3, 80, 120)
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    assert {name: (value.dtype, tuple(value.shape)) for name, value in target.items()} == {
        "labels": (torch.int64, (1,)),
        "boxes": (torch.float32, (1, 4)),
        "orig_size": (torch.int64, (2,)),
        "size": (torch.int64, (2,)),
        "image_index": (torch.int64, ()),
        "scores": (torch.float32, (1,)),
        "dropped": (torch.int64, ()),
        "window": (torch.float32, (4,)),
    }
    assert target["scores"].tolist() == [1.0] and int(target["dropped"]) == 0
    assert type(target["boxes"]) is torch.Tensor
    assert torch.allclose(target["boxes"], torch.tensor([[18 / 60, 14 / 40, 24 / 60, 20 / 40]]))
    assert target["orig_size"].tolist() == [40, 60] and target["size"].tolist() == [80, 120]
    assert int(target["image_index"]) == 1


def test_items_follow_the_labels_and_not_the_source(image_folder):
    source = open_images(image_folder(5))
    chosen = labels_for(source).select(["004.png", "001.png"])
    dataset = DetectionDataset(source, chosen, PLAIN(40, 60))
    assert len(dataset) == 2
    image, target = dataset[0]
    expected = np.asarray(Image.open(source.path_of("004.png"))) / np.float32(255)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 1e-6 and int(target["image_index"]) == 0


def test_crowds_are_to_be_ignored_and_an_image_may_have_no_objects(image_folder):
    source = open_images(image_folder(2))
    images = [
        ImageLabels.build("000.png", (40, 60), [[0, 0, 9, 9], [5, 5, 20, 20]], [1, 0], crowd=[True, False]),
        ImageLabels.build("001.png", (40, 60), [], []),
    ]
    labels = Labels.from_images(images, [Category(1, "a"), Category(2, "b")])
    dataset = DetectionDataset(source, labels, train_transforms([32], 64))
    batch = collate([dataset[0], dataset[1]])
    assert len(batch.targets[1]["labels"]) == 0 and batch.targets[1]["boxes"].shape == (0, 4)
    evaluated = DetectionDataset(source, labels, PLAIN(40, 60))[0][1]
    assert evaluated["labels"].tolist() == [0] and evaluated["boxes"].shape == (1, 4)
    assert torch.allclose(evaluated["ignore"], torch.tensor([[4.5 / 60, 4.5 / 40, 9 / 60, 9 / 40]]))
    tiles = MosaicTiles(low_resolution=0)
    mosaic = Mosaic(dataset, probability=1, tiles=tiles)[0][1]  # of four images, with the region in each of two
    assert len(mosaic["labels"]) == len(mosaic["boxes"]) and (mosaic["labels"] == 0).all() and len(mosaic["ignore"])


def scored_labels(source, scores, size_hw=(40, 60)):
    """On every image boxes of these scores, one beside the other, the same class each."""
    boxes = [[x, 4, x + 4, 30] for x in range(0, 2 * len(scores), 2)]
    images = [ImageLabels.build(image_id, size_hw, boxes, [0] * len(scores), scores) for image_id in source.ids]
    return Labels.from_images(images, [Category(1, "thing")])


def test_the_least_certain_objects_past_the_limit_are_left_out(image_folder):
    source = open_images(image_folder(1))
    scores = [0.5, 0.9, 0.1, 0.7, 0.3]
    labels = scored_labels(source, scores)
    target = DetectionDataset(source, labels, PLAIN(40, 60), max_objects=3)[0][1]
    assert torch.allclose(target["scores"], torch.tensor([0.5, 0.9, 0.7])) and int(target["dropped"]) == 2
    # in the order of the file, each with its own box
    assert torch.allclose(target["boxes"][:, 0] * 60, torch.tensor([2.0, 4.0, 8.0]))
    assert len(target["labels"]) == 3
    whole = DetectionDataset(source, labels, PLAIN(40, 60), max_objects=5)[0][1]
    assert torch.allclose(whole["scores"], torch.tensor(scores)) and int(whole["dropped"]) == 0


def test_four_crowded_images_in_one_leave_the_most_certain_objects(image_folder):
    """25 boxes per image and 60 queries: of the mosaic's 100 objects 30 stay, none less certain than one that went."""
    source = open_images(image_folder(4))
    labels = scored_labels(source, [round(0.04 * (rank + 1), 2) for rank in range(25)])
    dataset = DetectionDataset(source, labels, PLAIN(160, 240), max_objects=60 // 2)
    mosaic = Mosaic(dataset, probability=1, tiles=MosaicTiles(low_resolution=0, canvas_px=240))
    for index in range(4):
        target = mosaic[index][1]
        assert len(target["labels"]) == len(target["boxes"]) == 30 and int(target["dropped"]) == 70
        assert target["scores"].min() > 0.04 * 17  # 4 of each of the 7 best, and 2 of the next


def test_masks_come_when_asked_for(image_folder):
    source = open_images(image_folder(2))
    pixels = np.random.default_rng(0).random((3, 40, 60)) > 0.5
    images = [
        ImageLabels.build(
            "000.png",
            (40, 60),
            [[0, 0, 9, 9], [5, 5, 20, 20], [8, 1, 50, 30]],
            [0, 0, 0],
            crowd=[True, False, False],
            masks=masks.encode(pixels),
        ),
        ImageLabels.build("001.png", (40, 60), [], []),
    ]
    labels = Labels.from_images(images, [Category(1, "a")])
    dataset = DetectionDataset(source, labels, PLAIN(40, 60), masks=True)
    raw = dataset.load(0)[1]["masks"]
    assert type(raw) is tv_tensors.Mask and raw.dtype == torch.uint8
    batch = collate([dataset[0], dataset[1]])
    assert type(batch.targets[0]["masks"]) is torch.Tensor and batch.targets[0]["masks"].dtype == torch.bool
    assert (batch.targets[0]["masks"].numpy() == pixels[1:]).all()  # the crowd is left out
    assert batch.targets[1]["masks"].shape == (0, 40, 60)
    resized = DetectionDataset(source, labels, PLAIN(80, 120), masks=True)[0][1]["masks"]
    assert (resized.numpy() == pixels[1:].repeat(2, axis=1).repeat(2, axis=2)).all()
    assert "masks" not in DetectionDataset(source, labels, PLAIN(40, 60))[0][1]
    with pytest.raises(LabelError, match="masks: expected labels with masks, got none"):
        DetectionDataset(source, labels_for(source), PLAIN(40, 60), masks=True)
    with pytest.raises(LabelError, match="masks: expected labels with masks, got none"):
        DetectionDataset(source, None, PLAIN(40, 60), masks=True)


def test_masks_of_labels_of_another_size_are_cut_as_boxes_are(image_folder):
    source = open_images(image_folder(1))
    pixels = np.random.default_rng(0).random((1, 30, 90)) > 0.5
    image = ImageLabels.build("000.png", (30, 90), [[0, 0, 90, 30]], [0], masks=masks.encode(pixels))
    dataset = DetectionDataset(source, Labels.from_images([image], [Category(1, "a")]), PLAIN(40, 60), masks=True)
    found = dataset[0][1]["masks"].numpy()
    assert found.shape == (1, 40, 60) and (found[:, :30] == pixels[:, :, :60]).all() and not found[:, 30:].any()


def test_without_labels_all_images_come_with_empty_targets(image_folder):
    source = open_images(image_folder(3))
    batch = collate([DetectionDataset(source, None, PLAIN(40, 60))[index] for index in range(3)])
    assert [int(target["image_index"]) for target in batch.targets] == [0, 1, 2]
    assert all(target["boxes"].shape == (0, 4) for target in batch.targets)


def test_boxes_beyond_the_actual_image_are_cut(image_folder):
    source = open_images(image_folder(1))
    labels = labels_for(source, boxes=((50, 30, 90, 70), (70, 50, 80, 60)), size_hw=(80, 100))
    _, target = DetectionDataset(source, labels, PLAIN(40, 60))[0]
    assert torch.allclose(target["boxes"], torch.tensor([[55 / 60, 35 / 40, 10 / 60, 10 / 40]]))


def test_labels_of_images_that_are_not_there_are_an_error(image_folder):
    source = open_images(image_folder(2))
    labels = labels_for(source)
    with pytest.raises(LabelError, match=r"1 of 2 labelled images are not in .*first: '001.png'.*like '000.png'"):
        DetectionDataset(source.subset(["000.png"]), labels, PLAIN(40, 60))


def test_collate_pads_below_and_right_and_marks_it():
    sizes = [(4, 7), (6, 3)]
    samples = [(torch.full((3, *size), 2.0), {"n": number}) for number, size in enumerate(sizes)]
    batch = collate([samples[0], None, samples[1]])
    assert batch.images.shape == (2, 3, 6, 7) and batch.mask.shape == (2, 6, 7) and batch.mask.dtype == torch.bool
    for position, (height, width) in enumerate(sizes):
        valid = torch.zeros(6, 7, dtype=torch.bool)
        valid[:height, :width] = True
        assert (batch.mask[position] == ~valid).all()
        assert (batch.images[position] == torch.where(valid, 2.0, 0.0)).all()
    assert [target["n"] for target in batch.targets] == [0, 1]
    assert collate([None, None]) is None


@pytest.fixture
def folder_with_a_bad_image(image_folder):
    folder = image_folder(30)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:200])
    return folder


def test_unreadable_image_is_skipped_and_recorded_in_prediction(folder_with_a_bad_image, tmp_path):
    source = open_images(folder_with_a_bad_image)
    quarantine = Quarantine(tmp_path / "quarantine.csv", total=len(source))
    dataset = DetectionDataset(source, None, PLAIN(40, 60), quarantine=quarantine)
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collate))
    rows = [int(target["image_index"]) for batch in batches for target in batch.targets]
    assert rows == [row for row in range(30) if row != 3]
    assert list(quarantine.reasons) == ["003.png"] and "truncated" in quarantine.reasons["003.png"]


def test_unreadable_image_is_replaced_in_training(folder_with_a_bad_image, tmp_path):
    source = open_images(folder_with_a_bad_image)
    quarantine = Quarantine(tmp_path / "quarantine.csv", total=len(source))
    dataset = DetectionDataset(
        source, labels_for(source), PLAIN(40, 60), quarantine=quarantine, replace_unreadable=True
    )
    image, target = dataset[3]
    assert int(target["image_index"]) == 4 and torch.equal(image, dataset[4][0]) and len(quarantine) == 1


def test_too_many_unreadable_images_stop_the_run(image_folder, tmp_path):
    folder = image_folder(4)
    (folder / "001.png").write_bytes(b"")
    source = open_images(folder)
    dataset = DetectionDataset(source, None, PLAIN(40, 60), quarantine=Quarantine(tmp_path / "q.csv", total=4))
    assert dataset[0] is not None
    with pytest.raises(TooManyUnreadableError, match=r"1 of 4.*001.png: empty file"):
        dataset[1]


def test_nothing_readable_ends_with_an_error_and_not_in_a_loop(image_folder):
    folder = image_folder(3)
    for path in folder.iterdir():
        path.write_bytes(b"")
    source = open_images(folder)
    dataset = DetectionDataset(source, labels_for(source), PLAIN(40, 60), replace_unreadable=True)
    with pytest.raises(UnreadableImageError, match="none of its 3 images can be read"):
        dataset[0]


def same(one, two):
    return (
        one[0].shape == two[0].shape and torch.equal(one[0], two[0]) and torch.equal(one[1]["boxes"], two[1]["boxes"])
    )


def augmented(folder, seed=0):
    source = open_images(folder)
    return DetectionDataset(source, labels_for(source), train_transforms([24, 32, 40], 64), seed=seed)


def test_an_item_depends_on_seed_epoch_and_index_alone(image_folder):
    folder = image_folder(4)
    dataset, again = augmented(folder), augmented(folder)
    first = dataset[2]
    torch.rand(5)
    again[1], again[3]
    assert same(first, again[2]) and same(first, pickle.loads(pickle.dumps(dataset))[2])
    again.set_epoch(1)
    assert again.epoch == 1 and not same(first, again[2]) and not same(first, augmented(folder, seed=1)[2])
    again.set_epoch(0)
    assert same(first, again[2])


def test_the_global_generator_is_left_alone(image_folder):
    dataset = augmented(image_folder(1))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[0]
    assert torch.equal(torch.rand(3), expected)


def test_item_seeds_do_not_collide():
    seeds = {item_seed(seed, epoch, index) for seed in range(8) for epoch in range(8) for index in range(64)}
    assert len(seeds) == 8 * 8 * 64 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # what newer Pythons say of any fork with threads
@pytest.mark.parametrize("method", [name for name in multiprocessing.get_all_start_methods() if name != "forkserver"])
def test_persistent_workers_give_the_same_items_and_see_the_epoch(image_folder, method):
    mosaic = Mosaic(augmented(image_folder(6)), probability=0.5)
    loader = DataLoader(
        mosaic, 2, collate_fn=collate, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    epochs = []
    for epoch in range(2):
        mosaic.set_epoch(epoch)
        loaded = list(loader)
        for number, batch in enumerate(loaded):
            expected = collate([mosaic[2 * number], mosaic[2 * number + 1]])
            assert torch.equal(batch.images, expected.images) and torch.equal(batch.mask, expected.mask)
        epochs.append(loaded)
    assert any(
        one.images.shape != two.images.shape or not torch.equal(one.images, two.images)
        for one, two in zip(*epochs, strict=True)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Where in its file's image a sample lies, and samples of images that nobody has labelled.


@pytest.fixture
def ramp_folder(tmp_path):
    """One image, 100 x 160 px, whose red tells the column and whose green tells the row."""
    rows, columns = np.meshgrid(np.arange(100), np.arange(160), indexing="ij")
    pixels = np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8)
    (tmp_path / "ramp").mkdir()
    Image.fromarray(pixels).save(tmp_path / "ramp" / "ramp.png")
    return tmp_path / "ramp"


@pytest.mark.parametrize("seed", range(6))
def test_the_window_tells_where_every_pixel_came_from(ramp_folder, seed):
    source = open_images(ramp_folder)
    transform = train_transforms([60, 80, 100], 200, crop=True, colour="none", mean=(0, 0, 0), std=(1, 1, 1))
    image, target = DetectionDataset(source, labels_for(source, size_hw=(100, 160)), transform, seed=seed)[0]
    x0, y0, x1, y1 = target["window"].tolist()
    height, width = image.shape[1:]
    columns = (x0 + (x1 - x0) * (torch.arange(width) + 0.5) / width) * 160 - 0.5
    rows = (y0 + (y1 - y0) * (torch.arange(height) + 0.5) / height) * 100 - 0.5
    inner = slice(4, -4)  # interpolation stops at the border
    assert float((255 * image[0, inner, inner] - columns[inner]).abs().max()) < 1.5
    assert float((255 * image[1, inner, inner] - rows[inner, None]).abs().max()) < 1.5


def test_windows_are_mirrored_cut_and_whole_and_a_mosaic_has_none(ramp_folder):
    source = open_images(ramp_folder)
    labels = labels_for(source, size_hw=(100, 160))
    transform = train_transforms([60, 80, 100], 200, colour="none")
    windows = torch.stack(
        [DetectionDataset(source, labels, transform, seed=seed)[0][1]["window"] for seed in range(24)]
    )
    assert (windows[:, 0] > windows[:, 2]).any() and (windows[:, 0] < windows[:, 2]).any()
    assert (
        ((windows[:, 2] - windows[:, 0]).abs() < 0.9).any() and (windows >= -1e-6).all() and (windows <= 1 + 1e-6).all()
    )
    plain = DetectionDataset(source, labels, PLAIN(50, 200))
    torch.testing.assert_close(plain[0][1]["window"], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert Mosaic(plain, probability=1.0)[0][1]["window"].isnan().all()


def test_every_labelled_sample_comes_with_an_unlabelled_one(image_folder):
    labelled = augmented(image_folder(4))
    others = DetectionDataset(open_images(image_folder(3, "pool")), None, train_transforms([24], 64))
    paired = WithUnlabelled(labelled, others, seed=1)
    assert len(paired) == 4
    seen = []
    for epoch in range(3):
        paired.set_epoch(epoch)
        assert labelled.epoch == others.epoch == epoch
        for index in range(4):
            own, other = paired[index]
            assert same(own, labelled[index]) and "labelled" not in own[1]
            assert other[1]["labelled"] is False and len(other[1]["labels"]) == 0
            seen.append(int(other[1]["image_index"]) - 4)
    assert sorted(seen) == sorted([0, 1, 2] * 4), "all alike often"
    batch = collate_pairs([paired[0], paired[1]])
    assert len(batch.images) == 4
    assert [target.get("labelled", True) for target in batch.targets] == [True, True, False, False]
    with pytest.raises(ValueError, match="unlabelled: expected at least 1 image that is not among the labelled ones"):
        WithUnlabelled(labelled, DetectionDataset(others.source.subset([]), None, PLAIN(24, 64)))
