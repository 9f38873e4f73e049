"""The report is one file that needs nothing else, whatever the study is called."""

import json
import re
from html.parser import HTMLParser

import pytest

from dashboards.assets import plotly_js, source_hash
from dashboards.report import write_report


class Reader(HTMLParser):
    """Collects elements with their attributes, and text and scripts apart."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.scripts, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, _tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif self.inside != "style":
            self.texts.append(data)


@pytest.fixture
def report(store, tmp_path):
    def written(name):
        path = tmp_path / "report.html"
        write_report(store, store.study(name), path)
        return path.read_text(encoding="utf-8")

    return written


def test_nothing_outside_is_named(report):
    text = report("quick")
    page = Reader(text)
    for _tag, attrs in page.elements:
        assert attrs.get("href", "data:,").startswith(("data:", "#"))
        assert not {"src", "srcset", "action", "data", "poster"} & set(attrs)
    assert not re.search(r"https?://", text.replace(plotly_js(), ""))
    assert "url(" not in text.replace(plotly_js(), "")


def test_only_the_scripts_that_were_written_may_run(report):
    page = Reader(report("quick"))
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "form-action 'none'" in policy
    running = [body for attrs, body in page.scripts if attrs.get("type") != "application/json"]
    assert len(running) == 4
    assert all(source_hash(body) in policy for body in running)


def test_it_tells_what_was_searched_and_found(report):
    text = report("quick")
    words = " ".join(Reader(text).texts)
    for word in (
        "3*kda mla",
        "kimi-linear",
        "bfloat16",
        "128k",
        "MiB",
        " ms",
        "194 M",
        "cache at 8k",
        "3f9c" * 16,
    ):
        assert word in words
    assert "nas search --study quick --storage sqlite:///" in words
    assert "is beaten by" in words
    assert text.count('data-copy="') > 5


def test_pictures_are_data_and_have_a_table(report):
    page = Reader(report("quick"))
    figures = {a["id"]: json.loads(body) for a, body in page.scripts if a.get("type") == "application/json"}
    boxes = [a["data-inline"] for _, a in page.elements if "data-inline" in a]
    assert (
        set(figures) == set(boxes) == {f"figure-{n}" for n in ("front", "front_3d", "hypervolume", "layouts")}
    )
    assert sum(tag == "table" for tag, _ in page.elements) == 3


def test_hostile_names_are_text(store, report):
    hostile = next(s.name for s in store.studies() if "onerror" in s.name)
    page = Reader(report(hostile))
    assert not [tag for tag, attrs in page.elements if tag == "img" or "onerror" in attrs]
    assert hostile in "".join(page.texts)
    assert not [body for _, body in page.scripts if body.startswith("alert")]


def test_an_empty_study_says_how_to_start(report):
    text = report("empty")
    assert "Nothing measured yet" in text
    assert "nas search --study empty" in text
    assert "plotly" not in text.lower()


def test_it_is_written_aside_and_renamed(store, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("dashboards.report.os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_report(store, store.study("empty"), path)
    assert path.read_text() == "old"
    assert not list(tmp_path.glob("*.part"))


def test_a_directory_that_is_not_there_is_an_error(store, tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(store, store.study("empty"), tmp_path / "none" / "report.html")
