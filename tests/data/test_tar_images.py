"""Tar shards: every image once and byte for byte, whatever else lies in them and however they are cut."""

import io
import logging
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from upath import UPath

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.augmentation import eval_transforms
from simdetr.data.dataset import DetectionDataset
from simdetr.data.doctor import examine
from simdetr.data.images import UnreadableImageError, numbered, open_images, read_image
from simdetr.data.labels import Labels
from simdetr.reports.drawing import write_pictures


def picture(seed, suffix="png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "jpeg"}.get(suffix, suffix))
    return stream.getvalue()


def write_tar(path, members, **options):
    """Members in their order, with a folder and a link that are no images."""
    with tarfile.open(path, "w", **options) as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a/0.png"
        tar.addfile(link)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


MEMBERS = {
    "./a/0.png": picture(0),
    "a/0.json": b"{}",
    "a/0.cls": b"3",
    "a/1.JPG": picture(1, "jpg"),
    f"{'long' * 60}.png": picture(2),
    "a/._0.png": b"what macOS leaves",
    "a/3.webp": picture(3, "webp"),
}
IDS = ["a/0.png", "a/1.JPG", f"{'long' * 60}.png", "a/3.webp"]


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for index in range(3):
        write_tar(folder / f"{index:03d}.tar", {f"{index}-{i}.png": picture(10 * index + i) for i in range(4)})
    return folder


def as_read_plainly(data):
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_of_a_tar_in_their_order_and_nothing_else(tmp_path, kind, caplog):
    members = {name: data for name, data in MEMBERS.items() if kind != tarfile.USTAR_FORMAT or len(name) < 100}
    source = open_images(write_tar(tmp_path / "x.tar", members, format=kind))
    assert list(source.ids) == [f"x.tar/{name}" for name in IDS if name in members or f"./{name}" in members]
    by_id = {"x.tar/" + name.removeprefix("./"): data for name, data in members.items()}
    for record in source:
        assert record.open().read() == by_id[record.id]
        assert torch.equal(read_image(record), as_read_plainly(by_id[record.id]))
    assert caplog.text == ""


def test_a_folder_a_list_and_a_range_of_tars_are_the_same_source(tars, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"shards/{i:03d}.tar\n" for i in range(3)))
    by_folder = open_images(tars)
    by_range = open_images(f"{tars}/{{000..002}}.tar")
    by_list = open_images(tmp_path / "list.txt")
    assert list(by_folder.ids) == [f"{t:03d}.tar/{t}-{i}.png" for t in range(3) for i in range(4)]
    assert by_folder.fingerprint() == by_range.fingerprint()
    assert [f"shards/{name}" for name in by_folder.ids] == list(by_list.ids)
    for one, other, third in zip(by_folder, by_range, by_list, strict=True):
        assert one.open().read() == other.open().read() == third.open().read()


def test_ranges_of_names():
    assert numbered("a/{08..11}.tar") == ("a/", ["08.tar", "09.tar", "10.tar", "11.tar"])
    assert numbered("s3://b/p{0..1}/x.tar") == ("s3://b/", ["p0/x.tar", "p1/x.tar"])
    assert numbered("a/b.tar") == ("a/", ["b.tar"])
    assert numbered("{5..2}.tar") == ("", ["{5..2}.tar"])


def test_tars_on_another_storage(tars, tmp_path):
    remote = UPath(f"memory://{tmp_path.name}/deep")
    remote.mkdir(parents=True)
    for path in tars.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    here = open_images(tars)
    (tmp_path / "list.txt").write_text(f"{remote}/001.tar\n")
    for there in (open_images(str(remote)), open_images(f"{remote}/{{000..002}}.tar")):
        assert there.ids == here.ids
        assert all(torch.equal(read_image(a), read_image(b)) for a, b in zip(here, there, strict=True))
    listed = open_images(tmp_path / "list.txt")
    assert listed.ids[0] == f"{remote}/001.tar/1-0.png"
    assert torch.equal(read_image(listed[0]), read_image(here[4]))


