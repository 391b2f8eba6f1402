"""Names as other tools wrote them, and the images that they mean."""

from __future__ import annotations

import pytest

from simdetr.data.spellings import Spellings, shared_stems, stem_of


@pytest.mark.parametrize(
    ("ids", "written", "meant"),
    [
        (["a.jpg"], "a.jpg", "a.jpg"),
        (["s/a.jpg"], "s\\a.jpg", "s/a.jpg"),
        (["s/a.jpg"], "a.jpg", "s/a.jpg"),  # a folder left out
        (["s/a.jpg", "t/a.jpg"], "a.jpg", None),  # which of them?
        (["a.jpg"], "train/a.jpg", "a.jpg"),  # the folder that the images lie in
        (["a.jpg"], "images/train/a.jpg", "a.jpg"),
        (["a.jpg"], "val/a.jpg", None),  # another image of this name
        (["a.jpg"], "C:\\Users\\me\\photos\\a.jpg", "a.jpg"),
        (["a.jpg", "s/a.jpg"], "/home/me/s/a.jpg", "s/a.jpg"),
        (["a.jpg"], "s3://bucket/photos/a.jpg", "a.jpg"),
        (["a.jpg"], "/home/me/val2017/a.jpg", None),  # of another split
        (["a.jpg"], "D:\\train\\a.jpg", "a.jpg"),
        (["a.jpg"], "photos/a.jpg", None),  # a folder beside, as far as anybody knows
        (["ä.jpg"], "a\u0308.jpg", "ä.jpg"),
        (["a.jpg"], "b.jpg", None),
        (["s/a b.jpg"], "/data/local-files/?d=s/a%20b.jpg", "s/a b.jpg"),  # as Label Studio serves it
        (["a.jpg"], "/data/upload/1/1a2b3c4d-a.jpg", "a.jpg"),
        (["1a2b3c4d-a.jpg", "a.jpg"], "/data/upload/1/1a2b3c4d-a.jpg", "1a2b3c4d-a.jpg"),
        (["a.jpg"], "1a2b3c4d-b.jpg", None),
        (["a.jpg"], "front-a.jpg", None),
    ],
)
def test_names_of_other_tools(ids, written, meant):
    assert Spellings(ids, "/data/images/train")(written) == meant


def test_stems():
    assert stem_of("a.b/c") == "a.b/c" and stem_of("a.b/c.d.jpg") == "a.b/c.d" and stem_of("s/.jpg") == "s/.jpg"
    assert shared_stems(["a.jpg", "s/a.jpg", "a.png"]) == [("a.jpg", "a.png")]
