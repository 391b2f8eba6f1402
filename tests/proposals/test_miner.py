"""Mining to a store: resume after a kill, unreadable images, refusals."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from simdetr.data.images import ImageSource, open_images, read_image
from simdetr.data.quarantine import TooManyUnreadableError
from simdetr.mining import miner
from simdetr.mining import miner as shard_mining
from simdetr.mining.batch import MiningConfig, mine_batch
from simdetr.mining.miner import mine
from simdetr.mining.store import StoreError

CONFIG = MiningConfig(image_size=128, shard_size=4, batch_size=3)


def contents(store):
    """Every column of every shard file."""
    return [pq.read_table(path) for path in sorted(store.folder.glob("shard-*.parquet"))]


def test_rows_are_those_of_the_batch_computation(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    rows = list(store.iter_rows())
    assert [row.image_id for row in rows] == list(source.ids)
    pixels = [read_image(record.path) for record in source]
    for row, image, expected in zip(rows, pixels, mine_batch(pixels, encoder, CONFIG), strict=True):
        assert (row.height, row.width) == image.shape[-2:]
        np.testing.assert_allclose(row.regions.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(row.regions.features, expected.features, atol=1e-3)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_do_not_matter(image_folder, encoder, tmp_path, workers):
    source = open_images(image_folder)
    one = mine(source, encoder, replace(CONFIG, num_workers=1), tmp_path / "one")
    other = mine(source, encoder, replace(CONFIG, num_workers=workers), tmp_path / "other")
    assert contents(one) == contents(other)


def test_same_call_again_does_nothing(image_folder, encoder, tmp_path, monkeypatch):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    monkeypatch.setattr(shard_mining, "mine_pixels", lambda *_: pytest.fail("nothing is left to encode"))
    mine(source, encoder, CONFIG, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_damaged_shard_is_redone_and_no_other(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    expected = contents(store)
    times = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.parquet")}
    path = store.shard_path(1)
    path.write_bytes(path.read_bytes()[:-100])
    assert contents(mine(source, encoder, CONFIG, tmp_path / "out")) == expected
    changed = [p.name for p in store.folder.glob("*.parquet") if p.stat().st_mtime_ns != times[p.name]]
    assert changed == ["shard-00001.parquet"]


KILLED_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import CellColours
from simdetr.data.images import open_images
from simdetr.mining.batch import MiningConfig
from simdetr.mining.miner import mine

class Slow(CellColours):
    def __call__(self, images):
        time.sleep(0.2)
        return super().__call__(images)

config = MiningConfig(image_size=128, shard_size=4, batch_size=3, max_unreadable=0.5)
mine(open_images({images!r}), Slow(), config, Path({out!r}))
"""


@pytest.mark.parametrize("wait_for", ["manifest.json", "shard-00001.parquet"])
def test_killed_run_ends_like_an_uninterrupted_one(image_folder, encoder, tmp_path, wait_for):
    (image_folder / "02.png").write_bytes(b"no image")
    config = replace(CONFIG, max_unreadable=0.5)
    source = open_images(image_folder)
    whole = mine(source, encoder, config, tmp_path / "whole")
    out = tmp_path / "killed"
    script = KILLED_RUN.format(tests=str(Path(__file__).parent), images=str(image_folder), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (out / wait_for).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (out / "shard-00003.parquet").exists()
    (out / ".shard-00002.parquet.1.tmp").write_bytes(b"half")  # what a kill within a write leaves
    resumed = mine(source, encoder, config, out)
    assert contents(resumed) == contents(whole)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.folder.iterdir())
    assert (out / "quarantine.csv").read_text() == (whole.folder / "quarantine.csv").read_text()


def test_unreadable_images_are_listed_and_have_no_row(image_folder, encoder, tmp_path, caplog):
    (image_folder / "05.png").write_bytes((image_folder / "05.png").read_bytes()[:200])
    (image_folder / "06.png").write_text("no image")
    source = open_images(image_folder)
    store = mine(source, encoder, replace(CONFIG, max_unreadable=0.2), tmp_path / "out")
    assert len(store) == 12
    assert {"05.png", "06.png"}.isdisjoint(row.image_id for row in store.iter_rows())
    assert list(store.unreadable()) == ["05.png", "06.png"]
    assert "06.png" in (tmp_path / "out" / "quarantine.csv").read_text()
    assert "2 of 14 images are unreadable" in caplog.text


def test_too_many_unreadable_images_stop_the_run(image_folder, encoder, tmp_path):
    (image_folder / "00.png").write_text("no image")
    with pytest.raises(TooManyUnreadableError, match="1 of 14 images are unreadable"):
        mine(open_images(image_folder), encoder, CONFIG, tmp_path / "out")


def test_shard_of_unreadable_images_only(image_folder, encoder, tmp_path):
    for index in range(4):
        (image_folder / f"{index:02d}.png").write_text("no image")
    store = mine(open_images(image_folder), encoder, replace(CONFIG, max_unreadable=0.5), tmp_path / "out")
    assert len(store) == 10
    assert store.missing_shards() == []


def test_other_settings_images_or_weights_are_refused(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    mine(source, encoder, CONFIG, tmp_path / "out")
    with pytest.raises(StoreError, match=r"config\.seed is 0 there and 1 now"):
        mine(source, encoder, replace(CONFIG, seed=1), tmp_path / "out")
    with pytest.raises(StoreError, match="num_images is 14 there and 13 now; source is"):
        mine(source.subset(source.ids[1:]), encoder, CONFIG, tmp_path / "out")
    encoder.fingerprint = "other weights"
    with pytest.raises(StoreError, match="encoder is 'cell-colours' there and 'other weights' now"):
        mine(source, encoder, CONFIG, tmp_path / "out")


def test_batch_size_may_change_between_resumes(image_folder, encoder, tmp_path):
    source = open_images(image_folder)
    store = mine(source, encoder, CONFIG, tmp_path / "out")
    store.shard_path(2).unlink()
    mine(source, encoder, replace(CONFIG, batch_size=1), tmp_path / "out")
    assert len(store) == 14


def test_no_images(encoder, tmp_path):
    with pytest.raises(ValueError, match="source: expected at least one image, got none"):
        mine(ImageSource(tmp_path, ()), encoder, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_is_seen_before_work_starts(image_folder, encoder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(miner.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(shard_mining, "mine_pixels", lambda *_: pytest.fail("work started"))
    with pytest.raises(StoreError, match="0 MB free, a shard may take"):
        mine(open_images(image_folder), encoder, CONFIG, tmp_path / "out")


def test_progress_shows_only_when_asked(image_folder, encoder, tmp_path, capsys):
    source = open_images(image_folder)
    mine(source, encoder, CONFIG, tmp_path / "silent")
    assert capsys.readouterr() == ("", "")
    mine(source, encoder, CONFIG, tmp_path / "shown", progress=True)
    shown = capsys.readouterr().err
    assert "14/14" in shown
    assert "images/s" in shown