def test_subsets_threads_and_other_processes_read_the_right_bytes(tars):
    source = open_images(tars)
    some = pickle.loads(pickle.dumps(source.subset([source.ids[9], source.ids[2]])))
    assert torch.equal(read_image(some[0]), read_image(source[9]))
    assert torch.equal(read_image(some.record(source.ids[2])), read_image(source[2]))
    expected = [read_image(record) for record in source]
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, len(source), 200).tolist()
        found = list(pool.map(lambda i: read_image(source[i]), order))
    assert all(torch.equal(expected[i], pixels) for i, pixels in zip(order, found, strict=True))


def test_of_two_members_of_a_name_the_last_counts(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": picture(0)})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture(1))
        tar.addfile(info, io.BytesIO(picture(1)))
    source = open_images(path)
    assert list(source.ids) == ["x.tar/a.png"]
    assert source[0].open().read() == picture(1)


@pytest.mark.parametrize("cut", ["within the data", "within a header", "between members", "before the end mark"])
def test_a_tar_that_is_cut_short_keeps_what_is_whole(tars, cut, caplog):
    path = tars / "001.tar"
    (third, size), (last, last_size) = (open_images(path)[i].span for i in (2, 3))
    end = {
        "within the data": third + size // 2,
        "within a header": third - 300,
        "between members": third - 512,
        "before the end mark": last + -(-last_size // 512) * 512,
    }[cut]
    path.write_bytes(path.read_bytes()[:end])
    with caplog.at_level(logging.WARNING):
        source = open_images(tars)
    kept = 4 if cut == "before the end mark" else 2
    assert [name for name in source.ids if name.startswith("001.tar")] == [f"001.tar/1-{i}.png" for i in range(kept)]
    assert len(source) == 8 + kept
    assert "001.tar" in caplog.text and f"its first {kept} images are used, restore the file" in caplog.text
    assert all(read_image(record).shape == (3, 12, 20) for record in source)


def test_what_is_no_tar_is_told_and_left_out(tars, tmp_path, caplog):
    (tars / "000.tar").write_bytes(b"")
    (tars / "001.tar").write_bytes(b"hello" * 1000)
    with tarfile.open(tars / "002.tar", "w:gz") as tar:
        tar.add(__file__)
    with pytest.raises(ValueError, match="holds no images"):
        open_images(tars)
    assert caplog.text.count("is damaged, compressed or no tar") == 3


def test_errors_of_tar_sources(tars, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"003\.tar does not exist"):
        open_images(f"{tars}/{{000..003}}.tar")
    (tmp_path / "mixed.txt").write_text("shards/000.tar\na.png\n")
    with pytest.raises(ValueError, match="1 tars among 2 lines; split the list"):
        open_images(tmp_path / "mixed.txt")


def test_an_unreadable_member_is_named_with_its_reason(tmp_path):
    source = open_images(
        write_tar(tmp_path / "x.tar", {"d/empty.png": b"", "d/text.png": b"hello", "ok.png": picture(0)})
    )
    for record, reason in zip(source, ["empty file", "no image, or of an unknown format"], strict=False):
        with pytest.raises(UnreadableImageError, match=reason) as error:
            read_image(record)
        assert str(error.value).startswith(f"{tmp_path}/x.tar: d/")


def test_every_reader_of_images_takes_tars(tars, tmp_path):
    """Training data, the doctor and the drawing of boxes."""
    source = open_images(tars)
    dataset = DetectionDataset(source, None, eval_transforms(32, 64))
    assert [sample[1]["orig_size"].tolist() for sample in map(dataset.__getitem__, range(3)) if sample] == [
        [12, 20]
    ] * 3
    with tarfile.open(tars / "003.tar", "w") as tar:
        for name, data in {"same.png": picture(0), "bad.png": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = {(finding.kind, finding.image_id) for finding in examine(tars).findings}
    assert {("duplicate", "003.tar/same.png"), ("unreadable", "003.tar/bad.png")} <= found
    row = ImageLabels(
        image_id=source.ids[5],
        size_hw=(12, 20),
        boxes_xyxy=np.array([[1, 2, 9, 9]], np.float32),
        classes=np.zeros(1, np.int64),
        scores=np.ones(1, np.float32),
        areas=np.array([56], np.float32),
        crowd=np.zeros(1, bool),
    )
    assert write_pictures(source, Labels.from_images([row], (Category(1, "x"),)), tmp_path / "drawn") == 1
    assert (tmp_path / "drawn" / source.ids[5]).is_file()
