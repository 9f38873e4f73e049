"""Thousands of layouts in a browser: seen, pointed at, opened, zoomed and saved, on the page and in the report.

What is asked of is what a reader sees, pixel by pixel: that the data is there says nothing of it.
"""

import time
from pathlib import Path

import pytest

from dashboards import figures, scene
from dashboards.report import write_report
from tests.dashboards.served import TOKEN
from tests.dashboards.watching import ARGUMENTS, CHROMIUM, WITHOUT, Watched

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = WITHOUT
BOX = "document.querySelector('[data-chart=front]')"
CROWD = f"{BOX}.crowd"
# How opaque the canvas is where each layout of the crowd stands by the axes that Plotly shows, if it is within them.
OPACITIES = (
    f"(() => {{ const box = {BOX}, {{ xaxis, yaxis }} = box._fullLayout, canvas = document.querySelector('.stage .crowd');"
    " const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
    " const trace = box.crowd.trace; return [...trace.customdata].map((number, i) => {"
    " const x = Math.round(xaxis.d2p(trace.x[i]) / xaxis._length * (canvas.width - 1));"
    " const y = Math.round(yaxis.d2p(trace.y[i]) / yaxis._length * (canvas.height - 1));"
    " const seen = x >= 0 && y >= 0 && x < canvas.width && y < canvas.height;"
    " return [number, seen ? pixels.data[4 * (y * canvas.width + x) + 3] : null]; }); })()"
)
COVERED = (
    "(() => { const canvas = document.querySelector('.stage .crowd'); const pixels = canvas.getContext('2d')"
    ".getImageData(0, 0, canvas.width, canvas.height).data; let n = 0;"
    " for (let i = 3; i < pixels.length; i += 4) n += pixels[i] > 0; return n / (pixels.length / 4); })()"
)
# Where the layouts of the crowd stand on the screen.
PLACES = (
    f"(() => {{ const box = {BOX}, {{ xaxis, yaxis }} = box._fullLayout, edge = box.getBoundingClientRect(), trace = box.crowd.trace;"
    " return [...trace.customdata].map((number, i) => [number, edge.x + xaxis._offset + xaxis.d2p(trace.x[i]),"
    " edge.y + yaxis._offset + yaxis.d2p(trace.y[i])]); })()"
)


@pytest.fixture
def crowded(monkeypatch):
    """All but a handful of layouts is a crowd."""
    monkeypatch.setattr(scene, "MANY", 3)
    monkeypatch.setattr(figures, "MANY", 3)


def open_front(watched, served, query=""):
    watched.page.goto(f"{served.base}/?token={TOKEN}")
    watched.page.goto(f"{served.base}/studies/quick{query}")
    watched.drawn(1)


def alone(page):
    """A layout of the crowd that is shown, with no other one near, nor a mark, and where it stands."""
    places = page.evaluate(PLACES)
    marks = [mark.bounding_box() for mark in page.locator(".scatterlayer .point").all()]
    others = [(x, y) for _, x, y in places]
    others += [(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2) for mark in marks if mark]
    edge = page.locator("[data-chart=front] .nsewdrag").first.bounding_box()
    for number, x, y in places:
        inside = 9 < x - edge["x"] < edge["width"] - 9 and 9 < y - edge["y"] < edge["height"] - 9
        if inside and sum(abs(x - a) + abs(y - b) < 24 for a, b in others) == 1:
            return number, x, y
    raise AssertionError("every layout has another one near it")


def seen(watched):
    opacities = watched.page.evaluate(OPACITIES)
    assert all(opacity > 60 for _, opacity in opacities if opacity is not None), opacities
    assert 0 < watched.page.evaluate(COVERED) < 0.05, "dots are drawn, and only dots"
    return [number for number, opacity in opacities if opacity is not None]


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize(
    "query", ["", "?x=latency_ms&y=kv_bytes", "?x_scale=linear&x=kv_bytes", "?third=none"]
)
def test_every_layout_of_a_crowd_is_seen(watched, serve, url, query):
    open_front(watched, serve(url), query)
    assert len(seen(watched)) >= 20
    assert watched.page.locator(".no-webgl").count() == 0


