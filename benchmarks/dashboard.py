"""How long the dashboard takes over a study of 100,000 trials: on the server by page, and in a browser.

A trial of the study is made up: nothing here is about how good a layout is. Run it as `python -m benchmarks.dashboard`; with
--database it takes a study that is there. The browser is the system's Chromium, without a GPU.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from benchmarks.common import save
from dashboards.app import create_app
from storage.records import ResultRecord
from storage.store import Store

TRIALS, NEW, REPETITIONS, STARTS = 100_000, 100, 9, 5
SETTLED_MS = 4000
TOKEN = "a-token-of-the-benchmark"
CHROMIUM = "/usr/bin/chromium"
SERVER = (
    "import sys, uvicorn; from dashboards.app import create_app; "
    "uvicorn.run(create_app(sys.argv[1], token=sys.argv[2]), port=int(sys.argv[3]), log_level='critical')"
)
BOX = "document.querySelector('[data-chart=front]')"
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
# When the still picture of the front was on the screen: the page marks it for the browser to tell.
STILL = (
    "new Promise(told => { new PerformanceObserver(list => told(list.getEntries().find(e => e.identifier === 'still')"
    "?.renderTime)).observe({ type: 'element', buffered: true }); setTimeout(() => told(null), 2000); })"
)
DRAWN = f"{BOX}?.dataset.state === 'drawn'"
POINTS = f"{BOX}.crowd.trace.x.length"
# A picture may hold its data and show nothing of it: this is what is seen.
SEEN = (
    "(() => { const canvas = document.querySelector('.stage .crowd'), all = canvas.getContext('2d').getImageData(0, 0,"
    " canvas.width, canvas.height).data; let n = 0; for (let i = 3; i < all.length; i += 4) n += all[i] > 0; return n; })()"
)
# Asked as live.js asks once events have told of new trials; the stream itself would wait for a pause in them.
UPDATE = (
    f"(async () => {{ const began = performance.now(), box = {BOX}, known = box.crowd.trace.x.length;"
    " document.dispatchEvent(new Event('charts:refresh'));"
    " while (box.crowd.trace.x.length === known && performance.now() - began < 9000) await new Promise(requestAnimationFrame);"
    " return performance.now() - began; })()"
)
# So long takes the crowd alone, as each step of a zoom by hand does.
REDRAW = (
    f"(() => {{ const crowd = {BOX}.crowd, began = performance.now(); for (let i = 0; i < 20; i += 1) crowd.draw();"
    " return (performance.now() - began) / 20; })()"
)
PAGES = (
    "/",
    "/studies/large",
    "/studies/large?sort=quality&down=1&page=900",
    "/studies/large?mixer=kda&mixer=mla",
    "/studies/large?area=1e6,0.2;1e9,0.2;1e9,0.7;1e6,0.7",
    "/studies/large/trials/77",
    "/studies/large/compare?pick=1&pick=2&pick=3",
    "/studies/large/why",
    "/together?study=large",
    "/api/v1/studies",
    "/api/v1/studies/large",
    "/api/v1/studies/large/front",
    "/api/v1/studies/large/trials?offset=50000&limit=100",
    "/api/v1/studies/large/trials/77",
    "/api/v1/studies/large/events?after=0",
    "/api/v1/studies/large/figure/front",
    "/api/v1/studies/large/figure/front_3d",
    "/api/v1/studies/large/figure/hypervolume",
    "/api/v1/studies/large/figure/calibration",
)


def timed(run: Callable[[], object], repetitions: int = REPETITIONS) -> dict[str, float]:
    """The middle of some runs, after one that does not count: by the clock, and of the processor's time."""
    run()
    times, own = [], []
    for _ in range(repetitions):
        began, used = time.perf_counter(), time.process_time()
        run()
        times.append(1e3 * (time.perf_counter() - began))
        own.append(1e3 * (time.process_time() - used))
    return {
        "ms": round(statistics.median(times), 1),
        "processor_ms": round(statistics.median(own), 1),
        "fastest_ms": round(min(times), 1),
    }


def finish_some(url: str, count: int) -> None:
    """Measures so many new trials as a search does: each with the layout and the costs of an old one."""
    with Store.open(url) as store:
        study = store.studies()[0]
        known = [trial for trial in store.trials(study, states=["done"], limit=count) if trial.result]
        for number, trial in enumerate(known):
            assert trial.result is not None
            attempt = store.start_trial(study, store.add_trial(study, _again(trial, number)).number)
            made = ResultRecord(**{**trial.result.__dict__, "quality": 0.31 + number / 1e4})
            store.finish_trial(study, sum(store.counts(study).values()) - 1, attempt, made)


def _again(trial: Any, number: int) -> Any:
    from storage.records import NewTrial

    costs = {name: value * (1 + number / 1e4) for name, value in trial.costs.items()}
    return NewTrial(
        layout=trial.layout,
        origin="search",
        params=trial.params,
        sampler_attrs={},
        costs=costs,
        layer_costs=trial.layer_costs,
        evaluation_key=f"{trial.evaluation_key}/{time.time_ns()}",
    )


