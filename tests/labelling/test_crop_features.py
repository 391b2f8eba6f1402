"""Crops against a plain reading of their rule, and features of many boxes against one image at a time."""

from __future__ import annotations

import json
import threading
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import open_images, read_image
from simdetr.data.labels import Labels
from simdetr.data.pretrained_weights import PACKAGED, PretrainedWeightsError
from simdetr.labelling import crop_features as module
from simdetr.labelling.crop_features import CropEncoder, box_faults, crop_boxes, crop_encoder, crop_features
from simdetr.mining import ColourTextureEncoder, TimmEncoder


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def by_the_rule(pixels, box, size, fill, mode):
    """A black canvas of the whole square, filled pixel by pixel; then one resizing in float32."""
    height, width = pixels.shape[1:]
    x0, y0 = (int(max(0, value)) for value in box[:2])
    x1, y1 = int(min(box[2], width - 1)), int(min(box[3], height - 1))
    side = max(x1 - x0, y1 - y0) + 1
    left, top = x0 - (side - (x1 - x0 + 1)) // 2, y0 - (side - (y1 - y0 + 1)) // 2
    canvas = torch.zeros(3, side, side)
    for row in range(side):
        for column in range(side):
            y, x = top + row, left + column
            within = 0 <= y < height and 0 <= x < width
            if within and (fill == "context" or (x0 <= x <= x1 and y0 <= y <= y1)):
                canvas[:, row, column] = pixels[:, y, x].float()
    extra = {} if mode == "nearest" else {"antialias": True}
    return functional.interpolate(canvas[None], size=(size, size), mode=mode, **extra)[0]


BOXES = [
    [10, 12, 20, 18],  # wide, within
    [10.9, 12.2, 13.1, 30.7],  # high, corners between pixels
    [0, 0, 5, 30],  # high, at the left edge
    [-7, 30, 60, 70],  # over three edges
    [3, 2, 50, 4],  # wide and thin, context ends above
    [40, 35, 48, 40],  # the last pixels
    [47.5, 39.5, 47.9, 39.9],  # a single pixel
    [20, 20, 20, 20],  # no area
]


@pytest.mark.parametrize("fill", ["context", "zero"])
@pytest.mark.parametrize(("mode", "tolerance"), [("nearest", 0), ("bilinear", 1.01)])
@pytest.mark.parametrize("size", [16, 40])
def test_crops_follow_the_rule(fill, mode, tolerance, size):
    pixels = noise(40, 48)
    crops = crop_boxes(pixels, torch.tensor(BOXES), size, fill=fill, interpolation=mode)
    assert crops.dtype == torch.uint8 and crops.shape == (len(BOXES), 3, size, size)
    for crop, box in zip(crops, BOXES, strict=True):
        expected = by_the_rule(pixels, box, size, fill, mode)
        assert (crop.float() - expected).abs().max() <= tolerance, box


def test_a_crop_worked_out_by_hand():
    """A box of 4 x 2 pixels grows by one row above and one below; at the top the row above is black."""
    pixels = torch.arange(48, dtype=torch.uint8).reshape(1, 6, 8).repeat(3, 1, 1)
    inside = crop_boxes(pixels, torch.tensor([[2.0, 2.0, 5.0, 3.0]]), 4)[0, 0]
    assert inside.tolist() == [[8 * y + x for x in range(2, 6)] for y in range(1, 5)]
    border = crop_boxes(pixels, torch.tensor([[2.0, 0.0, 5.0, 1.0]]), 4)[0, 0]
    assert border.tolist() == [[0] * 4, [2, 3, 4, 5], [10, 11, 12, 13], [18, 19, 20, 21]]
    zero = crop_boxes(pixels, torch.tensor([[2.0, 2.0, 5.0, 3.0]]), 4, fill="zero")[0, 0]
    assert zero.tolist() == [[0] * 4, [18, 19, 20, 21], [26, 27, 28, 29], [0] * 4]
    odd = crop_boxes(pixels, torch.tensor([[2.0, 2.0, 5.0, 2.0]]), 4, fill="zero")[0, 0]
    assert [bool(row.any()) for row in odd] == [False, True, False, False]
    assert crop_boxes(pixels, torch.zeros(0, 4)).shape == (0, 3, 224, 224)


