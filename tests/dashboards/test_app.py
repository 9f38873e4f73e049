"""The server: who comes in, what every route answers, and that nothing is let out."""

import asyncio
import re
import subprocess
import sys
from html import unescape

import pytest
from fastapi.testclient import TestClient

from dashboards import addresses, assets, stream
from dashboards.app import create_app
from storage.records import Axis
from storage.store import Store

TOKEN = "right-token"
AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="kv_bytes", maximise=False, low=1.0, high=1024.0, log=True),
)
BASE = "http://127.0.0.1"


@pytest.fixture
def app(url):
    return create_app(url, token=TOKEN)


@pytest.fixture
def stranger(app):
    return TestClient(app, base_url=BASE, follow_redirects=False)


@pytest.fixture
def client(app):
    return TestClient(app, base_url=BASE, headers={"Authorization": f"Bearer {TOKEN}"})


def routes(app):
    paths = set(app.openapi()["paths"])
    paths |= {
        "/",
        "/docs",
        "/api/v1/openapi.json",
        "/studies/{segment}",
        "/studies/{segment}/trials/{number}",
        "/studies/{segment}/trials/{number}/card",
        "/studies/{segment}/compare",
        "/studies/{segment}/why",
        "/together",
    }
    paths |= {f"/static/{name}" for name in assets.served()} | {"/redoc", "/nowhere", "/static/../app.py"}
    fill = {"segment": "quick", "number": 1, "chart": "front", "name": "style.css"}
    return sorted(path.format(**fill) for path in paths - {"/health"})


def test_fault_37_every_route_and_method_needs_the_token(app, stranger):
    assert len(routes(app)) > 15
    for path in routes(app):
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"):
            assert stranger.request(method, path).status_code == 401, (method, path)


def test_no_route_is_forgotten_by_the_walk(app):
    known = {route.path for route in app.routes if hasattr(route, "path")}
    for path in known - {"/health", "/login"}:
        answer = TestClient(app, base_url=BASE).get(path.replace("{", "").replace("}", ""))
        assert answer.status_code == 401, path


def test_health_and_login_are_open(stranger):
    assert stranger.get("/health").json() == {"status": "ok"}
    page = stranger.get("/login")
    assert page.status_code == 200
    assert "<form" in page.text
    assert stranger.put("/login").status_code == 401


@pytest.mark.parametrize("cookie", ["", "nas_x=1", "nas_00000000=right-token", '"', "a=\u00e9"])
def test_other_cookies_are_no_key(stranger, cookie):
    assert stranger.get("/", headers={"Cookie": cookie.encode("latin-1")}).status_code == 401


