"""What the app is started with is checked before anything is opened."""

from __future__ import annotations

import pytest

from simdetr.app.settings import AppSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 70_000}, "port: expected 0 to 65535"),
        ({"token": "short"}, "token: expected at least 16"),
        ({"max_pixels": 0}, "max_pixels: expected at least 1"),
        ({"images": "s3://bucket/photos"}, "on this machine"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AppSettings(**changes)


def test_what_does_not_exist_is_named(tmp_path):
    for name in ("images", "run", "labels"):
        with pytest.raises(FileNotFoundError, match=f"{name}: "):
            AppSettings(**{name: tmp_path / "nothing"})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.0.1"])
def test_this_machine_needs_no_token(host):
    assert AppSettings(host=host).token is None


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "labels.example"])
def test_other_addresses_get_one_that_nobody_guesses(host):
    first, second = AppSettings(host=host).token, AppSettings(host=host).token
    assert first and second and first != second and len(first) >= 32
