"""Who may ask: foreign hosts, foreign sites, unknown tokens and large bodies are turned away."""

from __future__ import annotations

import pytest

TOKEN = "a-token-that-is-long-enough"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil:80"])
def test_a_foreign_name_that_leads_here_is_refused(person, host):
    assert person.client.get("/api/projects", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:5", "[::1]:8000"])
def test_own_names_are_not(person, host):
    assert person.client.get("/api/projects", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_site_changes_nothing(person, headers):
    answer = person.client.post("/api/projects/1/classes", json={"name": "x"}, headers=headers)
    assert answer.status_code == 403
    form = {"files": ("a.png", b"")}
    assert person.client.post("/api/projects/1/images", files=form, headers=headers).status_code == 403
    assert person.get("/projects/1/classes")["classes"] == []


def test_the_own_page_may(person):
    headers = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    answer = person.client.post("/api/projects/1/classes", json={"name": "x"}, headers=headers)
    assert answer.status_code == 201


def test_elsewhere_every_request_needs_the_token(serve):
    person = serve(host="0.0.0.0", token=TOKEN)
    client = person.client
    for path in ("/", "/static/index.html", "/api/projects", "/api/openapi.json", "/api/images/1/file"):
        assert client.get(path).status_code == 401
    assert client.get("/api/projects", headers={"authorization": f"Bearer {TOKEN}x"}).status_code == 401
    assert client.get("/api/projects", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/api/projects?token=" + TOKEN).status_code == 401  # addresses end up in logs
    assert client.get("/api/projects", headers={"host": "labels.example"}).status_code == 401


def test_the_printed_address_gives_a_cookie_and_hides_the_token(serve):
    client = serve(host="0.0.0.0", token=TOKEN).client
    assert client.get("/?token=wrong").status_code == 401
    answer = client.get(f"/?token={TOKEN}&view=queue", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/?view=queue")
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=Strict" in answer.headers["set-cookie"]
    assert client.get("/").status_code == 200
    assert client.get("/api/projects").status_code == 200


def test_the_page_may_load_nothing_from_elsewhere(person):
    headers = person.client.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_a_large_body_is_refused_whether_it_says_so_or_not(person):
    large = b'{"name": "' + b"x" * (33 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    assert person.client.post("/api/projects/1/classes", content=large, headers=headers).status_code == 413

    def pieces():
        for start in range(0, len(large), 1 << 20):
            yield large[start : start + (1 << 20)]

    assert person.client.post("/api/projects/1/classes", content=pieces(), headers=headers).status_code == 413


def test_nothing_but_the_page_s_own_files_is_served(person):
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/docs", "/redoc"):
        assert person.client.get(path).status_code == 404
