from __future__ import annotations

import json

import pytest

from simdetr.commands.main import main


def test_split_writes_files_and_says_what_is_short(tmp_path, capsys):
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 9, "width": 9} for n in range(4)]
    boxes = [{"id": n, "image_id": n, "category_id": 1 + (n == 3), "bbox": [1, 1, 4, 4]} for n in range(4)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "[owl]"}]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    common = ["split", "--labels", str(labels), "--out", str(tmp_path / "few"), "--seeds", "[0, 1]"]

    main([*common, "--protocol", "shots", "--amounts", "[3]"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].endswith("shots-3-seed0.json: 4 images, 4 boxes; classes with fewer: [owl] (1)")
    main([*common, "--protocol", "classes", "--novel", "[cat]"])
    assert {path.name for path in (tmp_path / "few").iterdir()} == {
        "base.json",
        "novel.json",
        "shots-3-seed0.json",
        "shots-3-seed1.json",
    }
    main([*common, "--protocol", "classes", "--novel", "1"])
    assert (tmp_path / "few" / "novel-seed1.json").is_file()
    with pytest.raises(SystemExit):
        main([*common, "--protocol", "fractions", "--amounts", "[2]"])
    assert "expected a number in (0, 1], got 2" in capsys.readouterr().err
