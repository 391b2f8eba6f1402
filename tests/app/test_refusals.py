"""Refusals become answers."""

from __future__ import annotations

from simdetr.app.refusals import FieldRefusal, Refusal, missing


def test_refusals_say_what_the_person_reads():
    refusal = Refusal(409, "a sentence", boxes=3)
    assert (refusal.status, str(refusal), refusal.more) == (409, "a sentence", {"boxes": 3})
    assert (missing("run", 7).status, missing("run", 7).detail) == (404, "there is no run 7")
    assert FieldRefusal(("body", "name"), "too long").place == ("body", "name")


def test_the_app_answers_with_them(person):
    assert person.ask("GET", "/runs/7", status=404) == {"detail": "there is no run 7"}
    wrong = person.ask("GET", "/projects/1/images?after=nowhere", status=422)["detail"][0]
    assert wrong["loc"] == ["query", "after"] and "expected what a page before gave" in wrong["msg"]
