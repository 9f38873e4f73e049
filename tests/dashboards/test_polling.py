"""A dashboard that is asked without a pause while results are written: every write gets through, every page is whole."""

import threading
import time
from collections import Counter

import pytest
from fastapi.testclient import TestClient

from dashboards.app import create_app
from storage.store import Store

TOKEN = "right-token"
PATHS = (
    "/",
    "/studies/live",
    "/studies/live/trials/0",
    "/metrics",
    "/api/v1/studies/live",
    "/api/v1/studies/live/front",
    "/api/v1/studies/live/trials",
    "/api/v1/studies/live/events?after=0",
    "/api/v1/studies/live/figure/hypervolume",
)
READERS, WRITES = 6, 40


@pytest.mark.filterwarnings("default")
def test_fault_36_dashboard_polled_hard_during_a_search_never_blocks_a_write(live_url, measured):
    client = TestClient(
        create_app(live_url, token=TOKEN),
        base_url="http://127.0.0.1",
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    answers, over = Counter(), threading.Event()
    lock = threading.Lock()

    def poll(start: int) -> None:
        place = start
        while not over.is_set():
            path = PATHS[place % len(PATHS)]
            status = client.get(path).status_code
            with lock:
                answers[path, status] += 1
            place += 1

    readers = [threading.Thread(target=poll, args=(number,)) for number in range(READERS)]
    for reader in readers:
        reader.start()
    try:
        # Each opens the database anew, and adds, starts and finishes a trial: three commits that wait for all readers.
        numbers = [
            measured(live_url, mixers) for mixers in ["kda mla kda mla", "full full kda kda"] * (WRITES // 2)
        ]
        deadline = time.monotonic() + 120
        while len({path for path, _ in answers}) < len(PATHS) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        over.set()
        for reader in readers:
            reader.join()
    assert numbers == list(range(1, WRITES + 1))
    assert {path for path, _ in answers} == set(PATHS) and {status for _, status in answers} == {200}
    with Store.open(live_url, read_only=True) as store:
        study = store.study("live")
        assert store.counts(study)["done"] == WRITES + 1
        assert all(len(trial.results) == 1 for trial in store.trials(study))
        assert f'nas_trials{{state="done",study="live"}} {WRITES + 1}.0' in client.get("/metrics").text
