import json

import numpy as np
import pytest
from PIL import Image

from simdetr.data.scenes import PLAIN_CLASSES, SCENE_CLASSES, SHAPES, TEXTURES, draw_scene, render_scenes


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng((3, i)), (96, 128)) for i in range(60)]


def test_boxes_are_the_tight_extent_of_the_visible_pixels(scenes):
    for scene in scenes:
        assert scene.image.shape == (96, 128, 3) and scene.image.dtype == np.uint8
        assert set(np.unique(scene.owner)) - {-1} == set(range(len(scene.classes)))
        for row, (x0, y0, x1, y1) in enumerate(scene.boxes_xyxy.astype(int)):
            mask = scene.owner == row
            assert mask.sum() == scene.visible_areas[row]
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_scenes_are_varied_enough_to_be_hard(scenes):
    sides = np.concatenate([np.sqrt((s.boxes_xyxy[:, 2:] - s.boxes_xyxy[:, :2]).prod(axis=1)) for s in scenes])
    assert np.percentile(sides, 95) > 3 * np.percentile(sides, 5)
    assert len(np.unique(np.concatenate([s.classes for s in scenes]))) == len(SCENE_CLASSES)
    overlapping = 0
    for scene in scenes:
        boxes = scene.boxes_xyxy
        corner = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        far = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        overlapping += int(((far > corner).all(axis=2).sum(axis=1) > 1).any())
    assert overlapping > 10
    shapes = {name.partition("_")[2] for name in SCENE_CLASSES}
    textures = {name.partition("_")[0] for name in SCENE_CLASSES}
    assert len(shapes) < len(SCENE_CLASSES) and len(textures) < len(SCENE_CLASSES)  # neither alone names the kind


def test_colour_does_not_tell_the_kind(scenes):
    """Nearest class mean by mean object colour is hardly better than guessing (1 in 8)."""
    colours = [s.image[s.owner == row].mean(axis=0) for s in scenes for row in range(len(s.classes))]
    kinds = np.concatenate([s.classes for s in scenes])
    colours = np.array(colours)
    half = len(kinds) // 2
    means = np.stack([colours[:half][kinds[:half] == c].mean(axis=0) for c in range(len(SCENE_CLASSES))])
    guess = np.linalg.norm(colours[half:, None] - means[None], axis=2).argmin(axis=1)
    assert (guess == kinds[half:]).mean() < 0.3


def test_every_shape_and_texture_can_be_drawn():
    names = [f"{texture}_{shape}" for texture in TEXTURES for shape in SHAPES]
    for index, name in enumerate(names):
        scenes = [draw_scene(np.random.default_rng((index, i)), (48, 48), [name]) for i in range(4)]
        assert sum(len(s.classes) for s in scenes) > 0, name


def test_rendered_set_is_valid_coco_and_repeatable(tmp_path):
    first = render_scenes(tmp_path / "a", 5, (64, 80), seed=1)
    longer = render_scenes(tmp_path / "b", 7, (64, 80), seed=1)
    other = render_scenes(tmp_path / "c", 5, (64, 80), seed=2)
    coco = json.loads(first.read_text())
    assert first == tmp_path / "a" / "instances.json"
    assert [c["name"] for c in coco["categories"]] == list(SCENE_CLASSES)
    assert len(coco["images"]) == 5 and len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        with Image.open(tmp_path / "a" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (80, 64)
        same = (tmp_path / "b" / image["file_name"]).read_bytes()
        assert (tmp_path / "a" / image["file_name"]).read_bytes() == same
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert 0 <= x and 0 <= y and w > 0 and h > 0 and x + w <= 80 and y + h <= 64
        assert 0 < annotation["area"] <= w * h
    assert json.loads(longer.read_text())["annotations"][: len(coco["annotations"])] == coco["annotations"]
    assert json.loads(other.read_text())["annotations"] != coco["annotations"]
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images: expected at least 1, got 0"),
        ({"num_images": 1, "size": (16, 64)}, "size: expected .* at least 32 px"),
        ({"num_images": 1, "style": "soft"}, r"style: expected one of \['hard', 'plain'\], got 'soft'"),
        ({"num_images": 1, "classes": ["plaid_box"]}, "classes: expected names .* got 'plaid_box'"),
    ],
)
def test_impossible_scenes_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        render_scenes(tmp_path, **arguments)


def test_plain_scenes_are_easier():
    """Few large objects that hardly hide each other, and a colour that tells the kind."""
    scenes = [draw_scene(np.random.default_rng((4, i)), (96, 96), PLAIN_CLASSES, "plain") for i in range(40)]
    counts = [len(scene.classes) for scene in scenes]
    assert 1 <= min(counts) and max(counts) <= 4 and np.mean(counts) > 2
    boxes = np.concatenate([scene.boxes_xyxy for scene in scenes])
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 12
    colours = np.array([s.image[s.owner == row].mean(axis=0) for s in scenes for row in range(len(s.classes))])
    kinds = np.concatenate([scene.classes for scene in scenes])
    half = len(kinds) // 2
    means = np.stack([colours[:half][kinds[:half] == kind].mean(axis=0) for kind in range(len(PLAIN_CLASSES))])
    guess = np.linalg.norm(colours[half:, None] - means[None], axis=2).argmin(axis=1)
    assert (guess == kinds[half:]).mean() > 0.8
