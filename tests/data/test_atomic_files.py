import pytest

from simdetr.data.storage import atomic_path


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
