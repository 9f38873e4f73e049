"""The interface keeps its own description: types, statuses, tags of what is unchanged, and files."""

import contextlib
import csv
import io
import json

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import booleans

from dashboards import downloads, stream
from dashboards.app import create_app
from storage.store import Store

TOKEN = "right-token"
KEY = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def client(url):
    return TestClient(create_app(url, token=TOKEN), base_url="http://127.0.0.1", headers=KEY)


CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
]


def statuses_of(operation, mode):
    """Asks a route what its description allows, or what it forbids, and gives the statuses that were answered."""
    statuses = set()
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]

    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode), there=booleans())
    def ask(case, there):
        if there and "segment" in (case.path_parameters or {}):
            # A drawn name is hardly ever a study's: every other question is of one that is there.
            case.path_parameters["segment"] = "quick"
        response = case.call(headers=KEY | {"Host": "127.0.0.1"}, base_url="http://127.0.0.1")
        case.validate_response(response, checks=checks)
        statuses.add(response.status_code)

    with contextlib.suppress(Unsatisfiable):  # nothing about this route can be got wrong
        ask()
    return statuses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_description_promises(url, monkeypatch, mode):
    monkeypatch.setattr(stream, "STREAM_S", 0.02)
    monkeypatch.setattr(stream, "POLL_S", 0.01)
    app = create_app(url, token=TOKEN)
    document = TestClient(app, base_url="http://127.0.0.1", headers=KEY).get("/api/v1/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.app = app
    asked = {found.ok().path: statuses_of(found.ok(), mode) for found in schema.get_all_operations()}
    assert len(asked) >= 11
    if mode is schemathesis.GenerationMode.POSITIVE:
        # Only a database's own names and numbers are answered there, and here nobody prices.
        rare = ("/together", "/price", "/figure", "/trials/{number}")
        assert {
            path for path, statuses in asked.items() if 200 not in statuses and not path.endswith(rare)
        } <= {"/api/v1/studies/{segment}/figure/{chart}"}
    else:
        assert any(422 in statuses for statuses in asked.values())


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/studies",
        "/api/v1/studies/live",
        "/api/v1/studies/live/front",
        "/api/v1/studies/live/trials",
        "/api/v1/studies/live/trials/0",
        "/api/v1/studies/live/figure/front",
        "/api/v1/together?study=live",
    ],
)
def test_what_is_unchanged_is_not_sent_again(live_url, measured, path):
    client = TestClient(create_app(live_url, token=TOKEN), base_url="http://127.0.0.1", headers=KEY)
    first = client.get(path)
    tag = {"If-None-Match": f'"other", W/{first.headers["etag"]}'}
    again = client.get(path, headers=tag)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    measured(live_url, "kda mla kda mla")
    if not path.endswith("trials/0"):
        changed = client.get(path, headers=tag)
        assert changed.status_code == 200 and changed.headers["etag"] != first.headers["etag"]


def test_attempts_without_a_result_are_told_of_their_own_trial(live_url, failed):
    client = TestClient(create_app(live_url, token=TOKEN), base_url="http://127.0.0.1", headers=KEY)
    once, twice, again = (client.get(f"/studies/live/trials/{number}").text for number in (0, *failed))
    assert "Attempts without a result" not in once
    for page, number, other in ((twice, *failed), (again, *failed[::-1])):
        assert f"worker {number} died" in page and f"worker {other} died" not in page
        assert page.index("put back") < page.index("given up") and f"&lt;b&gt;disk&lt;/b&gt; {number}" in page
    assert "tried again on demand" in again and "tried again on demand" not in twice


def test_trials_are_paged_filtered_and_sorted_by_the_server(client):
    page = client.get("/api/v1/studies/quick/trials", params={"offset": 5, "limit": 3}).json()
    assert [t["number"] for t in page["trials"]] == [5, 6, 7] and page["total"] == 43
    held = client.get("/api/v1/studies/quick/trials", params={"mixer": ["kda", "mla"], "limit": 1000}).json()
    assert 0 < held["total"] < 43 and all(
        "kda" in t["layout"] and "mla" in t["layout"] for t in held["trials"]
    )
    best = client.get(
        "/api/v1/studies/quick/trials", params={"sort": "quality", "down": 1, "limit": 1}
    ).json()
    front = client.get("/api/v1/studies/quick/front").json()["points"]
    assert best["trials"][0]["values"]["quality"] == front[0]["values"]["quality"]
    assert client.get("/api/v1/studies/quick/trials", params={"sort": "speed"}).status_code == 400
    assert client.get("/api/v1/studies/quick/trials", params={"area": "1,2"}).status_code == 400