@pytest.mark.usefixtures("crowded")
def test_a_layout_of_a_crowd_is_pointed_at_and_opened(watched, serve, url):
    page = watched.page
    open_front(watched, serve(url))
    number, x, y = alone(page)
    page.mouse.move(x + 1, y - 1, steps=3)
    tip = page.locator(".stage .tip")
    tip.wait_for()
    words = tip.inner_text().split("\n")
    assert words[0] == f"trial {number}" and words[1].startswith("quality ") and words[2].endswith("iB")
    page.locator("#pointed .strip").wait_for()
    assert page.locator("#pointed a").inner_text() == f"trial {number}"
    assert page.locator(f"#trials tr.lit[data-trial='{number}']").count() == 1
    page.mouse.move(2, 2)
    tip.wait_for(state="hidden")
    page.mouse.click(x, y)
    page.wait_for_url(f"**/trials/{number}")


@pytest.mark.usefixtures("crowded")
def test_pointing_at_a_row_rings_its_layout_in_the_crowd(watched, serve, url):
    page = watched.page
    open_front(watched, serve(url))
    places = {number: (x, y) for number, x, y in page.evaluate(PLACES)}
    rows = page.locator("#trials tbody tr")
    number = next(n for n in (int(rows.nth(i).get_attribute("data-trial")) for i in range(40)) if n in places)
    page.locator(f"#trials tr[data-trial='{number}']").hover()
    page.locator(".stage .ring").wait_for()
    edge = page.locator(".stage .ring").bounding_box()
    moved = {n: (x, y) for n, x, y in page.evaluate(PLACES)}[number]
    assert (edge["x"] + edge["width"] / 2, edge["y"] + edge["height"] / 2) == pytest.approx(moved, abs=2)


@pytest.mark.usefixtures("crowded")
def test_a_crowd_follows_the_zoom_and_two_clicks_show_it_whole(watched, serve, url):
    page = watched.page
    open_front(watched, serve(url))
    whole = seen(watched)
    box = page.locator("[data-chart=front] .nsewdrag").first.bounding_box()
    corners = [
        (box["x"] + share * box["width"], box["y"] + down * box["height"])
        for share, down in ((0.02, 0.4), (0.6, 0.98))
    ]
    page.mouse.move(*corners[0])
    page.mouse.down()
    page.mouse.move(*corners[1], steps=6)
    page.mouse.up()
    watched.until("location.hash", lambda text: "zoom=" in text)
    near = seen(watched)
    assert 0 < len(near) < len(whole)
    page.reload()
    watched.drawn(1)
    assert seen(watched) == near
    # A double click shows everything again and opens nothing, even where a layout stands.
    x, y = alone(page)[1:]
    page.mouse.dblclick(x, y)
    watched.until(OPACITIES, lambda found: [n for n, opacity in found if opacity is not None] == whole)
    time.sleep(0.4)
    assert "/trials/" not in page.url and "zoom" not in page.url
    # Other objectives have another whole.
    page.locator("select[name=x]").select_option("latency_ms")
    watched.until(OPACITIES, lambda found: len(found) >= 20 and all(o is not None for _, o in found))
    page.mouse.move(*corners[0])
    page.mouse.down()
    page.mouse.move(*corners[1], steps=6)
    page.mouse.up()
    watched.until("location.hash", lambda text: "zoom=" in text)
    page.locator("[data-chart=front]").hover()
    page.get_by_label("Show everything").or_(page.locator("[data-title='Show everything']")).first.click()
    watched.until(OPACITIES, lambda found: all(opacity is not None for _, opacity in found))
    assert "zoom" not in page.url


@pytest.mark.usefixtures("crowded")
def test_a_crowd_is_in_the_saved_picture(watched, serve, url):
    page = watched.page
    open_front(watched, serve(url))
    saved = {}
    for kind in ("svg", "png"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"save this picture as {kind.upper()}").click()
        saved[kind] = Path(download.value.path()).read_bytes()
    assert b"<image" in saved["svg"] and b"data:image/png" in saved["svg"]
    without = page.evaluate(
        f"Plotly.toImage({BOX}, {{ format: 'svg' }}).then(text => text.includes('<image'))"
    )
    assert not without, "the picture on the page keeps its crowd behind it, and gains no second one"


