"""Names as other tools wrote them, and the images that they mean."""

from __future__ import annotations

from PIL import Image

from simdetr.data.images import ImageSource
from simdetr.data.label_formats.known_images import KnownImages


def test_label_files_are_matched_without_ending_if_one_image_alone_fits():
    known = KnownImages(sizes={"s/a.b.jpg": (1, 2), "c.jpg": (3, 4), "c.png": (5, 6)})
    assert known.find_stem("s/a.b") == "s/a.b.jpg" and known.find_stem("c") is None
    assert known.sizes(["c.png", "d"]) == [(5, 6), None] and "c.png" in known and "d" not in known
    assert not KnownImages() and KnownImages().find("a") is None


def test_sizes_are_those_of_the_upright_images(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=turned)
    (tmp_path / "broken.jpg").write_bytes(b"no")
    known = KnownImages(ImageSource(tmp_path, ["broken.jpg", "turned.jpg"]))
    assert known.sizes(["turned.jpg", "broken.jpg"]) == [(30, 20), None]


def test_images_near_a_label_file(tmp_path):
    (tmp_path / "set" / "Annotations").mkdir(parents=True)
    (tmp_path / "set" / "JPEGImages").mkdir()
    Image.new("L", (3, 2)).save(tmp_path / "set" / "JPEGImages" / "a.png")
    near = KnownImages.near(tmp_path / "set" / "Annotations", ["a.png", "b.png"])
    assert near.ids == ("a.png",) and near.sizes(["a.png"]) == [(2, 3)]
    assert not KnownImages.near(tmp_path / "set" / "Annotations", ["b.png", "c" * 5000, "d\0"])
