"""A real browser opens the pages and the report: pictures are drawn, nothing leaves the machine, names stay text."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn

from dashboards import addresses
from dashboards.app import create_app
from dashboards.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium at /usr/bin/chromium"),
    pytest.mark.slow,
]
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
STATES = "[...document.querySelectorAll('[data-chart]')].map(box => box.dataset.state)"
POINTS = "document.querySelectorAll('[data-chart=front] .scatterlayer .point').length"
TOKEN = "right-token"


class Watched:
    """A page, and everything that it should not have done."""

    def __init__(self, page):
        self.page = page
        self.faults = []
        self.allowed = set()
        page.on("dialog", self._dialog)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("console", self._console)
        page.route("**/*", self._request)

    def _dialog(self, dialog):
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _console(self, message):
        if message.type == "error" and not any(word in message.text for word in self.allowed):
            self.faults.append(f"console: {message.text}")

    def _request(self, route):
        parts = urlsplit(route.request.url)
        if parts.scheme in ("file", "data", "blob") or parts.hostname == "127.0.0.1":
            route.continue_()
        else:
            self.faults.append(f"request: {route.request.url}")
            route.abort()

    def until(self, expression, wanted):
        """Polls from outside: a poll inside would need eval, which the pages' policy forbids."""
        for _ in range(150):
            found = self.page.evaluate(expression)
            if wanted(found):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{expression} stayed {found!r}; {self.faults}")

    def drawn(self, pictures):
        states = self.until(STATES, lambda found: found and "waiting" not in found)
        assert states == ["drawn"] * pictures


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()


class Server(uvicorn.Server):
    """Tells the streams to end when it begins to stop."""

    def __init__(self, config, closing):
        super().__init__(config)
        self.closing = closing

    async def shutdown(self, sockets=None):
        self.closing.set()
        await super().shutdown(sockets)


class Served:
    """A dashboard on a free port, which can be stopped and started again."""

    def __init__(self, url):
        self.url = url
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        app = create_app(self.url, token=TOKEN)
        config = uvicorn.Config(app, port=self.port, log_level="error", timeout_graceful_shutdown=3)
        self.server = Server(config, app.state.closing)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def serve():
    running = []

    def start(url):
        running.append(Served(url))
        return running[-1]

    yield start
    for served in running:
        served.stop()


@pytest.fixture
def watched(browser, serve):  # noqa: ARG001 - so that pages close before their servers stop
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield (seen := Watched(context.new_page()))
    context.close()
    assert seen.faults == []


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


def test_a_walk_through_the_pages(watched, serve, url, hostile):
    served, page = serve(url), watched.page
    watched.allowed.add("401")
    page.goto(served.base)
    page.get_by_label("token").fill(TOKEN)
    page.get_by_role("button", name="open").click()
    page.get_by_role("link", name="quick").click()
    watched.drawn(4)
    page.get_by_label("across").select_option("latency_ms")
    assert "x=latency_ms" in page.url
    page.reload()
    watched.drawn(4)
    assert page.get_by_label("across").input_value() == "latency_ms"
    page.locator(".beside a").first.click()
    watched.drawn(2)
    assert "/trials/" in page.url
    page.goto(served.base + addresses.study(hostile))
    watched.drawn(4)
    assert page.locator("h1").inner_text() == hostile
    watched.allowed.add("404")
    page.goto(f"{served.base}/studies/nope")
    assert page.locator("h1").inner_text() == "Not here"


def test_a_phone_needs_no_sideways_scroll(watched, serve, url):
    served = serve(url)
    watched.page.set_viewport_size({"width": 380, "height": 800})
    watched.page.goto(f"{served.base}/login?token={TOKEN}")
    for path in ("/", "/studies/quick", "/studies/quick/trials/6"):
        watched.page.goto(served.base + path)
        if path != "/":
            watched.until(STATES, lambda found: "waiting" not in found)
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= 380


def test_a_new_result_appears_and_a_lost_connection_heals(watched, serve, live_url, measured):
    served, page = serve(live_url), watched.page
    page.goto(f"{served.base}/login?token={TOKEN}")
    page.goto(f"{served.base}/studies/live")
    watched.drawn(4)
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