@pytest.mark.parametrize(
    "key", ["Bearer wrong", "Bearer ", "Basic cmlnaHQtdG9rZW4=", "Bearer right-token2", "right-token"]
)
def test_a_wrong_token_is_told_in_one_line(stranger, key):
    answer = stranger.get("/api/v1/studies", headers={"Authorization": key})
    assert answer.status_code == 401
    assert answer.json() == {"detail": "That token is not the right one."}
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_token_becomes_a_cookie(stranger):
    assert stranger.get("/login", params={"token": "wrong"}).status_code == 401
    answer = stranger.get("/login", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert stranger.get("/").status_code == 200


def test_fault_38_the_form_lets_in_from_here_alone(stranger):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:81", "http://127.0.0.1.evil.example"):
        assert stranger.post("/login", data={"token": TOKEN}, headers={"Origin": origin}).status_code == 403
    assert stranger.post("/login", data={"token": "wrong"}, headers={"Origin": BASE}).status_code == 401
    assert stranger.post("/login", content=b"token=" + b"x" * 5000).status_code == 413
    assert stranger.post("/login", data={"token": TOKEN}, headers={"Origin": BASE}).status_code == 303


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "[::2]", "[::1].evil.example"],
)
def test_fault_38_a_foreign_host_is_refused_even_with_the_token(client, host):
    for path in ("/", "/health", "/login"):
        assert client.get(path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8080", "LOCALHOST:1", "[::1]", "[::1]:80"])
def test_loopback_hosts_are_answered(client, host):
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_every_answer_carries_the_headers(client, stranger):
    for answer in (client.get("/"), client.get("/nowhere"), stranger.get("/"), client.get("/docs")):
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe-eval" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_pages_hold_no_inline_script(client):
    for path in ("/", "/studies/quick", "/studies/quick/trials/3", "/docs"):
        text = client.get(path).text
        assert all("src=" in tag for tag in re.findall("<script[^>]*>", text))
        assert " onclick" not in text
        assert "http://" not in text
        assert "https://" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/%252e%252e/app.py",
        "/static/..%2fapp.py",
        "/static/..%252fapp.py",
        "/static//etc/passwd",
        "/static/style.css%00",
        "/studies/..%2f..%2fetc%2fpasswd",
        "/studies/nope",
        "/studies/%00",
        "/studies/quick/trials/999",
        "/studies/quick/trials/-1",
        "/studies/quick/trials/99999999999999999999999",
        "/studies/quick/trials/%D9%A1",
        "/studies/quick/trials/<b>",
        "/nowhere",
    ],
)
def test_fault_40_what_is_not_there_is_404(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "Traceback" not in answer.text
    assert "<b>" not in answer.text
    if path.startswith("/studies"):
        assert "Not here" in answer.text


def test_pages_tell_what_they_should(client, hostile):
    studies = client.get("/").text
    assert "3*kda mla" in unescape(studies) or "kda" in studies
    front = client.get("/studies/quick").text
    for word in (
        "3*kda mla",
        "is beaten by",
        "cache at 128k",
        "What was searched",
        "nas search --study quick",
    ):
        assert word in front
    trial = client.get("/studies/quick/trials/6").text
    for word in ("3*kda mla", "Cost by layer", "Learning curves", "mqar", "nas evaluate", "kimi-linear"):
        assert word in trial
    assert "loss is NaN at step 41" in client.get("/studies/quick/trials/40").text
    assert "Nothing measured yet" in client.get("/studies/empty").text
    page = client.get(addresses.study(hostile))
    assert page.status_code == 200
    assert "<img src=x" not in page.text
    assert hostile in unescape(page.text)


def test_the_choice_of_axes_is_in_the_address(client):
    page = client.get("/studies/quick", params={"x": "latency_ms", "y": "kv_bytes"}).text
    assert "figure/front?x=latency_ms&amp;y=kv_bytes" in page
    assert client.get("/studies/quick", params={"x": "speed"}).status_code == 400
    assert client.get("/studies/quick", params={"x": "quality", "y": "quality"}).status_code == 400
    assert client.get("/studies/quick", params={"page": "zero"}).status_code == 422
    assert "page 1 of 1" in client.get("/studies/quick", params={"page": 99}).text


def test_the_interface_answers_plain_numbers(client):
    studies = client.get("/api/v1/studies").json()
    assert [s["name"] for s in studies][:2] == ["quick", "empty"]
    assert all(client.get(s["path"]).json()["study"]["name"] == s["name"] for s in studies)
    front = client.get("/api/v1/studies/quick/front").json()
    assert front["points"][0]["values"]["kv_bytes"] > 2**20
    page = client.get("/api/v1/studies/quick/trials", params={"offset": 5, "limit": 3}).json()
    assert [t["number"] for t in page["trials"]] == [5, 6, 7]
    assert page["total"] == 43
    assert client.get("/api/v1/studies/quick/trials", params={"limit": 100000}).status_code == 422
    assert client.get("/api/v1/studies/nope").status_code == 404


@pytest.mark.parametrize("chart", ["front", "front_3d", "hypervolume", "layouts", "layers", "curves"])
def test_pictures_are_served(client, chart):
    assert client.get(f"/api/v1/studies/quick/figure/{chart}", params={"trial": 6}).json()["data"]


def test_pictures_that_are_not_are_refused(client):
    assert client.get("/api/v1/studies/quick/figure/pie").status_code == 404
    assert client.get("/api/v1/studies/quick/figure/front", params={"x": "speed"}).status_code == 400
    assert client.get("/api/v1/studies/quick/figure/curves", params={"trial": 999}).status_code == 404


def test_static_files_are_not_sent_twice(client):
    first = client.get("/static/plotly.js")
    assert len(first.content) > 10**6
    assert (
        client.get("/static/plotly.js", headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    )


def test_events_can_be_asked_for_or_followed(client, monkeypatch):
    monkeypatch.setattr(stream, "STREAM_S", 0.05)
    monkeypatch.setattr(stream, "POLL_S", 0.01)
    answer = client.get("/api/v1/studies/quick/events", params={"after": 0}).json()
    assert answer["events"]
    assert answer["last"] == answer["events"][-1]["seq"]
    wanted = {"Accept": "text/event-stream", "Last-Event-ID": str(answer["events"][-2]["seq"])}
    text = client.get("/api/v1/studies/quick/events", headers=wanted).text
    assert text.count("event: change") == 1
    assert f"id: {answer['last']}\n" in text
    fresh = client.get("/api/v1/studies/quick/events", headers={"Accept": "text/event-stream"}).text
    assert "event: change" not in fresh


def test_the_newest_event_is_found_without_reading_all(store):
    events = store.events(limit=10_000)
    assert stream.latest_event(store) == events[-1].seq


def test_the_number_of_streams_is_bounded(client, monkeypatch):
    monkeypatch.setattr(asyncio.Semaphore, "locked", lambda _self: True)
    answer = client.get("/api/v1/studies/quick/events", headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_no_store_stays_open(client, monkeypatch):
    opened = []
    real = Store.open.__func__

    def counted(cls, url, *, read_only=False):
        assert read_only
        store = real(cls, url, read_only=read_only)
        opened.append(store)
        return store

    closed = []
    real_close = Store.close
    monkeypatch.setattr(Store, "open", classmethod(counted))
    monkeypatch.setattr(Store, "close", lambda self: (closed.append(self), real_close(self))[1])
    for path in ("/", "/studies/quick", "/studies/nope", "/api/v1/studies/quick/front"):
        client.get(path)
    assert len(opened) == 4
    assert opened == closed


def test_an_unreadable_database_is_a_page_without_its_password(tmp_path):
    app = create_app(f"sqlite:///{tmp_path}/none.db", token=TOKEN)
    client = TestClient(app, base_url=BASE, headers={"Authorization": f"Bearer {TOKEN}"})
    page = client.get("/")
    assert page.status_code == 503
    assert "cannot be read" in page.text
    assert client.get("/api/v1/studies").status_code == 503
    assert not (tmp_path / "none.db").exists()


def test_fault_42_a_password_in_a_configuration_is_not_shown(tmp_path):
    address = f"sqlite:///{tmp_path}/secret.db"
    with Store.open(address) as store:
        config = {
            "storage": "postgresql://me:canary@db/nas",
            "search": {"urls": ["postgresql://me:canary@db/nas"]},
        }
        store.create_study(name="s", config=config, config_hash="h", axes=AXES, families={})
    client = TestClient(
        create_app(address, token=TOKEN), base_url=BASE, headers={"Authorization": f"Bearer {TOKEN}"}
    )
    for path in ("/studies/s", "/api/v1/studies/s"):
        text = client.get(path).text
        assert "postgresql://me:***@db/nas" in text
        assert "canary" not in text


def test_an_empty_token_is_refused(url):
    with pytest.raises(ValueError, match="token is empty"):
        create_app(url, token="")


def test_importing_the_dashboard_loads_nothing_heavy():
    heavy = "sorted({'torch', 'ray', 'optuna', 'triton', 'typer'} & set(sys.modules))"
    code = f"import sys, dashboards.app, dashboards.report; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/studies/s",
        "/studies/s/trials/1",
        "/studies/s/why",
        "/api/v1/studies",
        "/api/v1/together?study=s",
        "/metrics",
    ],
)
def test_fault_42_a_password_in_the_address_of_the_database_is_nowhere(path):
    # Nothing listens on this port, so that every route tells of the database that it cannot reach.
    app = create_app("postgresql://me:canary-7f3e@127.0.0.1:9/nas?password=canary-7f3e", token=TOKEN)
    client = TestClient(app, base_url=BASE, headers={"Authorization": f"Bearer {TOKEN}"})
    answer = client.get(path)
    assert answer.status_code == 503
    assert "127.0.0.1" in answer.text and "canary" not in answer.text + str(answer.headers)
