import csv
import multiprocessing

import pytest

from simdetr.data.quarantine import Quarantine, TooManyUnreadableError, check_share


def rows(path):
    with path.open(newline="") as stream:
        return [tuple(row) for row in csv.reader(stream)]


def test_rows_are_written_once_and_read_again(tmp_path):
    path = tmp_path / "run" / "quarantine.csv"
    quarantine = Quarantine(path, total=100)
    assert len(quarantine) == 0 and not path.exists()
    quarantine.add("a,b.png", 'said "no"\nat all')
    quarantine.add("a,b.png", "another reason")
    quarantine.add("c.png", "empty file")
    assert rows(path) == [("image_id", "reason"), ("a,b.png", 'said "no" at all'), ("c.png", "empty file")]
    resumed = Quarantine(path, total=100)
    assert len(resumed) == 2 and "c.png" in resumed and "d.png" not in resumed
    resumed.add("c.png", "empty file")
    assert len(rows(path)) == 3 and resumed.reasons["a,b.png"] == 'said "no" at all'


def test_stops_past_the_fraction_and_not_at_it(tmp_path):
    quarantine = Quarantine(tmp_path / "q.csv", total=40, max_fraction=0.05)
    quarantine.add("a", "x")
    quarantine.add("b", "x")
    with pytest.raises(
        TooManyUnreadableError, match=r"3 of 40 images are unreadable, more than 5%.*last: c: truncated"
    ):
        quarantine.add("c", "truncated")
    assert len(Quarantine(tmp_path / "q.csv", total=40)) == 3  # the one that stopped the run is on record


def test_a_row_cut_short_by_a_crash_does_no_harm(tmp_path):
    path = tmp_path / "q.csv"
    Quarantine(path, total=100).add("a.png", "empty file")
    path.write_bytes(path.read_bytes() + b"b.p")
    quarantine = Quarantine(path, total=100)
    assert len(quarantine) == 1
    quarantine.add("c.png", "empty file")
    assert set(Quarantine(path, total=100).reasons) == {"a.png", "c.png"}


def _add_many(path, worker):
    quarantine = Quarantine(path, total=2000)
    for number in range(20):
        quarantine.add(f"{worker}-{number}", "bad")
        quarantine.add(f"both-{number}", "bad")


def test_two_processes_share_one_file(tmp_path):
    path = tmp_path / "q.csv"
    other = multiprocessing.get_context("spawn").Process(target=_add_many, args=(path, 1))
    other.start()
    _add_many(path, 0)
    other.join()
    assert other.exitcode == 0
    expected = {f"{name}-{number}" for name in ("0", "1", "both") for number in range(20)}
    assert set(Quarantine(path, total=2000, max_fraction=1).reasons) == expected


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="max_unreadable: expected a share of the images from 0 to 1, got 5"):
        Quarantine(tmp_path / "q.csv", total=1, max_fraction=5)


def test_the_option_of_the_command_is_named_and_no_option_helps_where_all_are_unreadable():
    check_share(0, 0, 0.0, "--x")
    check_share(2, 4, 0.5, "--x")
    with pytest.raises(TooManyUnreadableError, match=r"3 of 4 images are unreadable, more than 50%; .*with --x$"):
        check_share(3, 4, 0.5, "--x")
    with pytest.raises(TooManyUnreadableError, match=r"4 of 4 images are unreadable; repair or remove the files$"):
        check_share(4, 4, 1.0, "--x")
