"""Takes the README's pictures of the dashboard and the report: `python -m benchmarks.screenshots sqlite:///nas.db quick`.

The study may be any; those in the README are of the default search, as `make search` runs it.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.common import RESULTS
from dashboards import addresses
from dashboards.app import create_app
from nas.cli.main import main as run_command
from nas.workshop import OwnProcess
from storage.store import Store

TOKEN = "a-token-of-the-pictures"
CHROMIUM = "/usr/bin/chromium"
WAITING = "document.querySelectorAll('[data-chart][data-state=waiting]').length"
SIZE, REPORT_SIZE = {"width": 1280, "height": 900}, {"width": 1240, "height": 1010}


def shots(url: str, study: str) -> Sequence[tuple[str, str, str]]:
    """Name, path and scheme of each picture: the front, a layout of the front, and this one beside two known ones."""
    with Store.open(url, read_only=True) as store:
        record = store.study(study)
        if record is None:
            raise SystemExit(f"there is no study {study!r} in {store.shown_url}")
        trials = store.trials(record, states=["done"])
    found = [trial for trial in trials if trial.origin == "search"]
    best = max(found, key=lambda trial: trial.value("quality") or 0.0).number
    known = [trial.number for trial in trials if trial.origin not in ("search", "uniform")]
    full = next(trial.number for trial in trials if trial.origin == "uniform")
    picked = "&".join(f"pick={number}" for number in (best, full, *known[-1:]))
    return (
        ("front", addresses.study(study), "light"),
        ("layout", addresses.trial(study, best), "dark"),
        ("compare", f"{addresses.study(study)}/compare?{picked}", "light"),
    )


def take(url: str, study: str, port: int) -> None:
    """Serves the database, opens each page, and saves what is seen once every picture is drawn."""
    from playwright.sync_api import ViewportSize, sync_playwright

    workshop = OwnProcess(url)
    app = create_app(url, token=TOKEN, workshop=workshop)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        for name, path, scheme in shots(url, study):
            context = browser.new_context(
                viewport=ViewportSize(width=SIZE["width"], height=SIZE["height"]),
                color_scheme="dark" if scheme == "dark" else "light",
            )
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}/?token={TOKEN}")
            page.goto(f"http://127.0.0.1:{port}{path}")
            while page.evaluate(WAITING):
                time.sleep(0.05)
            time.sleep(0.3)
            page.screenshot(path=str(RESULTS / f"dashboard_{name}.png"))
            context.close()
        _report(browser, url, study)
        browser.close()
    app.state.closing.set()
    server.should_exit = True
    workshop.close()


def _report(browser: Any, url: str, study: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        if code := run_command(["report", "--storage", url, "--study", study, "-o", str(path)]):
            raise SystemExit(code)
        context = browser.new_context(viewport=REPORT_SIZE, color_scheme="light")
        page = context.new_page()
        page.goto(path.as_uri())
        while page.evaluate(WAITING):
            time.sleep(0.05)
        time.sleep(0.3)
        page.screenshot(path=str(RESULTS / "front.png"))
        context.close()


def main() -> None:
    """Takes them of the study that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("storage", help="such as sqlite:///nas.db")
    parser.add_argument("study")
    parser.add_argument("--port", type=int, default=8898)
    given = parser.parse_args()
    take(given.storage, given.study, given.port)


if __name__ == "__main__":
    main()