@pytest.mark.usefixtures("crowded")
def test_a_crowd_stands_in_the_report_too(watched, store, tmp_path):
    path = tmp_path / "report.html"
    write_report(store, store.study("quick"), path)
    watched.page.goto(path.as_uri())
    watched.drawn(4)
    whole = seen(watched)
    assert len(whole) >= 20
    page = watched.page
    edge = page.locator("[data-chart=front] .nsewdrag").first.bounding_box()
    left, top, wide, high = (edge[key] for key in ("x", "y", "width", "height"))
    page.mouse.move(left + 0.02 * wide, top + 0.4 * high)
    page.mouse.down()
    page.mouse.move(left + 0.6 * wide, top + 0.98 * high, steps=6)
    page.mouse.up()
    watched.until(OPACITIES, lambda found: any(opacity is None for _, opacity in found))
    page.mouse.dblclick(*alone(page)[1:])
    watched.until(OPACITIES, lambda found: [n for n, opacity in found if opacity is not None] == whole)
    assert watched.page.locator(".no-webgl").count() == 0


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("width", [1280, 380])
def test_a_still_picture_stands_there_until_plotly_is_read(watched, serve, url, width):
    served, page = serve(url), watched.page
    page.set_viewport_size({"width": width, "height": 900})
    held = []
    page.route("**/plotly.js*", lambda route: held.append(route))
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "front.svg" in request.url else None)
    page.goto(f"{served.base}/?token={TOKEN}")
    page.goto(f"{served.base}/studies/quick", wait_until="commit")
    still = "(() => { const i = document.querySelector('.still img'); return i && i.complete && [i.naturalWidth, i.clientWidth, i.clientHeight]; })()"
    natural, wide, high = watched.until(still, bool)
    assert natural > 0 and high in (360, 440, 470)
    assert page.locator("[data-chart=front]").get_attribute("data-state") == "waiting"
    assert [("narrow=1" in address) for address in asked] == [width == 380]
    watched.until("1", lambda _: held)
    held[0].continue_()
    watched.drawn(1)
    assert page.locator(".still").is_hidden()
    drawn = page.locator("[data-chart=front]").bounding_box()
    assert (drawn["width"], drawn["height"]) == pytest.approx((wide, high), abs=2), "the page would jump"


@pytest.mark.usefixtures("crowded")
def test_without_webgl_two_dimensions_are_drawn_and_three_are_refused_in_words(serve, url, browser):
    served = serve(url)
    bare = browser.browser_type.launch(executable_path=str(CHROMIUM), args=[*ARGUMENTS, "--disable-3d-apis"])
    try:
        watched = Watched(bare.new_page())
        assert watched.page.evaluate("document.createElement('canvas').getContext('webgl')") is None
        open_front(watched, served)
        assert len(seen(watched)) >= 20
        watched.page.goto(f"{served.base}/studies/quick?view=space")
        watched.page.locator("[data-chart=front][data-state=failed]").wait_for()
        assert "need WebGL" in watched.page.locator("[data-chart=front]").inner_text()
        assert watched.faults == []
    finally:
        bare.close()


@pytest.mark.usefixtures("crowded")
def test_a_lasso_catches_of_the_crowd_what_is_within_it(watched, serve, url):
    page = watched.page
    open_front(watched, serve(url))
    page.get_by_role("button", name="lasso").click()
    number, x, y = alone(page)
    page.mouse.move(x - 8, y - 8)
    page.mouse.down()
    for across, down in ((8, -8), (8, 8), (-8, 8), (-8, -8)):
        page.mouse.move(x + across, y + down, steps=6)
    page.mouse.up()
    watched.until("location.search", lambda query: "area=" in query)
    rows = "[...document.querySelectorAll('#beside tbody tr')].map(row => Number(row.dataset.trial))"
    assert watched.until(rows, lambda found: len(found) < 5) == [number]
    depths = dict(
        watched.until(OPACITIES, lambda found: sorted(opacity for _, opacity in found)[len(found) // 2] < 60)
    )
    assert depths.pop(number) > 80 and sorted(depths.values())[len(depths) // 2] < 40
    assert "/trials/" not in page.url, "the end of a lasso is no click"
