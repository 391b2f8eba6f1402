import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels
from simdetr.data.map3d import COLUMNS, Camera, MapLandmarks, Pose, View, correspondences, map_targets

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
