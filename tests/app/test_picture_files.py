"""Pictures for a browser, and paths that stay inside."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as Pictures

from simdetr.app.picture_files import crop, digest_of, for_browser, look_at, path_of, record_of, thumbnail
from simdetr.app.refusals import Refusal
from simdetr.app.tables import Image, Project
from simdetr.data.images import ImageRecord


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:20, 30:50] = 255
    Pictures.fromarray(pixels).save(folder / "a.png")
    return Project(id=1, name="p", folder=str(folder), own_folder=str(tmp_path / "own"))


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "link.png"])
def test_a_path_that_leads_out_is_none(place, tmp_path, path):
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(Refusal, match="there is no file"):
        path_of(place, Image(id=1, project_id=1, path=path))
    with pytest.raises(Refusal):
        path_of(place, Image(id=1, project_id=1, path="/etc/passwd", uploaded=True))


def test_sizes_are_read_once_and_what_cannot_be_read_is_marked(place, tmp_path):
    image = Image(id=1, project_id=1, path="a.png")
    assert look_at(place, image) and (image.width, image.height) == (60, 40)
    (tmp_path / "photos" / "a.png").unlink()
    assert look_at(place, image)
    gone = Image(id=2, project_id=1, path="a.png")
    assert not look_at(place, gone) and gone.status == "unreadable"


def test_a_crop_has_its_box_in_the_middle(place):
    record = record_of(place, Image(id=1, project_id=1, path="a.png"))
    cut = np.asarray(Pictures.open(io.BytesIO(crop(record, (30, 10, 50, 20), 104))).convert("L"), np.float64)
    assert cut.shape[1] == 104 and cut[cut.shape[0] // 2, 52] > 250 and cut[1, 1] < 5


def size_of(path):
    with Pictures.open(path) as picture:
        return picture.size


def test_thumbnails_are_kept_until_the_file_changes(place, tmp_path):
    record = record_of(place, Image(id=1, project_id=1, path="a.png"))
    first = thumbnail(record, 30, tmp_path / "cache")
    assert size_of(first) == (30, 20) and thumbnail(record, 30, tmp_path / "cache") == first
    Pictures.new("RGB", (20, 40)).save(tmp_path / "photos" / "a.png")
    assert size_of(thumbnail(record, 30, tmp_path / "cache")) == (15, 30)


def test_deep_pictures_are_brought_to_eight_bits(tmp_path):
    Pictures.fromarray(np.full((4, 5), 65535, np.uint16)).save(tmp_path / "deep.png")
    content, kind = for_browser(ImageRecord("deep.png", tmp_path / "deep.png"))
    assert kind == "image/png" and Pictures.open(io.BytesIO(content)).mode == "RGB"


def test_the_hash_is_of_the_content(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b") != digest_of(tmp_path / "c")
