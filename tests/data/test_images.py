from __future__ import annotations

import io
import json
import logging
import pickle
import struct
import tarfile
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from upath import UPath

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.augmentation import eval_transforms
from simdetr.data.dataset import DetectionDataset
from simdetr.data.doctor import examine
from simdetr.data.images import (
    ImageSource,
    UnreadableImageError,
    darkness,
    numbered,
    open_images,
    page_count,
    read_image,
    warn_if_dark,
)
from simdetr.data.labels import Labels
from simdetr.data.storage import locate
from simdetr.reports.drawing import write_pictures

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)


def saved(path, array_or_image, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    image.save(path, **options)
    return path


def rgb_of(path):
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def test_rgb_png_comes_back_as_it_was(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    assert (rgb_of(saved(tmp_path / "a.png", array)) == array).all()


def test_grayscale_has_three_equal_channels(tmp_path):
    assert (rgb_of(saved(tmp_path / "a.png", GREY)) == GREY[..., None]).all()


def test_one_bit_image_is_black_and_white(tmp_path):
    bits = GREY % 2 == 0
    assert (rgb_of(saved(tmp_path / "a.png", bits)) == 255 * bits[..., None]).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_by_257(tmp_path, name):
    sixteen = GREY.astype(np.uint16) * 257
    assert (rgb_of(saved(tmp_path / name, sixteen)) == GREY[..., None]).all()


def test_big_endian_sixteen_bit_tiff(tmp_path):
    pixels = (GREY.astype(np.uint16) * 257).astype(">u2").tobytes()
    tags = [(256, 20), (257, 12), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 12)]
    tags.append((279, len(pixels)))
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(
        b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + struct.pack(">I", 0) + pixels
    )
    with Image.open(tmp_path / "a.tif") as stored:
        assert stored.mode == "I;16B"
    assert (rgb_of(tmp_path / "a.tif") == GREY[..., None]).all()


def test_palette_image(tmp_path):
    palette = Image.fromarray(GREY // 120).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    expected = np.where((GREY // 120)[..., None] == 0, [255, 0, 0], [0, 0, 255])
    assert (rgb_of(saved(tmp_path / "a.png", palette)) == expected).all()


def test_palette_with_bytes_of_transparency_lies_on_white_and_does_not_warn(tmp_path):
    palette = Image.fromarray(GREY // 120).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    path = saved(tmp_path / "a.png", palette, transparency=bytes([0, 255]))
    expected = np.where((GREY // 120)[..., None] == 0, [255, 255, 255], [0, 0, 255])
    assert (rgb_of(path) == expected).all()


def test_rgba_is_blended_with_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = [[0, 255, 128]] * 2
    expected = np.round(rgba[..., :3] * (rgba[..., 3:] / 255) + 255 * (1 - rgba[..., 3:] / 255))
    assert np.abs(rgb_of(saved(tmp_path / "a.png", rgba)).astype(int) - expected).max() <= 1


def test_gray_with_alpha_and_transparent_rgb_lie_on_white(tmp_path):
    grey_alpha = np.stack([GREY, np.where(GREY < 100, 0, 255).astype(np.uint8)], axis=-1)
    path = saved(tmp_path / "la.png", Image.fromarray(grey_alpha))
    assert (rgb_of(path)[..., 0] == np.where(GREY < 100, 255, GREY)).all()
    rgb = np.zeros((2, 2, 3), np.uint8)
    rgb[0, 0] = (9, 8, 7)
    assert rgb_of(saved(tmp_path / "trns.png", rgb, transparency=(9, 8, 7)))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg_is_the_colour_it_shows(tmp_path):
    red = Image.new("RGB", (16, 16), (230, 20, 30))
    got = rgb_of(saved(tmp_path / "a.jpg", red.convert("CMYK"), quality=95))
    assert np.abs(got.astype(int) - [230, 20, 30]).max() <= 6


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert rgb_of(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientation_is_undone_as_pillow_does_it(tmp_path, orientation, mode):
    array = np.random.default_rng(1).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    image = Image.fromarray(array) if mode == "RGB" else Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", image, exif=exif)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    expected = expected if mode == "RGB" else np.repeat((expected // 257).astype(np.uint8)[..., None], 3, axis=2)
    got = rgb_of(path)
    assert got.shape[:2] == ((10, 14) if orientation < 5 else (14, 10))
    assert (got == expected).all()


def test_damaged_exif_does_not_hide_the_pixels(tmp_path):
    path = saved(tmp_path / "a.jpg", GREY, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01")
    assert rgb_of(path).shape == (12, 20, 3)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_truncated_file_is_unreadable(tmp_path, suffix):
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"a.{suffix}", array)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError) as error:
        read_image(path)
    assert error.value.path == path and error.value.reason


def test_reasons_name_the_cause(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    saved(tmp_path / "float.tif", GREY.astype(np.float32))
    saved(tmp_path / "deep.tif", GREY.astype(np.int32) * 100_000)
    for name, reason in {
        "empty.png": "empty file",
        "text.png": "no image",
        "missing.png": "no such file",
        "folder.png": "directory",
        "float.tif": "no defined range",
        "deep.tif": "exceed 16 bits",
    }.items():
        with pytest.raises(UnreadableImageError, match=reason):
            read_image(tmp_path / name)


def test_oversized_image_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    with pytest.raises(UnreadableImageError, match=r"pixel"):
        read_image(tmp_path / "bomb.png")
    path = saved(tmp_path / "a.png", GREY)
    with pytest.raises(UnreadableImageError, match="20×12 has more than 239 pixels"):
        read_image(path, max_pixels=239)
    assert read_image(path, max_pixels=240).shape == (3, 12, 20)


def test_large_header_below_the_limit_fails_for_its_truth_and_not_for_a_warning(tmp_path):
    content = png_header(12_000, 10_000)  # past the size at which Pillow warns
    (tmp_path / "large.png").write_bytes(content + bytes(20_000))
    with pytest.raises(UnreadableImageError, match=r"truncated|broken"):
        read_image(tmp_path / "large.png")
    (tmp_path / "small.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"12000×10000 pixels are declared by a file of .. bytes"):
        read_image(tmp_path / "small.png")


@pytest.mark.parametrize(("mode", "suffix"), [("1", "png"), ("L", "png"), ("P", "gif"), ("RGB", "webp")])
def test_a_blank_image_is_small_and_read(tmp_path, mode, suffix):
    Image.new(mode, (4200, 4200)).save(tmp_path / f"blank.{suffix}")
    assert read_image(tmp_path / f"blank.{suffix}").shape == (3, 4200, 4200)


def test_threads_leave_the_warning_filters_as_they_were(tmp_path):
    path = saved(tmp_path / "a.png", GREY)
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: read_image(path).shape[1:], range(200)))
    assert set(sizes) == {(12, 20)} and warnings.filters == before


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImageError("a/b.png", "empty file")))
    assert error.path.name == "b.png" and error.reason == "empty file" and str(error).endswith("b.png: empty file")


def make_tree(root):
    for name in ("b.png", "a.JPG", "sub/c.jpeg", "sub/deep/d.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        saved(root / name, GREY, **({"format": "JPEG"} if name.endswith("JPG") else {}))
    (root / "notes.txt").write_text("no image")
    (root / "._b.png").write_bytes(b"a file system's shadow")
    (root / ".hidden").mkdir()
    saved(root / ".hidden" / "e.png", GREY)
    return root


def test_folder_is_listed_recursively_in_a_stable_order(tmp_path):
    source = open_images(make_tree(tmp_path / "tree"))
    assert list(source.ids) == ["a.JPG", "b.png", "sub/c.jpeg", "sub/deep/d.webp"]
    assert source[2].id == "sub/c.jpeg" and source[2].path == tmp_path / "tree" / "sub" / "c.jpeg"
    assert [record.id for record in source] == list(source.ids) and len(source) == 4
    assert all(read_image(record.path).shape == (3, 12, 20) for record in source)


def test_fingerprint_depends_on_ids_and_not_on_the_root(tmp_path):
    one, two = open_images(make_tree(tmp_path / "one")), open_images(make_tree(tmp_path / "two"))
    assert one.fingerprint() == two.fingerprint()
    assert one.subset(one.ids[:3]).fingerprint() != one.fingerprint()
    assert ImageSource(tmp_path, ["ab", "c"]).fingerprint() != ImageSource(tmp_path, ["a", "bc"]).fingerprint()


def test_link_to_a_parent_does_not_loop(tmp_path):
    root = make_tree(tmp_path / "tree")
    (root / "sub" / "loop").symlink_to(root, target_is_directory=True)
    assert len(open_images(root)) == 4


@pytest.mark.parametrize("kind", ["txt", "csv", "csv_bare", "parquet", "parquet_first"])
def test_lists_keep_their_order_and_name_each_image_once(tmp_path, kind):
    root = make_tree(tmp_path / "tree")
    names = ["sub/c.jpeg", "b.png", str(root / "a.JPG"), "b.png"]
    path = root / f"list.{kind.split('_')[0]}"
    if kind == "txt":
        path.write_text("# chosen\n\n" + "\n".join(names) + "\n")
    elif kind == "csv":
        pd.DataFrame({"weight": range(4), "path": names}).to_csv(path, index=False)
    elif kind == "csv_bare":
        path.write_text("\n".join(f"{name},1" for name in names))
    else:
        pd.DataFrame({"path" if kind == "parquet" else "file": names, "weight": range(4)}).to_parquet(path)
    source = open_images(path)
    assert list(source.ids) == ["sub/c.jpeg", "b.png", "a.JPG"]
    assert all(record.path.is_file() for record in source)


def test_list_with_a_root_elsewhere(tmp_path):
    root = make_tree(tmp_path / "tree")
    (tmp_path / "list.txt").write_text("b.png")
    assert open_images(tmp_path / "list.txt", root=root)[0].path == root / "b.png"


@pytest.mark.parametrize("folder", ["", "val", "images"])
def test_coco_file_finds_its_images_near_it(tmp_path, folder):
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    saved(root / "x.png", GREY)
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "x.png"}]}))
    assert open_images(path)[0].path == root / "x.png"