def test_files_hold_the_same_trials(client):
    plain = client.get("/api/v1/studies/quick/download", params={"format": "json"}).json()
    written = list(csv.DictReader(io.StringIO(client.get("/api/v1/studies/quick/download").text)))
    assert len(plain) == len(written) == 43
    assert [
        float(row["quality"] or "nan") == row_["quality"]
        for row, row_ in zip(written[:40], plain, strict=False)
    ] == [True] * 40
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    packed = client.get("/api/v1/studies/quick/download", params={"format": "parquet", "mixer": "mla"})
    table = pandas.read_parquet(io.BytesIO(packed.content))
    assert pyarrow and list(table["layout"]) == [row["layout"] for row in plain if "mla" in row["layout"]]
    assert "attachment" in packed.headers["content-disposition"]


def test_a_file_that_cannot_be_written_here_says_what_is_missing(client, monkeypatch):
    import pandas

    def without(*_arguments, **_options):
        raise ImportError("no engine")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", without)
    answer = client.get("/api/v1/studies/quick/download", params={"format": "parquet"})
    assert answer.status_code == 501 and "pip install pyarrow" in answer.json()["detail"]


def test_no_cell_of_a_file_is_a_formula():
    text = "".join(downloads.as_csv([{"origin": "=1+1", "why": "@x", "value": -3.5, "layout": "kda"}]))
    assert text.splitlines()[1] == "'=1+1,'@x,-3.5,kda"


def test_a_crowd_is_sent_as_what_changed_since(live_url, measured, monkeypatch):
    from dashboards import figures, scene

    monkeypatch.setattr(scene, "MANY", 2)
    monkeypatch.setattr(figures, "MANY", 2)
    client = TestClient(create_app(live_url, token=TOKEN), base_url="http://127.0.0.1", headers=KEY)
    for mixers in (
        "window window window window",
        "linear linear linear linear",
        "window linear window linear",
        "full full window full",
    ):
        measured(live_url, mixers)

    def crowd(figure):
        return next((t for t in figure["data"] if t["type"] == "scattergl"), None)

    whole = client.get("/api/v1/studies/live/figure/front").json()
    assert not whole["increment"] and len(crowd(whole)["customdata"]["bdata"]) > 0
    measured(live_url, "window window linear window")
    part = client.get("/api/v1/studies/live/figure/front", params={"since": whole["version"]}).json()
    now = client.get("/api/v1/studies/live/figure/front").json()
    assert part["increment"] and part["version"] > whole["version"]
    sizes = [len(crowd(one)["customdata"]["bdata"]) if crowd(one) else 0 for one in (part, now)]
    assert sizes[0] <= 8 < sizes[1], "one number of four bytes, against all of them"
    assert part["layout"] == now["layout"]


def test_openapi_is_whole_and_plain(client):
    document = client.get("/api/v1/openapi.json").json()
    paths = document["paths"]
    assert {"/api/v1/studies", "/api/v1/studies/{segment}/figure/{chart}", "/metrics", "/health"} <= set(
        paths
    )
    for path, methods in paths.items():
        for route in methods.values():
            assert route["description"], path
            if path.startswith("/api/"):
                assert {"400", "401", "404", "421", "422", "503"} <= set(route["responses"]), path
    json.dumps(document)


def test_the_database_is_only_read(url, client):
    with Store.open(url, read_only=True) as store:
        events = store.events(limit=10_000)
    for path in (
        "/",
        "/studies/quick",
        "/studies/quick/trials/3",
        "/studies/quick/compare?pick=1&pick=2",
        "/studies/quick/why",
    ):
        assert client.get(path).status_code == 200, path
    with Store.open(url, read_only=True) as store:
        assert store.events(limit=10_000) == events


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("trials/6/price", 404),
        ("figure/contexts?pick=0&pick=6", 400),
        ("figure/latencies?pick=0&pick=6", 400),
    ],
)
def test_what_nobody_prices_is_refused_in_words(client, path, status):
    answer = client.get(f"/api/v1/studies/quick/{path}")
    assert answer.status_code == status
    assert answer.json()["detail"].lower().endswith("cannot be priced here: use nas cost.")
