"""A real browser opens the pages and the report: pictures are drawn, nothing leaves the machine, names stay text."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from dashboards import addresses, figures, quantities, scene
from dashboards.report import write_report
from nas.workshop import OwnProcess
from storage.records import LatencyRecord
from storage.store import Store
from tests.dashboards.served import TOKEN
from tests.dashboards.watching import STATES, WITHOUT, Watched

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe
pytestmark = WITHOUT
POINTS = "document.querySelectorAll('[data-chart=front] .scatterlayer .point').length"


@pytest.fixture(scope="module")
def workshop(url) -> Iterator[OwnProcess]:
    own = OwnProcess(url)
    yield own
    own.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_draws_itself_from_one_file(watched, store, tmp_path, scheme):
    path = tmp_path / "report.html"
    write_report(store, store.study("quick"), path)
    watched.page.emulate_media(color_scheme=scheme)
    watched.page.goto(path.as_uri())
    watched.drawn(4)
    assert watched.page.evaluate(POINTS) >= 40
    heading = watched.page.locator("table.sortable").first.locator("th", has_text="quality")
    heading.click()
    first = watched.page.locator("table.sortable").first.locator("tbody tr").first
    assert "4*linear" in first.inner_text()


def test_a_hostile_name_raises_no_dialog_in_the_report(watched, store, tmp_path, hostile):
    path = tmp_path / "report.html"
    write_report(store, store.study(hostile), path)
    watched.page.goto(path.as_uri())
    watched.drawn(4)
    assert watched.page.locator("h1").inner_text() == hostile


def test_a_walk_through_the_pages(watched, serve, url, workshop, hostile):
    served, page = serve(url, workshop=workshop), watched.page
    watched.allowed.add("401")
    page.goto(served.base)
    page.get_by_label("token").fill(TOKEN)
    page.get_by_role("button", name="open").click()
    page.get_by_role("link", name="quick", exact=True).click()
    watched.drawn(1)
    assert page.evaluate(POINTS) >= 40
    page.locator("select[name=x]").select_option("latency_ms")
    watched.until("location.search", lambda query: "x=latency_ms" in query)
    page.reload()
    watched.drawn(1)
    assert page.locator("select[name=x]").input_value() == "latency_ms"
    page.locator("#beside a.plain").first.click()
    watched.drawn(3)
    assert "/trials/" in page.url
    page.goto(served.base + addresses.study(hostile))
    watched.drawn(1)
    assert page.locator("h1").inner_text() == hostile
    watched.allowed.add("404")
    page.goto(f"{served.base}/studies/nope")
    assert page.locator("h1").inner_text() == "Not here"


def test_fault_39_a_hostile_name_is_text_on_every_page(watched, serve, url, workshop, hostile):
    served, page = serve(url, workshop=workshop), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    root = addresses.study(hostile)
    for path, pictures in (
        ("", 1),
        ("/trials/0", 3),
        ("/compare?pick=0", 1),
        ("/why", 1),
        ("?view=space", 1),
    ):
        page.goto(served.base + root + path)
        watched.until(STATES, lambda found, n=pictures: len(found) >= n and "waiting" not in found)
        assert hostile in page.locator("main").inner_text() or hostile in page.locator(".crumbs").inner_text()
        assert page.locator("main img:not(.still img), .crumbs img").count() == 0
    page.goto(f"{served.base}/together?study=quick&{urlencode({'study': hostile})}")
    watched.drawn(1)
    # Plotly reads some tags in labels: the name stands in the legend, letter by letter.
    assert hostile in page.locator("[data-chart=together] .legendtext").last.text_content()


def test_the_choice_is_the_address(watched, serve, url, browser):
    served, page = serve(url), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/quick")
    watched.drawn(1)
    rows = "document.querySelectorAll('#beside tbody tr').length"
    assert page.evaluate(rows) > 30
    page.get_by_text("filters and scales").click()
    page.locator("input[name=mixer][value=mla]").check()
    watched.until("location.search", lambda query: "mixer=mla" in query)
    held = watched.until(rows, lambda count: count < 30)
    # One mark more: the trial that is being trained has no values to be filtered by.
    watched.until(POINTS, lambda points: points == held + 1)
    assert "mla" in page.locator("#beside tbody tr").first.inner_text()

    page.get_by_role("button", name="lasso").click()
    box = page.locator("[data-chart=front] .nsewdrag").first.bounding_box()
    left, top, wide, high = (box[key] for key in ("x", "y", "width", "height"))
    corners = ((0.02, 0.02), (0.6, 0.02), (0.6, 0.98), (0.02, 0.98), (0.02, 0.02))
    page.mouse.move(left + wide * corners[0][0], top + high * corners[0][1])
    page.mouse.down()
    for across, down in corners[1:]:
        page.mouse.move(left + wide * across, top + high * down, steps=8)
    page.mouse.up()
    watched.until("location.search", lambda query: "area=" in query)
    caught = watched.until(rows, lambda count: 0 < count < held)
    assert "within the lasso" in page.locator("#beside h2").inner_text()
    page.get_by_role("link", name="decode latency").first.click()
    watched.until("location.search", lambda query: "sort=latency_ms" in query)
    page.locator("#beside th[aria-sort=ascending]").wait_for()
    view = (page.locator("#beside tbody").inner_text(), page.locator("figcaption [data-words]").inner_text())

    other = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        again = Watched(other.new_page())
        again.page.goto(f"{served.base}/?token={TOKEN}")
        again.page.goto(page.url)
        again.drawn(1)
        assert again.page.evaluate(rows) == caught
        assert (
            again.page.locator("#beside tbody").inner_text(),
            again.page.locator("figcaption [data-words]").inner_text(),
        ) == view
        assert again.page.locator("input[name=mixer][value=mla]").is_checked()
        assert again.faults == []
    finally:
        other.close()
    page.get_by_role("link", name="show everything").click()
    watched.until(rows, lambda count: count > 30)
    assert not page.locator("input[name=mixer][value=mla]").is_checked()


def test_the_slider_shows_what_nas_cost_prints(watched, serve, url, workshop):
    served, page = serve(url, workshop=workshop), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/quick/trials/6")
    watched.drawn(3)
    told = "document.querySelector('#priced').innerText"
    before = page.evaluate(told)
    page.get_by_role("slider").press("ArrowLeft")
    after = watched.until(told, lambda text: text != before)
    assert "context=65536" in page.url
    page.get_by_label("batch").select_option("4")
    after = watched.until(told, lambda text, known=after: text != known)
    command = shlex.split(page.locator("#price-command code").inner_text())
    assert (
        command[:3] == ["nas", "cost", "3*kda mla"]
        and "--context=65536" in command
        and "--batch=4" in command
    )
    printed = subprocess.run(
        [sys.executable, "-m", *command, "--json"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    (cache,) = json.loads(printed.stdout)["cache"]
    assert f"({cache['stored_bytes']:,} bytes)" in after
    by_layer = page.locator("#layers-table tbody tr td:nth-child(4)").all_text_contents()
    sizes = [sum(part["stored_bytes"] for part in cache["by_layer"][place::4]) for place in range(4)]
    assert by_layer == [quantities.size(size) for size in sizes]
    # No latency was measured there; once one is, the page shows it without being asked again.
    command = shlex.split(page.locator("#timed code").inner_text())
    assert command[:3] == ["nas", "measure", "3*kda mla"] and command[-5:] == [
        *("--context", "65536", "--batch", "4", "--no-whole")
    ]
    with Store.open(url) as store:
        study = store.study("quick")
        (price,) = workshop.price(study.config, "3*kda mla", [(65536, 4)])
        for layer in price.by_layer:
            store.put_latency(
                LatencyRecord(
                    device="cpu",
                    frame=price.latency_frame,
                    subject=layer.layer,
                    phase="decode",
                    whole=False,
                    latency_ms=2.5,
                    spread_ms=0.1,
                    repetitions=5,
                )
            )
        store.log(study, "latency_measured", {"device": "cpu", "context": 65536, "batch": 4})
    took = quantities.milliseconds(2.5 * sum(layer.count for layer in price.by_layer))
    after = watched.until(told, lambda text: f"decode latency\n{took}" in text)
    assert "as measured at 64k and batch 4, on cpu" in page.locator("#timed").inner_text()
    assert page.locator("#timed code").count() == 0
    bars = "[...document.querySelectorAll('[data-chart=layers] .ytick text')].map((text) => text.textContent).join(' ')"
    watched.until(bars, lambda text: f"{took}at 64k, batch 4" in text)
    page.reload()
    watched.drawn(3)
    assert page.evaluate(told) == after


def test_marked_layouts_are_compared(watched, serve, url, workshop):
    served, page = serve(url, workshop=workshop), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/quick?sort=number")
    watched.drawn(1)
    page.get_by_label("compare trial 0", exact=True).check()
    watched.until("location.search", lambda query: "pick=0" in query)
    page.get_by_label("compare trial 6", exact=True).check()
    page.get_by_role("button", name="Compare 2").click()
    watched.drawn(2)
    words = page.locator(".said").inner_text()
    assert (
        "Trial 6 against trial 0: kda in place of full in layers 1, 2 and 3; mla in place of full in layer 4"
        in words
    )
    assert "cache at 128k" in words
    assert page.locator(".aligned tbody tr").count() == 2
    page.get_by_label("leave out trial 0").click()
    assert page.locator(".aligned tbody tr").count() == 1


def test_pointing_at_a_row_lights_its_mark_and_the_other_way_round(watched, serve, url):
    served, page = serve(url), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/quick")
    watched.drawn(1)
    row = page.locator("#beside tbody tr").first
    row.hover()
    watched.until(
        "document.querySelectorAll('[data-chart=front] .hoverlayer .hovertext').length", lambda n: n >= 1
    )
    assert (
        row.locator(".notation").inner_text().split("\n")[0].strip()
        in page.locator("[data-chart=front] .hoverlayer").text_content()
    )
    page.mouse.move(0, 0)
    mark = page.locator("[data-chart=front] .scatterlayer .point").first.bounding_box()
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2, steps=4)
    page.locator("#pointed .strip").wait_for()
    number = page.locator("#pointed a").inner_text().removeprefix("trial ")
    lit = page.evaluate("[...document.querySelectorAll('#trials tr.lit')].map(row => row.dataset.trial)")
    assert lit == [number]


def test_pictures_are_saved_as_files(watched, serve, url):
    served, page = serve(url), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/quick")
    watched.drawn(1)
    for kind, magic in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as saved:
            page.get_by_role("button", name=f"save this picture as {kind.upper()}").click()
        assert Path(saved.value.path()).read_bytes().startswith(magic)
        assert saved.value.suggested_filename.endswith(f"front.{kind}")


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1440),
        ("dark", 380),
        pytest.param("dark", 1440, marks=pytest.mark.exhaustive),
        pytest.param("light", 380, marks=pytest.mark.exhaustive),
    ],
)
def test_no_page_needs_a_sideways_scroll_or_fails_its_readers(watched, serve, url, workshop, width, scheme):
    served, page = serve(url, workshop=workshop), watched.page
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    watched.allowed |= {"401", "404"}
    found = []
    page.goto(f"{served.base}/login")
    found += unreadable(page, "/login")
    page.goto(f"{served.base}/?token={TOKEN}")
    paths = (
        "/",
        "/studies/quick",
        "/studies/quick?view=space",
        "/studies/quick/trials/6",
        "/studies/quick/trials/40",
        "/studies/quick/compare?pick=0&pick=6&pick=9",
        "/studies/quick/why",
        "/studies/empty",
        "/together?study=quick",
        "/docs",
        "/studies/nope",
    )
    for path in paths:
        page.goto(served.base + path)
        watched.until(STATES, lambda states: "waiting" not in states)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        found += unreadable(page, path)
    assert found == []


def unreadable(page, path):
    """What axe finds on a page that keeps somebody from reading it."""
    answer = Axe().run(page).response
    return [
        (path, rule["id"], node["html"][:200], node.get("failureSummary", "")[:300])
        for rule in answer["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"][:3]
    ]


def test_the_keyboard_reaches_everything(watched, serve, url):
    served, page = serve(url), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/quick")
    watched.drawn(1)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "document.activeElement.getAttribute('name') || document.activeElement.textContent.trim().slice(0, 20)"
            )
        )
    assert {"x", "y", "third", "view", "lasso", "SVG", "PNG", "quality"} <= seen
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


def test_a_new_result_appears_and_a_lost_connection_heals(watched, serve, live_url, measured):
    served, page = serve(live_url), watched.page
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/live")
    watched.drawn(1)
    before = page.evaluate(POINTS)
    time.sleep(1)
    number = measured(live_url, "mla kda kda mamba2")
    watched.until(POINTS, lambda points: points > before)
    assert page.locator(f"#trials tr[data-trial='{number}']").count() == 1
    watched.allowed |= {"ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE"}
    served.stop()
    page.locator("#banner", has_text="Connection lost").wait_for(timeout=10_000)
    another = measured(live_url, "mla mla mla mamba2")
    served.start()
    page.locator("#banner").wait_for(state="hidden", timeout=15_000)
    watched.until(
        f"document.querySelectorAll(\"#trials tr[data-trial='{another}']\").length", lambda n: n == 1
    )


def test_a_crowd_grows_by_what_is_new(watched, serve, live_url, measured, monkeypatch):
    monkeypatch.setattr(scene, "MANY", 3)
    monkeypatch.setattr(figures, "MANY", 3)
    for mixers in (
        "window window window window",
        "linear linear linear linear",
        "window linear window linear",
        "full full window full",
        "full window full full",
    ):
        measured(live_url, mixers)
    served, page = serve(live_url), watched.page
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/figure/front" in request.url else None)
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/live")
    watched.drawn(1)
    crowd = "[...document.querySelector('[data-chart=front]').crowd.trace.customdata]"
    before = page.evaluate(crowd)
    time.sleep(1)
    number = measured(live_url, "window full full full")
    after = watched.until(crowd, lambda numbers: number in numbers)
    assert sorted(after) == sorted([*before, number])
    assert "since=" not in asked[0] and "since=" in asked[-1]
    both = page.evaluate(
        "(() => { const t = document.querySelector('[data-chart=front]').crowd.trace;"
        " return [t.x.length, t.y.length]; })()"
    )
    assert both == [len(after), len(after)]
