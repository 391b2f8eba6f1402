"""Projection by hand, against OpenCV, and there and back again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.data.map3d import (
    COLUMNS,
    Camera,
    MapLandmarks,
    Pose,
    View,
    back_project,
    correspondences,
    map_targets,
    project,
    read_map,
)

IDENTITY = Pose(np.eye(3), np.zeros(3))
CATEGORIES = (Category(1, "mark"), Category(2, "sign"))
LENS = (-0.28, 0.09, 0.0012, -0.0007, -0.011)


def camera(distortion=(0, 0, 0, 0, 0), skew=0.0):
    return Camera(1280, 720, np.array([[1000, skew, 640], [0, 1000, 360], [0, 0, 1]]), distortion)


def yawed(degrees):
    """A camera turned to the right, so that the world turns to the left."""
    return Pose(Rotation.from_euler("y", -degrees, degrees=True).as_matrix(), np.zeros(3))


def random_view(seed):
    """A pose anywhere, and points that lie in its image."""
    generator = np.random.default_rng(seed)
    pose = Pose(Rotation.random(random_state=seed).as_matrix(), generator.uniform(-500, 500, 3))
    pixels = generator.uniform(0, 1, (200, 2)) * (1280, 720)
    return pose, pixels, generator.uniform(0.2, 150, 200)


def test_numbers_by_hand():
    pixels, depth = project([[2, -1, 20]], camera(), IDENTITY)
    assert pixels.tolist() == [[740, 310]] and depth.tolist() == [20]
    turned, _ = project([[2, -1, 20]], camera(), yawed(10))
    assert turned[0] == pytest.approx([564.996, 310.108], abs=5e-4)
    assert Camera.from_field_of_view(60, 1280, 720).matrix[0, 0] == pytest.approx(1108.513, abs=5e-4)
    assert Camera.from_field_of_view(90, 1280, 720).matrix.tolist() == pytest.approx(
        np.array([[640, 0, 640], [0, 640, 360], [0, 0, 1]]), abs=1e-9
    )
    # the edge of the image is half the field of view away
    edge, _ = project([[np.tan(np.radians(30)), 0, 1]], Camera.from_field_of_view(60, 1280, 720), IDENTITY)
    assert edge[0] == pytest.approx([1280, 360])
    moved, _ = project([[3, -1, 25]], camera(), Pose(np.eye(3), [1, 0, 5]))  # X - t is the first point
    assert moved.tolist() == [[740, 310]]


def test_points_behind_the_camera_are_no_targets_and_no_error():
    pixels, depth = project([[0, 0, -1], [0, 0, 0]], camera(), IDENTITY)
    assert np.isnan(pixels).all() and depth.tolist() == [-1, 0]
    xyz = [[0, 0, -1], [0, 0, 0], [0, 0, 0.1], [0, 0, 0.1001], [2, -1, 20], [-20, 0, 20], [0, 8, 20]]
    landmarks = MapLandmarks(np.array(xyz, float), np.zeros(7, int), CATEGORIES)
    labels = map_targets(landmarks, [View("a.png", camera(), IDENTITY)])
    np.testing.assert_array_equal(labels.points, [[640, 360], [740, 310]])  # too near, left of and below the image


@pytest.mark.parametrize("distortion", [np.zeros(5), LENS])
@pytest.mark.parametrize("seed", range(10))
def test_there_and_back_again(seed, distortion):
    pose, pixels, depths = random_view(seed)
    lens = camera(distortion, skew=3.0)
    world = back_project(pixels, depths, lens, pose)
    again, found = project(world, lens, pose)
    assert np.abs(again - pixels).max() < 1e-6
    np.testing.assert_allclose(found, depths, atol=1e-9)


@pytest.mark.parametrize("distortion", [np.zeros(5), LENS, (0.1, 0.02, -0.003, 0.002, 0.001)])
@pytest.mark.parametrize("seed", range(5))
def test_projection_is_that_of_opencv(seed, distortion):
    cv2 = pytest.importorskip("cv2")
    pose, pixels, depths = random_view(seed)
    lens = camera(distortion)
    world = back_project(pixels, depths, camera(), pose)  # in the image or, by the lens, near it
    vector = Rotation.from_matrix(pose.rotation).as_rotvec()
    translation = -pose.rotation @ pose.position
    expected, _ = cv2.projectPoints(world, vector, translation, lens.matrix, np.asarray(distortion, float))
    assert np.abs(project(world, lens, pose)[0] - expected[:, 0]).max() < 1e-6


def test_a_lens_does_not_fold_far_points_back_into_the_image():
    lens = Camera(1280, 720, camera().matrix, [-0.28, 0, 0, 0, 0])
    tan = 1.85  # 62 degrees off the axis of a camera that sees 33: 1 + k1 r² is all but 0 there
    pixels, _ = project([[tan, 0, 1], [0.5, 0, 1]], lens, IDENTITY)
    assert (pixels >= 0).all() and (pixels < [1280, 720]).all()
    landmarks = MapLandmarks(np.array([[tan, 0, 1], [0.5, 0, 1]]), np.array([0, 1]), CATEGORIES)
    assert map_targets(landmarks, [View("a", lens, IDENTITY)]).classes.tolist() == [1]


def test_targets_are_labels_of_points(tmp_path):
    xyz = [[2, -1, 20], [0, 0, 10], [0, 0, -5]]
    landmarks = MapLandmarks(np.array(xyz, float), np.array([1, 0, 1]), CATEGORIES)
    back = Pose(np.diag([-1.0, 1, -1]), np.zeros(3))
    small = Camera.from_field_of_view(90, 64, 48)
    views = [View("a.png", camera(), IDENTITY), View("back.png", small, back), View("none.png", small, yawed(90))]
    labels = map_targets(landmarks, views)
    assert labels.image_ids == ("a.png", "back.png", "none.png") and labels.offsets.tolist() == [0, 2, 3, 3]
    assert labels.sizes_hw.tolist() == [[720, 1280], [48, 64], [48, 64]] and labels.categories == CATEGORIES
    assert labels.points.tolist() == [[740, 310], [640, 360], [32, 24]] and labels.classes.tolist() == [1, 0, 1]
    assert labels.boxes_xyxy.tolist() == np.tile(labels.points, 2).tolist() and labels.areas.tolist() == [0, 0, 0]
    write_labels(labels, tmp_path / "a.parquet")
    assert read_labels(tmp_path / "a.parquet").points.tolist() == labels.points.tolist()
    visible = np.array([[False, True, True], [True, True, False], [True, True, True]])
    assert map_targets(landmarks, views, visible).points.tolist() == [[640, 360]]
    assert len(map_targets(landmarks, [])) == 0
    nothing = MapLandmarks(np.zeros((0, 3)), np.zeros(0, int), CATEGORIES)
    assert map_targets(nothing, views).offsets.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"visible: expected shape \(3, 3\) \(views, landmarks\), got \(3,\)"):
        map_targets(landmarks, views, visible[0])


@pytest.mark.parametrize("angle", [0, 180, -20, 400, float("nan")])
def test_angles_that_no_camera_sees(angle):
    with pytest.raises(ValueError, match="horizontal_deg: expected a field of view between 0 and 180 degrees, got"):
        Camera.from_field_of_view(angle, 1280, 720)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pose(np.eye(3) * 1.001, np.zeros(3)), r"rotation: expected an orthonormal matrix.*off by 0.0034"),
        (lambda: Pose(np.diag([1, 1, -1]), np.zeros(3)), "the determinant is -1"),
        (lambda: Pose(np.eye(2), np.zeros(3)), r"rotation: expected 3 × 3 finite numbers, got shape \(2, 2\)"),
        (lambda: Pose(np.eye(3), [0, 0]), r"position: expected 3 finite numbers, got shape \(2,\)"),
        (lambda: Pose(np.eye(3), [0, 0, np.inf]), r"position: expected 3 finite numbers.*inf"),
        (lambda: camera(distortion=[0, 0]), r"distortion \(k1, k2, p1, p2, k3\): expected 5 finite numbers"),
        (lambda: Camera(0, 720, np.eye(3)), "at least 1 px, got 0 × 720"),
        (lambda: Camera(9, 9, np.diag([1, -1, 1])), "camera matrix: expected rows .fx, skew, cx."),
        (lambda: Camera(9, 9, np.eye(3).T + np.eye(3)), "camera matrix: expected rows"),
        (
            lambda: project([[0, 0]], camera(), IDENTITY),
            r"points_xyz: expected n × 3 finite numbers, got shape \(1, 2\)",
        ),
        (lambda: project([[0, 0, np.nan]], camera(), IDENTITY), "points_xyz: expected n × 3 finite numbers"),
        (lambda: back_project([[0, 0]], [1, 2], camera(), IDENTITY), "depths: expected 1 finite numbers"),
        (
            lambda: MapLandmarks(np.zeros((2, 3)), [0, 2], CATEGORIES),
            r"classes: expected 2 numbers from 0 to 1.*\[0, 2\]",
        ),
        (lambda: MapLandmarks(np.zeros((2, 3)), [0], CATEGORIES), "classes: expected 2 numbers"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rotation_within_the_tolerance_is_taken():
    nearly = np.eye(3) * (1 + 2e-4)
    np.testing.assert_array_equal(Pose(nearly, np.zeros(3)).rotation, nearly)


EYE = np.eye(3).tolist()


def content():
    return {
        "camera": {"width": 1280, "height": 720, "matrix": [[1000, 0, 640], [0, 1000, 360], [0, 0, 1]]},
        "landmarks": [{"class": "sign", "xyz": [2, -1, 20]}, {"class": "mark", "xyz": [0, 0, 10]}],
        "images": [
            {"id": "a.png", "position": [0, 0, 0], "rotation": EYE},
            {"id": "b.png", "position": [0, 0, 0], "rotation": EYE, "hidden": [1]},
            {
                "id": "c.png",
                "position": [0, 0, 0],
                "rotation": EYE,
                "camera": {"width": 64, "height": 48, "fov_deg": 90, "distortion": [0, 0, 0, 0, 0]},
            },
        ],
    }


def written(tmp_path, change):
    made = content()
    change(made)
    path = tmp_path / "map.json"
    path.write_text(json.dumps(made))
    return path


def test_a_map_becomes_labels(tmp_path):
    labels = map_targets(*read_map(written(tmp_path, lambda made: None)))
    assert [category.name for category in labels.categories] == ["mark", "sign"]
    assert [labels.of(name).points.tolist() for name in ("a.png", "b.png")] == [[[740, 310], [640, 360]], [[740, 310]]]
    assert labels.of("a.png").classes.tolist() == [1, 0]
    assert labels.of("c.png").size_hw == (48, 64) and labels.of("c.png").points[1].tolist() == [32, 24]
    empty = map_targets(*read_map(written(tmp_path, lambda made: made.update(landmarks=[], images=made["images"][:1]))))
    assert len(empty) == 1 and len(empty.points) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("images"), "map.json is no map: expected the lists images"),
        (lambda made: made["landmarks"][0].pop("xyz"), "landmarks: expected the field 'xyz'"),
        (lambda made: made["landmarks"][0].update(xyz=[1, 2]), "map.json: landmarks: "),
        (lambda made: [entry.update(xyz=[1, 2]) for entry in made["landmarks"]], "points_xyz: expected n × 3 finite"),
        (lambda made: made["landmarks"].append(5), "map.json: landmarks: "),
        (lambda made: made["camera"].pop("matrix"), "camera: expected the field 'fov_deg'"),
        (lambda made: made["camera"].update(matrix=EYE[:2]), "camera: camera matrix: expected 3 × 3"),
        (lambda made: made.pop("camera"), "images, number 1: expected the field 'camera'"),
        (lambda made: made["images"][1].pop("position"), "images, number 2: expected the field 'position'"),
        (lambda made: made["images"][2]["camera"].update(fov_deg=180), "images, number 3: horizontal_deg: expected"),
        (
            lambda made: made["images"][0].update(rotation=[[2, 0, 0]] * 3),
            "images, number 1: rotation: expected an orth",
        ),
        (lambda made: made["images"][1].update(hidden=[2]), r"number 2: hidden: expected places .* 0 to 1, got \[2\]"),
        (lambda made: made["images"][1].update(hidden=True), "map.json: images, number 2: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(LabelError, match=message):
        read_map(written(tmp_path, change))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LabelError, match=r"missing.json does not exist"):
        read_map(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(LabelError, match=r"text.json cannot be read as JSON"):
        read_map(tmp_path / "text.json")


CAMERA = Camera.from_field_of_view(60, 1280, 720)
MAP = (Category(1, "mark"), Category(2, "sign"))


def random_map(seed=0):
    generator = np.random.default_rng(seed)
    xyz = generator.uniform([-8, -3, 8], [8, 3, 40], (40, 3))
    return MapLandmarks(xyz, generator.integers(0, 2, 40), MAP)


def test_pairs_lead_back_to_the_pose(tmp_path):
    cv2 = pytest.importorskip("cv2")
    landmarks = random_map()
    true = Pose(Rotation.from_euler("xyz", [1, 4, -2], degrees=True).as_matrix(), np.array([0.3, 0.1, -0.5]))
    rough = Pose(Rotation.from_euler("xyz", [1, 4.2, -2], degrees=True).as_matrix(), np.array([0.32, 0.1, -0.5]))
    recognised = map_targets(landmarks, [View("a.png", CAMERA, true)])
    pairs = correspondences(recognised, landmarks, [View("a.png", CAMERA, rough), View("b.png", CAMERA, rough)])
    assert list(pairs.columns) == COLUMNS and len(pairs) == len(recognised.points) > 10
    assert (
        not pairs["landmark"].duplicated().any() and (pairs["error_px"] <= 20).all() and (pairs["error_px"] > 1).any()
    )
    pixels, world = pairs[["x_px", "y_px"]].to_numpy(), pairs[["map_x", "map_y", "map_z"]].to_numpy()
    _, vector, translation = cv2.solvePnP(world, pixels, CAMERA.matrix, None)
    rotation = Rotation.from_rotvec(vector[:, 0]).as_matrix()
    np.testing.assert_allclose(rotation, true.rotation, atol=1e-4)
    np.testing.assert_allclose(-rotation.T @ translation[:, 0], true.position, atol=1e-3)
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    assert (tmp_path / "pairs.csv").read_text().startswith("image,class,score,x_px")


def test_classes_radius_and_once_each():
    straight = Pose(np.eye(3), np.zeros(3))
    camera = Camera(200, 100, np.array([[100, 0, 100], [0, 100, 50], [0, 0, 1]]))
    landmarks = MapLandmarks(np.array([[0, 0, 1.0], [0.1, 0, 1], [0, 0, -1]]), np.array([1, 1, 1]), MAP)  # x 100, 110
    points = [[104, 50], [98, 50], [100, 51], [160, 50], [np.nan, np.nan]]
    own = (Category("s", "sign"), Category("m", "mark"))  # matched by name
    boxes = [[0, 0, 9, 9]] * 5
    image = ImageLabels.build("a", (100, 200), boxes, [0, 0, 1, 0, 0], scores=[0.5] * 5, points=points)
    found = correspondences(Labels.from_images([image], own), landmarks, [View("a", camera, straight)], 12)
    # 98 is in reach of the first one alone, so 104 takes the second; the mark and the far one have none
    assert sorted(found[["x_px", "landmark", "error_px"]].values.tolist()) == [[98, 0, 2], [104, 1, 6]]
    assert found["class"].tolist() == ["sign"] * 2 and found["score"].tolist() == [0.5] * 2
    nothing = Labels.from_images([ImageLabels.build("a", (100, 200), [], [], points=[])], own)
    assert list(correspondences(nothing, landmarks, [View("a", camera, straight)]).columns) == COLUMNS
    with pytest.raises(ValueError, match="recognised: expected labels with points, got none"):
        correspondences(Labels.from_images([], own), landmarks, [])