def test_a_long_thin_box_takes_no_large_square():
    pixels = torch.full((3, 4, 50_000), 200, dtype=torch.uint8)
    crop = crop_boxes(pixels, torch.tensor([[0.0, 0.0, 50_000.0, 4.0]]), 8)[0]  # its square would be 7.5 GB
    assert crop.shape == (3, 8, 8) and crop.max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(3, 8, 8)}, r"pixels: expected uint8 \[3, H, W\] in RGB, got torch.float32 \(3, 8, 8\)"),
        ({"pixels": torch.zeros(8, 8, 3, dtype=torch.uint8)}, r"got torch.uint8 \(8, 8, 3\)"),
        ({"boxes_xyxy": torch.zeros(4)}, r"boxes_xyxy: expected shape \[n, 4\], got \(4,\)"),
        ({"boxes_xyxy": torch.tensor([[1.0, 1, 2, 2], [8, 0, 9, 9]])}, "image of 8×8 pixels, got .* in row 1"),
        ({"boxes_xyxy": torch.tensor([[0.0, -3, 2, 0]])}, "in row 0"),
        ({"boxes_xyxy": torch.tensor([[3.0, 1, 2, 2]])}, "x0 <= x1"),
        ({"boxes_xyxy": torch.tensor([[1.0, 1, torch.nan, 2]])}, "finite"),
        ({"size": 0}, "size: expected at least 1 pixel, got 0"),
        ({"fill": "edge"}, "fill: expected one of context, zero, got 'edge'"),
        ({"interpolation": "bicubic"}, "interpolation: expected one of bilinear, nearest, got 'bicubic'"),
    ],
)
def test_bad_crops(change, message):
    arguments = {"pixels": noise(8, 8), "boxes_xyxy": torch.tensor([[1.0, 1, 4, 4]])}
    with pytest.raises(ValueError, match=message):
        crop_boxes(**(arguments | change))


# ----------------------------------------------------------------------------------------------------------------------
# Encoders


