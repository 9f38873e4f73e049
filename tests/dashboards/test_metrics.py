"""What Prometheus scrapes: the numbers of the database, in its format, behind the token, and cheap to ask again."""

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from dashboards import metrics
from dashboards.app import create_app
from dashboards.metrics import exposition
from dashboards.view import study_view
from storage import summary
from storage.store import Store

TOKEN = "right-token"
BASE = "http://127.0.0.1"


@pytest.fixture
def scrape():
    def ask(address: str) -> str:
        client = TestClient(create_app(address, token=TOKEN), base_url=BASE)
        answer = client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.text

    return ask


def read(text: str) -> dict[tuple[str, str, str], float]:
    """By metric, study and state or kind, through the library's own reader."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter")
        for sample in family.samples:
            labels = dict(sample.labels)
            key = (sample.name, labels.pop("study", ""), labels.pop("state", labels.pop("kind", "")))
            assert labels == {} and key not in found
            found[key] = sample.value
    return found


def test_a_scrape_says_what_the_database_holds(url, scrape, store, hostile):
    said = read(scrape(url))
    assert said["nas_studies", "", ""] == 3
    assert said["nas_schema_version", "", ""] == store.schema_version()
    for name in ("quick", "empty", hostile):
        study = store.study(name)
        trials = store.trials(study)
        results = [result for trial in trials for result in trial.results]
        view = study_view(study, store.trials(study, states=["done"]))
        for state, count in store.counts(study).items():
            assert said["nas_trials", name, state] == count
        wanted = {
            "nas_attempts_total": sum(trial.attempts for trial in trials),
            "nas_requeues_total": 0,
            "nas_late_results_rejected_total": 0,
            "nas_results_total": len(results),
            "nas_repeats_total": 0,
            "nas_steps_total": sum(result.steps for result in results),
            "nas_tokens_total": sum(result.tokens for result in results),
            "nas_train_seconds_total": sum(result.train_s for result in results),
            "nas_worker_seconds_total": sum(result.worker_s for result in results),
            "nas_hypervolume": view.hypervolume,
            "nas_front_layouts": len(view.front),
        }
        for metric, value in wanted.items():
            assert said[metric, name, ""] == pytest.approx(value), metric
        events = store.events(study=study)
        assert sum(
            value for (metric, own, _), value in said.items() if (metric, own) == ("nas_events_total", name)
        ) == len(events)
        if events:
            assert said["nas_last_event_timestamp_seconds", name, ""] == pytest.approx(events[-1].at)
            assert 0 <= said["nas_last_event_age_seconds", name, ""] < 600
        else:
            assert ("nas_last_event_age_seconds", name, "") not in said


def test_a_database_without_studies_has_metrics_too(tmp_path, scrape):
    address = f"sqlite:///{tmp_path}/none.db"
    Store.open(address).close()
    said = read(scrape(address))
    assert said["nas_studies", "", ""] == 0
    assert exposition([], schema_version=2, read_s=0.25).count("# TYPE nas_") == 18


@pytest.mark.parametrize(
    "key", [None, "Bearer wrong", "Basic cmlnaHQtdG9rZW4=", f"bearer {TOKEN}x", "Bearer"]
)
def test_nobody_scrapes_without_the_token(url, key):
    stranger = TestClient(create_app(url, token=TOKEN), base_url=BASE)
    answer = stranger.get("/metrics", headers={} if key is None else {"Authorization": key})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "nas_" not in answer.text


def test_a_foreign_host_scrapes_nothing(url):
    client = TestClient(create_app(url, token=TOKEN), base_url="http://evil.example")
    assert client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 421


def test_what_was_counted_is_not_counted_again(live_url, measured, monkeypatch):
    reader = metrics.Reader(live_url)
    first = read(reader.read())
    read_again = []
    real = summary.told_of
    monkeypatch.setattr(summary, "told_of", lambda *given: read_again.append(real(*given)) or read_again[-1])
    volumes = []
    monkeypatch.setattr(metrics.pareto, "hypervolume", lambda points: volumes.append(len(points)) or 0.5)
    assert {key: value for key, value in read(reader.read()).items() if "seconds" not in key[0]} == {
        key: value for key, value in first.items() if "seconds" not in key[0]
    }
    assert read_again == [] and volumes == []
    number = measured(live_url, "kda mla kda mla")
    said = read(reader.read())
    assert [list(told) for told in read_again] == [[number]] and len(volumes) == 1
    assert said["nas_trials", "live", "done"] == first["nas_trials", "live", "done"] + 1
    assert said["nas_hypervolume", "live", ""] == 0.5


def test_counters_never_fall_while_a_study_grows(live_url, measured):
    reader = metrics.Reader(live_url)
    before = read(reader.read())
    for mixers in ("kda mla kda mla", "full full full full", "window kda window kda"):
        measured(live_url, mixers)
        now = read(reader.read())
        assert all(now[key] >= value for key, value in before.items() if key[0].endswith("_total"))
        before = now


def test_a_database_that_is_not_there_is_said_in_a_line(tmp_path):
    app = create_app(f"sqlite:///{tmp_path}/none.db", token=TOKEN)
    answer = TestClient(app, base_url=BASE).get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 503 and "no database at" in answer.json()["detail"]