def on_the_server(url: str) -> dict[str, Any]:
    """The first reading, every page and answer, and the reading of new trials."""
    client = TestClient(
        create_app(url, token=TOKEN),
        base_url="http://127.0.0.1",
        headers={"Authorization": f"Bearer {TOKEN}"},
    )

    def ask(path: str) -> None:
        answer = client.get(path)
        assert answer.status_code == 200, (path, answer.text[:200])

    began = time.perf_counter()
    ask("/studies/large")
    first_ms = round(1e3 * (time.perf_counter() - began), 1)
    while "data-unread" in client.get("/studies/large").text:
        time.sleep(0.25)
    whole_s = round(time.perf_counter() - began, 1)
    pages = {path: timed(lambda path=path: ask(path)) for path in PAGES}  # type: ignore[misc]
    version = client.get("/api/v1/studies/large/figure/front").json()["version"]
    finish_some(url, NEW)
    began = time.perf_counter()
    part = client.get("/api/v1/studies/large/figure/front", params={"since": version})
    assert part.json()["increment"]
    update_ms = round(1e3 * (time.perf_counter() - began), 1)
    return {
        "first_page_of_a_study_not_yet_read_ms": first_ms,
        "whole_study_read_after_s": whole_s,
        "page_ms": pages,
        "slowest": {kind: max(page[kind] for page in pages.values()) for kind in ("ms", "processor_ms")},
        f"figure_with_{NEW}_new_trials_ms": update_ms,
        f"figure_with_{NEW}_new_trials_bytes": len(part.content),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


@contextmanager
def serving(url: str, port: int) -> Iterator[str]:
    """A server in a process of its own, whose first answer is timed by whoever waits for it."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, url, TOKEN, str(port)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def answered(address: str) -> None:
    """Waits until a server answers."""
    import urllib.request
    from urllib.error import URLError

    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except URLError:
            time.sleep(0.005)


def started(url: str, port: int) -> float:
    """Seconds from the start of a server's process to its first answer."""
    began = time.perf_counter()
    with serving(url, port) as base:
        answered(base)
        return round(time.perf_counter() - began, 2)


def in_the_browser(url: str, port: int) -> dict[str, Any]:
    """From the click to the front seen and alive, and from new trials to their marks, as a page's own clock has it."""
    from playwright.sync_api import sync_playwright

    starts = [started(url, port) for _ in range(STARTS)]
    with serving(url, port) as base, sync_playwright() as driver:
        answered(base)
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        page.goto(f"{base}/?token={TOKEN}")
        page.goto(f"{base}/studies/large")
        while page.locator("[data-unread]").count():
            time.sleep(0.25)
        # The page shows the study that it has read meanwhile; one that is closed just then may never be.
        page.wait_for_timeout(SETTLED_MS)
        page.close()
        page = context.new_page()
        views, paints, stills = [], [], []
        for _ in range(5):
            page.goto("about:blank")
            began = time.perf_counter()
            page.goto(f"{base}/studies/large", wait_until="commit")
            while not page.evaluate(DRAWN):
                time.sleep(0.01)
            views.append(round(time.perf_counter() - began, 2))
            assert page.evaluate(SEEN) > 0 and not page.locator(".no-webgl").count()
            paints.append(round(page.evaluate(PAINTED) / 1e3, 2))
            stills.append(round(page.evaluate(STILL) / 1e3, 2))
        # Without its stream the page learns of nothing by itself, before the clock runs.
        page.route("**/events**", lambda route: route.abort())
        page.goto(f"{base}/studies/large")
        while not page.evaluate(DRAWN):
            time.sleep(0.01)
        before = page.evaluate(POINTS)
        finish_some(url, NEW)
        updates = page.evaluate(UPDATE)
        after = page.evaluate(POINTS)
        assert after > before, "the new trials never came"
        redraw = page.evaluate(REDRAW)
        browser.close()
    return {
        "server_answers_after_s": statistics.median(starts),
        "slowest_start_s": max(starts),
        "first_paint_s": statistics.median(paints),
        "front_seen_first_time_s": stills[0],
        "front_seen_s": statistics.median(stills),
        "front_alive_first_time_s": views[0],
        "front_alive_s": statistics.median(views),
        "crowd_before": before,
        "crowd_after": after,
        f"update_of_{NEW}_trials_ms": round(updates, 1),
        "crowd_redrawn_ms": round(redraw, 1),
    }


def main() -> None:
    """Measures all of it; the study is made first unless one is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", help="a SQLite file with a study called large, which is written to")
    parser.add_argument("--port", type=int, default=8899)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given.database or f"{folder}/large.db").resolve()
        url = f"sqlite:///{path}"
        if given.database is None:
            from benchmarks.large_study import fill

            with Store.open(url) as store:
                fill(store, TRIALS)
        measured: dict[str, Any] = {"trials": TRIALS, "server": on_the_server(url)}
        if Path(CHROMIUM).exists():
            measured["browser"] = in_the_browser(url, given.port)
    # Who reads the figures should know what else the machine was doing.
    measured["load_average"] = [round(load, 1) for load in os.getloadavg()]
    save("dashboard", json.loads(json.dumps(measured)))


if __name__ == "__main__":
    main()
