"""Paths and URLs: what they become, what lies below them, files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from upath import UPath

from simdetr.data.storage import atomic_path, below, content_hash, files_below, locate, write_whole


@pytest.fixture
def remote(tmp_path):
    """A folder in fsspec's own memory, of this test alone."""
    return UPath(f"memory://{tmp_path.name}")


def test_local_paths_become_paths_and_other_urls_keep_their_storage(tmp_path):
    assert locate("a/b") == Path("a/b")
    assert locate(tmp_path) == locate(str(tmp_path)) == locate(f"file://{tmp_path}") == tmp_path
    assert isinstance(locate(UPath(tmp_path)), Path)
    url = locate("memory://a/b")
    assert not isinstance(url, Path)
    assert str(url / "c") == "memory://a/b/c"


def test_names_stand_below_a_root_unless_they_are_whole():
    assert below(Path("root"), "a/b.jpg") == Path("root/a/b.jpg")
    assert below(Path("root"), "/a/b.jpg") == Path("/a/b.jpg")
    assert str(below(Path("root"), "memory://a/b.jpg")) == "memory://a/b.jpg"
    assert str(below(locate("memory://root"), "a/b.jpg")) == "memory://root/a/b.jpg"


def test_files_below_are_the_same_here_and_there(tmp_path, remote):
    names = ["b.txt", "sub/a.txt", "sub/deep/c.txt", ".hidden.txt", ".git/d.txt", "sub/.cache/e.txt"]
    for folder in (tmp_path, remote):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        assert sorted(files_below(folder)) == ["b.txt", "sub/a.txt", "sub/deep/c.txt"]


def test_files_are_written_over(tmp_path, remote):
    for folder in (tmp_path, remote):
        for content in (b"first", b"second"):
            write_whole(folder / "x.bin", content)
            assert (folder / "x.bin").read_bytes() == content
        assert [path.name for path in folder.iterdir()] == ["x.bin"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "x.bin", "no bytes")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.bin", b"old")]


def test_target_appears_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "deep" / "a.json"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists() and temporary.suffix == ".json"
    assert target.read_text() == "new"
    with pytest.raises(RuntimeError, match="in the middle"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("in the middle")
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


def test_a_content_hash_speaks_of_names_and_bytes(tmp_path):
    folder = tmp_path / "labels"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("0 1")
    (folder / "b.jpg").write_text("pixels")
    first = content_hash(folder, {".jpg"})
    (folder / "b.jpg").write_text("others")
    assert content_hash(folder, {".jpg"}) == first != content_hash(folder)
    (folder / "sub" / "a.txt").write_text("0 2")
    second = content_hash(folder, {".jpg"})
    (folder / "c.jpg").write_text("new")
    assert len({first, second, content_hash(folder, {".jpg"})}) == 3
    assert content_hash(folder / "b.jpg") != content_hash(folder / "c.jpg")