@pytest.mark.parametrize(("name", "dim"), [("test_resnet", None), ("test_vit", 64)])
def test_a_timm_model_gives_its_own_pooled_features(name, dim):
    encoder = CropEncoder.of_timm(name, random_weights=True, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = timm.create_model(name, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(net)
    assert encoder.size == config["input_size"][-1]
    crops = torch.stack([noise(encoder.size, encoder.size, seed) for seed in range(3)])
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = net((crops / 255 - mean) / std)
    torch.testing.assert_close(encoder(crops), expected, atol=1e-4, rtol=1e-4)
    assert encoder.dim == expected.shape[1] and dim in (None, encoder.dim)
    assert encoder(crops[:0]).shape == (0, encoder.dim)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.train().net.training


def test_fingerprints_tell_weights_and_sizes_apart():
    made = [
        CropEncoder.of_timm("test_resnet", random_weights=True),
        CropEncoder.of_timm("test_resnet", random_weights=True, seed=1),
        CropEncoder.of_timm("test_resnet", random_weights=True, size=96),
        CropEncoder.of_maps(TimmEncoder("test_resnet", random_weights=True)),
    ]
    assert len({encoder.fingerprint for encoder in made}) == 4
    assert made[0].fingerprint == CropEncoder.of_timm("test_resnet", random_weights=True).fingerprint


def test_a_vit_of_another_size():
    encoder = CropEncoder.of_timm("test_vit", random_weights=True, size=96)
    assert encoder(noise(96, 96)[None]).shape == (1, 64)


def test_weights_of_a_file(tmp_path):
    net = timm.create_model("test_resnet")
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    encoder = CropEncoder.of_timm("test_resnet", weights=tmp_path / "weights.pth")
    crops = noise(encoder.size, encoder.size)[None]
    untrained = CropEncoder.of_timm("test_resnet", random_weights=True)
    plain = CropEncoder(nn.Sequential(net, nn.Flatten()), "plain", encoder.size)
    plain.net[0].reset_classifier(0)
    plain.mean, plain.std = encoder.mean, encoder.std
    torch.testing.assert_close(encoder(crops), plain(crops))
    assert (encoder(crops) - untrained(crops)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "encoder", [ColourTextureEncoder(), TimmEncoder("test_resnet", random_weights=True)], ids=["hand-made", "timm"]
)
def test_an_encoder_of_mining_is_averaged(encoder):
    crops = torch.stack([noise(64, 64, seed) for seed in range(2)])
    ours = crop_encoder(encoder)
    expected = encoder(crops / 255)[32].mean(dim=(2, 3))
    torch.testing.assert_close(ours(crops), expected, atol=1e-4, rtol=1e-4)
    assert ours.dim == encoder.region_dim and ours.size == 224
    assert crop_encoder(ours) is ours


def test_a_plain_object_with_the_encoder_protocol_will_do():
    class Means:
        strides, region_dim, fingerprint = (16, 32), 3, "means"

        def __call__(self, images):
            return {stride: functional.avg_pool2d(images, stride) for stride in self.strides}

    crops = torch.full((1, 3, 224, 224), 51, dtype=torch.uint8)
    assert crop_encoder(Means())(crops).tolist() == [pytest.approx([0.2] * 3, rel=1e-4)]


def test_words(tmp_path):
    assert crop_encoder("colour-texture").fingerprint == crop_encoder(ColourTextureEncoder()).fingerprint
    with pytest.raises(ValueError, match=r"encoder: resnet5O cannot be used: .*timm knows no 'resnet5O'; did you mean"):
        crop_encoder("resnet5O")
    with pytest.raises(FileNotFoundError, match="which is not there"):
        crop_encoder(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"encoder\.json"):
        crop_encoder(tmp_path)
    with pytest.raises(TypeError, match="encoder: expected a word, a folder, or an encoder with strides"):
        crop_encoder(nn.Identity())
    with pytest.raises(ValueError, match=r"net: expected pooled features \[B, D\], got \(1, 3, 224, 224\)"):
        CropEncoder(nn.Identity(), "nothing")
    with pytest.raises(ValueError, match="weights, pretrained: expected one of them, got both"):
        CropEncoder.of_timm("resnet18", weights="x.pth", pretrained=True)
    with pytest.raises(ValueError, match="resnet18 would be untrained"):
        CropEncoder.of_timm("resnet18")


def test_weights_of_a_package_are_those_of_the_model():
    try:
        PACKAGED["efficientnet-lite0"].path()
    except PretrainedWeightsError:
        pytest.skip("run `make weights`")
    encoder = crop_encoder("efficientnet-lite0")
    assert (encoder.dim, encoder.size) == (1280, 224)
    assert encoder.mean.flatten().tolist() == pytest.approx([127] * 3)
    crops = torch.stack([torch.full((3, 224, 224), 90, dtype=torch.uint8), noise(224, 224)])
    same = functional.cosine_similarity(*encoder(crops), dim=0)
    assert 0 <= same < 0.9


# ----------------------------------------------------------------------------------------------------------------------
# Features of many boxes


class Counting(nn.Module):
    """Mean colours of the crop's quarters, and how many crops it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return functional.adaptive_avg_pool2d(images, 2).flatten(1)


def counting():
    encoder = CropEncoder(Counting(), "counting", size=32)
    encoder.net.seen = 0
    return encoder


@pytest.fixture
def scene(tmp_path):
    """Five images: usual ones, one without boxes and one with a crowd of them."""
    folder = tmp_path / "images"
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = []
    for number, count in enumerate((3, 0, 150, 2, 4)):
        pixels = draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        low = draw.uniform(0, 40, (count, 2))
        boxes = np.concatenate([low, low + draw.uniform(5, 20, (count, 2))], axis=1)
        rows.append(ImageLabels.build(f"{number}.png", (60, 80), boxes, np.zeros(count)))
    return open_images(folder), Labels.from_images(rows, [Category(1, "thing")])


def one_by_one(source, labels, encoder):
    features = []
    for image in map(labels.image, range(len(labels))):
        crops = crop_boxes(read_image(source.record(image.image_id)), torch.from_numpy(image.boxes_xyxy), encoder.size)
        features.append(encoder(crops).numpy())
    return np.concatenate(features)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_features_are_those_of_each_image_alone(scene, workers, batch_size):
    source, labels = scene
    told = []
    found = crop_features(source, labels, counting(), batch_size=batch_size, num_workers=workers, progress=told.append)
    np.testing.assert_array_equal(found.values, one_by_one(source, labels, counting()))
    assert (found.faults == "").all() and len(found) == 159 == sum(told)
    assert found.unreadable == {}


def test_on_a_cpu_no_threads_disturb_the_encoder(scene, monkeypatch):
    source, labels = scene
    started = []
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *arguments: started.append(arguments))
    crop_features(source, labels, counting())
    assert not started


def test_options_reach_the_crops(scene):
    source, labels = scene
    plain = crop_features(source, labels, counting()).values
    for option in ({"fill": "zero"}, {"interpolation": "nearest"}):
        assert not np.array_equal(crop_features(source, labels, counting(), **option).values, plain), option


def test_each_image_is_decoded_once_and_not_without_boxes(scene, monkeypatch):
    source, labels = scene
    opened = Counter()
    monkeypatch.setattr(module, "read_image", lambda record: opened.update([record.id]) or read_image(record))
    crop_features(source, labels, counting(), batch_size=4)
    assert opened == dict.fromkeys(("0.png", "2.png", "3.png", "4.png"), 1)


def test_a_second_call_encodes_nothing(scene, tmp_path):
    source, labels = scene
    first, second, cache = counting(), counting(), tmp_path / "cache"
    found = crop_features(source, labels, first, cache=cache)
    told = []
    again = crop_features(source, labels, second, cache=cache, progress=told.append)
    assert (first.net.seen, second.net.seen) == (159, 0)
    assert told == [159]
    assert isinstance(again.values, np.memmap) and not again.values.flags.writeable
    np.testing.assert_array_equal(found.values, again.values)
    (record,) = (json.loads(path.read_text()) for path in cache.glob("*.json"))
    assert record["encoder"] == "counting:32px" and record["shape"] == [159, 12]


def test_a_cache_holds_what_belongs_to_other_boxes_encoders_and_crops_apart(scene, tmp_path):
    source, labels = scene
    cache, moved = tmp_path / "cache", labels.boxes_xyxy.copy()
    moved[0, 0] += 1
    shifted = Labels(**{name: getattr(labels, name) for name in labels.__dataclass_fields__} | {"boxes_xyxy": moved})
    other = CropEncoder(Counting(), "another", size=32)
    calls = [
        (labels, counting(), {}),
        (shifted, counting(), {}),
        (labels, other, {}),
        (labels, counting(), {"fill": "zero"}),
    ]
    for of, encoder, option in calls:
        cached = crop_features(source, of, encoder, cache=cache, **option).values
        np.testing.assert_array_equal(cached, crop_features(source, of, encoder, **option).values)
    assert len(list(cache.glob("*.npy"))) == 4


def test_a_killed_run_goes_on(scene, tmp_path, monkeypatch):
    source, labels = scene
    cache = tmp_path / "cache"

    class Failing(Counting):
        def forward(self, images):
            if self.seen >= 50:
                raise KeyboardInterrupt
            return super().forward(images)

    dying = CropEncoder(Failing(), "counting", size=32)
    dying.net.seen = 0
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        crop_features(source, labels, dying, cache=cache, batch_size=10, num_workers=2)
    assert threading.active_count() == before
    (path,) = cache.glob("*.npy")
    half = np.load(path, mmap_mode="r+")
    assert np.isfinite(half).all(axis=1).sum() == 50
    half[49, -1] = np.nan  # as if it had been killed within the row
    del half
    rest = counting()
    found = crop_features(source, labels, rest, cache=cache, batch_size=10)
    assert rest.net.seen == 159 - 49
    np.testing.assert_array_equal(found.values, one_by_one(source, labels, counting()))


def test_boxes_that_cannot_be_cropped(tmp_path):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8) + 9).save(tmp_path / "a.png")
    boxes = [
        [0, 0, 2, 2],  # just large enough
        [5, 5, 6.9, 20],
        [5, 5, 20, 6.9],
        [-10, 0, 0, 10],
        [40, 0, 50, 10],
        [0, 30, 10, 31],
        [-10, -10, 1.5, 20],  # large, but not in the image
        [-10, -10, 2, 20],
        [10, 10, 10, 10],
    ]
    labels = Labels.from_images([ImageLabels.build("a.png", (30, 40), boxes, [0] * 9)], [Category(1, "thing")])
    expected = ["", "too_small", "too_small", "outside", "outside", "outside", "too_small", "", "too_small"]
    assert box_faults(labels).tolist() == expected
    found = crop_features(open_images(tmp_path), labels, counting())
    assert found.faults.tolist() == expected
    assert (np.isnan(found.values).all(axis=1) == (found.faults != "")).all()


def test_unreadable_images_are_told_and_tried_again(scene, tmp_path, caplog):
    source, labels = scene
    path, cache = source.path_of("3.png"), tmp_path / "cache"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    Image.fromarray(np.zeros((80, 60, 3), np.uint8)).save(source.path_of("0.png"))
    told = []
    found = crop_features(source, labels, counting(), cache=cache, progress=told.append)
    rows = np.r_[0:3, 153:155]
    assert np.flatnonzero(found.faults == "unreadable").tolist() == rows.tolist()
    assert np.isnan(found.values[rows]).all() and np.isfinite(np.delete(found.values, rows, axis=0)).all()
    assert found.unreadable["0.png"] == "60×80 pixels, but its labels speak of 80×60"
    assert set(found.unreadable) == {"0.png", "3.png"} and "2 images could not be cropped" in caplog.text
    assert sum(told) == 159
    path.write_bytes(content)
    encoder = counting()
    again = crop_features(source, labels, encoder, cache=cache)
    assert encoder.net.seen == 2 and set(again.unreadable) == {"0.png"}
    assert np.isfinite(again.values[153:155]).all()


def test_bad_calls(scene, tmp_path):
    source, labels = scene
    with pytest.raises(ValueError, match=r"labels: 1 images with boxes are not among the images, such as '3\.png'"):
        crop_features(source.subset(["0.png", "2.png", "4.png"]), labels, counting())
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        crop_features(source, labels, counting(), batch_size=0)
    with pytest.raises(ValueError, match="fill: expected one of"):
        crop_features(source, labels, counting(), fill="edge", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()

    class Broken(Counting):
        def forward(self, images):
            return super().forward(images) / 0

    with pytest.raises(FloatingPointError, match="encoder: NaN or infinity among the features"):
        crop_features(source, labels, CropEncoder(Broken(), "broken", size=32), cache=tmp_path / "cache")


def test_no_boxes_at_all(scene, tmp_path):
    source, labels = scene
    found = crop_features(source, labels.select(["1.png"]), counting(), cache=tmp_path / "cache")
    assert found.values.shape == (0, 12) and len(found.faults) == 0


def test_few_crops_wait_at_a_time(scene):
    """Threads stay a bounded number of crops ahead of the encoder."""
    source, labels = scene
    ids = ("0.png", "3.png", "4.png")
    rows = [labels.of(ids[i % 3]) for i in range(60)]
    loaded = []

    def jobs():
        for row in rows:
            loaded.append(row.image_id)
            boxes = torch.from_numpy(row.boxes_xyxy)
            yield module._Job(source.record(row.image_id), row.size_hw, np.arange(len(row)), boxes)

    loading = module._load_ahead(jobs(), lambda job: module._Loaded(job), threads=2, ahead=6)
    next(loading)
    assert len(loaded) <= 5
    assert sum(1 for _ in loading) == 59


def test_crops_do_not_depend_on_which_others_are_made():
    """Many crops of an image are made from pixels in another layout."""
    pixels, boxes = noise(40, 48), torch.tensor(BOXES)
    one_by_one = torch.cat([crop_boxes(pixels, box[None], 24) for box in boxes])
    assert torch.equal(crop_boxes(pixels, boxes, 24), one_by_one)
    assert torch.equal(crop_boxes(pixels, boxes.repeat(9, 1), 24), one_by_one.repeat(9, 1, 1, 1))