def test_coco_layout_with_an_annotation_folder(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    saved(tmp_path / "val2017" / "x.png", GREY)
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "x.png"}]}))
    assert open_images(path)[0].path == tmp_path / "val2017" / "x.png"


def test_single_image_is_a_source_of_one(tmp_path):
    path = saved(tmp_path / "a.png", GREY)
    assert [record.path for record in open_images(path)] == [path]


def test_bad_sources_say_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xyz").touch()
    (tmp_path / "list.txt").write_text("# nothing\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "lost.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "x.png"}]}))
    (tmp_path / "bad.parquet").write_text("no parquet")
    for name, message in {
        "empty": "holds no images; expected files named",
        "a.xyz": "expected a folder, an image or a list",
        "list.txt": "holds no images",
        "broken.json": "cannot be read as an image list",
        "other.json": "no COCO file",
        "lost.json": "none of its images was found.*put the file beside",
        "bad.parquet": "cannot be read as an image list",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="1 of 2 are not in this source, such as 'y'"):
        ImageSource(tmp_path, ["x"]).subset(["x", "y"])
    with pytest.raises(ValueError, match="1 repeated"):
        ImageSource(tmp_path, ["x", "x"])


def test_real_sets_open_with_their_split_folder(shared_data):
    source = open_images(shared_data / "coco256" / "instances_val.json")
    assert len(source) == 128 and source.root.name == "val" and source[0].path.is_file()


