"""The folder of a run."""

from __future__ import annotations

from simdetr.app import run_files
from simdetr.app.run_files import RunFiles, detector_in, has_clusters, has_detector, read_image_list, write_image_list
from simdetr.data.images import open_images
from simdetr.exchange.weights import is_saved
from simdetr.training.run_folder import detector_folder
from simdetr.training.train import RESUME


def test_lines_are_numbered_and_one_that_is_being_written_waits(tmp_path):
    files = RunFiles(tmp_path)
    assert files.told() == []
    files.tell(done=1)
    files.tell(done=2)
    with files.progress.open("a") as file:
        file.write('{"done": 3')
    assert [(row["n"], row["done"]) for row in files.told()] == [(0, 1), (1, 2)]
    assert [row["done"] for row in files.told(1)] == [2]
    files.tell(done=4)  # after a kill in the middle of a line
    files.tell(done=5)
    assert [row.get("done") for row in files.told(2)] == [None, 5]


def test_an_end_is_there_once_it_was_said(tmp_path):
    files = RunFiles(tmp_path)
    assert files.ended() is None
    files.end(ok=True, message="done")
    assert files.ended() == {"ok": True, "message": "done"}


def test_any_path_can_stand_in_a_list(tmp_path):
    names = [tmp_path / "images" / name for name in ("# no comment.png", " spaces .png", "줄\n바꿈.png", "a,b.png")]
    write_image_list(names, tmp_path / "run" / "images.parquet")
    assert read_image_list(tmp_path / "run" / "images.parquet") == [str(name) for name in names]
    assert list(open_images(tmp_path / "run" / "images.parquet").ids) == [name.as_posix() for name in names]


def test_files_are_known_as_those_who_write_them_know_them(tmp_path, small_detector):
    assert run_files.RESUME == RESUME
    for folder in (small_detector, small_detector.parent, tmp_path):
        assert has_detector(folder) == is_saved(folder)
    assert detector_in(small_detector.parent) == detector_folder(small_detector.parent)
    for stage in (2, 10):
        (tmp_path / f"stage{stage}").mkdir()
        (tmp_path / f"stage{stage}" / "detector").symlink_to(small_detector)
    assert detector_in(tmp_path).parent.name == detector_folder(tmp_path).parent.name == "stage10"
    assert detector_in(tmp_path / "nothing") is None


def test_a_run_without_a_detector_may_have_clusters(tmp_path):
    assert not has_clusters(tmp_path)
    (tmp_path / "stage0").mkdir()
    (tmp_path / "stage0" / "labels.parquet").touch()
    assert has_clusters(tmp_path) and detector_in(tmp_path) is None


def test_the_newest_checkpoint_is_the_one_to_go_on_from(tmp_path):
    files = RunFiles(tmp_path)
    assert files.checkpoint() is None
    place = files.training / "checkpoints" / RESUME
    place.parent.mkdir(parents=True)
    place.touch()
    assert files.checkpoint() == place
