"""A stream whose reader stalls, and one that is cut: neither holds the server, and nothing is lost."""

import json
import socket
import time
import urllib.request

import pytest

from dashboards import stream
from storage.store import Store
from tests.dashboards.served import TOKEN, Served

WORDS = "x" * 20_000


@pytest.fixture
def served(live_url):
    running = Served(live_url)
    yield running
    running.stop()


def asked(served, path, **headers):
    request = urllib.request.Request(
        served.base + path, headers={"Authorization": f"Bearer {TOKEN}", **headers}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def follow(served, after, *, buffer=None):
    """A connection that has asked for the events after a number, and reads none of them yet."""
    line = socket.socket()
    if buffer:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    line.connect(("127.0.0.1", served.port))
    line.sendall(
        f"GET /api/v1/studies/live/events?after={after} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        f"Authorization: Bearer {TOKEN}\r\nAccept: text/event-stream\r\n\r\n".encode()
    )
    return line


def log_many(url, count):
    with Store.open(url) as store:
        study = store.study("live")
        return [store.log(study, "note", {"words": WORDS}) for _ in range(count)]


def test_fault_44_a_stalled_reader_holds_neither_the_server_nor_its_place(live_url, served, monkeypatch):
    monkeypatch.setattr(stream, "STREAMS", 2)
    monkeypatch.setattr(stream, "STALLED_S", 0.5)
    monkeypatch.setattr(stream, "POLL_S", 0.05)
    served.stop()
    served.start()
    numbers = log_many(live_url, 400)  # eight megabytes, far more than a socket takes
    stalled = [follow(served, 0, buffer=4096) for _ in range(2)]
    try:
        deadline = time.monotonic() + 30
        status = 503
        while status == 503 and time.monotonic() < deadline:
            assert asked(served, "/api/v1/studies/live/front")
            with follow(served, numbers[-2]) as fresh:
                status = int(fresh.recv(4096).split()[1])
        assert status == 200, "the places of readers that stall are given to others"
        written = log_many(live_url, 1)[-1]
        answer = json.loads(asked(served, f"/api/v1/studies/live/events?after={numbers[-1]}"))
        assert [event["seq"] for event in answer["events"]] == [written]
    finally:
        for line in stalled:
            line.close()


def test_fault_44_a_cut_stream_is_resumed_after_the_last_event_that_was_seen(live_url, served, monkeypatch):
    monkeypatch.setattr(stream, "POLL_S", 0.05)
    monkeypatch.setattr(stream, "STREAM_S", 1.0)
    numbers = log_many(live_url, 30)
    seen, text = [], b""
    with follow(served, numbers[0] - 1) as line:
        while len(seen) < 10:
            text += line.recv(65536)
            seen = [
                int(part)
                for part in text.decode().split("id: ")[1:]
                for part in [part.split("\n")[0]]
                if part.isdigit()
            ]
            seen = [number for number in seen if number in numbers]
    # The connection is cut in the middle of an event; the browser tells the last one that it had whole.
    last = seen[8]
    late = log_many(live_url, 3)
    rest = asked(
        served, "/api/v1/studies/live/events", Accept="text/event-stream", **{"Last-Event-ID": str(last)}
    )
    resumed = [int(line[4:]) for line in rest.splitlines() if line.startswith("id: ")]
    # The first line names where it goes on from, and is no event.
    assert resumed[0] == last
    assert resumed[1:] == [number for number in numbers if number > last] + late