def test_images_of_another_storage(tmp_path):
    """A folder there, and a list here whose lines are URLs."""
    remote = f"memory://{tmp_path.name}/photos"
    for path in make_tree(tmp_path / "tree").rglob("*.*"):
        if path.is_file():
            place = locate(remote) / path.relative_to(tmp_path / "tree").as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    here, there = open_images(tmp_path / "tree"), open_images(remote)
    assert there.ids == here.ids
    assert [read_image(record).shape for record in there] == [read_image(record).shape for record in here]
    (tmp_path / "list.txt").write_text(f"{remote}/b.png\ntree/b.png\n")
    listed = open_images(tmp_path / "list.txt")
    assert torch.equal(read_image(listed[0]), read_image(listed[1]))
    (locate(remote) / "b.png").unlink()
    with pytest.raises(UnreadableImageError, match="no such file"):
        read_image(listed[0])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_images(f"memory://{tmp_path.name}/nowhere")
    (locate(remote) / "list.txt").write_text("b.png")
    with pytest.raises(ValueError, match=r"a list \(.*\) on this machine"):
        open_images(f"{remote}/list.txt")


# ----------------------------------------------------------------------------------------------------------------------
# Tar shards: every image once and byte for byte, whatever else lies in them and however they are cut.


def picture(seed, suffix="png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "jpeg"}.get(suffix, suffix))
    return stream.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


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
            add(tar, name, content)
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
        add(tar, "a.png", picture(1))
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
            add(tar, name, data)
    found = {(finding.kind, finding.image_id) for finding in examine(tars).findings}
    assert {("duplicate", "003.tar/same.png"), ("unreadable", "003.tar/bad.png")} <= found
    row = ImageLabels.build(source.ids[5], (12, 20), [[1, 2, 9, 9]], [0])
    assert write_pictures(source, Labels.from_images([row], (Category(1, "x"),)), tmp_path / "drawn") == 1
    assert (tmp_path / "drawn" / source.ids[5]).is_file()


def test_listed_names_are_found_in_another_spelling(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.png", decomposed, "plain.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    listed = ["sub\\a.png", composed, "plain.png", "lost\\b.png"]
    (tmp_path / "list.json").write_text(
        json.dumps({"images": [{"id": n, "file_name": name} for n, name in enumerate(listed)]})
    )
    (tmp_path / "list.txt").write_text("\n".join(listed), encoding="utf-8")
    for path in ("list.json", "list.txt"):
        assert open_images(tmp_path / path).ids == ("sub/a.png", decomposed, "plain.png", "lost\\b.png")


def test_images_that_a_json_does_not_name_are_left_out_and_counted(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.json").write_text(json.dumps({"images": [{"file_name": "a.png"}, {"id": 2}, 5]}))
    assert open_images(tmp_path / "list.json").ids == ("a.png",)
    assert "2 of its 3 images have no file_name" in caplog.text


@pytest.mark.parametrize(("largest", "dark"), [(1023, True), (4095, True), (65535, False)])
def test_deep_files_that_fill_a_part_of_their_range_are_dark(tmp_path, caplog, largest, dark):
    values = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.tif", "b.tif"):
        Image.fromarray(values).save(tmp_path / name)
    source = open_images(tmp_path)
    said = darkness(source[0], read_image(source[0]))
    assert (f"{largest.bit_length()} bits in 16" in said) == dark and bool(said) == dark
    warn_if_dark(source)
    assert ("its first 2 images are nearly black" in caplog.text) == dark
    Image.new("RGB", (8, 8), "white").save(tmp_path / "0.png")
    caplog.clear()
    warn_if_dark(open_images(tmp_path))
    assert not caplog.records  # one of the first is bright


def test_pages_are_counted(tmp_path):
    pages = [Image.new("L", (8, 8), value) for value in (0, 99, 200)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"none")
    assert [page_count(record) for record in open_images(tmp_path)] == [3, 1, 1]
    assert read_image(tmp_path / "a.tif").max() == 0  # the first
