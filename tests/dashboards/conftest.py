"""A study to look at: forty layouts of six mixers with costs and qualities that behave like real ones."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dashboards.view import StudyView, study_view
from storage.records import Axis, LayoutRecord, NewTrial, ResultRecord, StudyRecord
from storage.store import Store
from tests.dashboards.served import Served
from tests.dashboards.watching import ARGUMENTS, CHROMIUM, Watched

FAMILIES = {
    "full": "attention",
    "window": "sparse",
    "linear": "linear_attention",
    "mamba2": "state_space",
    "kda": "delta",
    "mla": "latent",
}
AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="latency_ms", maximise=False, low=1.0, high=6.0, log=True, unit="ms"),
    Axis(name="kv_bytes", maximise=False, low=2.0**22, high=2.0**32, log=True, unit="B"),
)
CONFIG = {
    "target": {"width": 1024, "depth": 16, "context": 131072, "batch": 1, "dtype": "bfloat16"},
    "proxy": {"width": 48, "length": 48},
    "space": {"mixers": list(FAMILIES), "layers": 4, "constraints": ["kv_bytes<=2GiB"]},
    "tasks": {name: {"steps": 200} for name in ("mqar", "parity", "bytes")},
    "sampler": "layout",
    "seed": 0,
}
# Per layer: bytes a token of context, bytes of state, milliseconds, talent for recall, talent for tracking, params.
NATURE = {
    "full": (4096, 0, 0.26, 0.99, 0.55, 4.2e6),
    "window": (0, 2**21, 0.14, 0.55, 0.50, 4.2e6),
    "linear": (0, 2**18, 0.11, 0.45, 0.52, 4.0e6),
    "mamba2": (0, 2**19, 0.13, 0.52, 0.80, 3.9e6),
    "kda": (0, 2**20, 0.16, 0.74, 0.93, 4.1e6),
    "mla": (576, 0, 0.22, 0.95, 0.55, 3.6e6),
}
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
PRESETS = {"kimi-linear": ("kda", "kda", "kda", "mla"), "samba": ("mamba2", "window", "mamba2", "window")}


def layout(mixers: tuple[str, ...], *, window: int = 1024) -> LayoutRecord:
    """A layout record of one mixer a layer, in the shortest notation of runs."""
    words: list[tuple[str, int]] = []
    for mixer in mixers:
        text = f"window[size={window}]" if mixer == "window" and window != 1024 else mixer
        if words and words[-1][0] == text:
            words[-1] = (text, words[-1][1] + 1)
        else:
            words.append((text, 1))
    settings = {"size": window} if window != 1024 else {}
    return LayoutRecord(
        key="-".join(mixers) + str(window),
        text=" ".join(f"{n}*{text}" if n > 1 else text for text, n in words),
        layers=tuple(
            {
                "branches": [{"mixer": mixer, "settings": settings if mixer == "window" else {}}],
                "channel": {"mixer": "swiglu", "settings": {}},
            }
            for mixer in mixers
        ),
    )


def new_trial(mixers: tuple[str, ...], origin: str, *, window: int = 1024) -> NewTrial:
    """A waiting trial of a layout, priced at the target's sizes."""

    def bytes_at(mixer: str, context: int) -> float:
        return NATURE[mixer][0] * context + NATURE[mixer][1]

    record = layout(mixers, window=window)
    return NewTrial(
        layout=record,
        origin=origin,
        params={},
        sampler_attrs={},
        costs={
            "kv_bytes": 4 * sum(bytes_at(m, 131072) for m in mixers),
            "kv_bytes@8192": 4 * sum(bytes_at(m, 8192) for m in mixers),
            "latency_ms": 4 * sum(NATURE[m][2] for m in mixers),
            "params": 4 * sum(NATURE[m][5] for m in mixers) + 130e6,
        },
        layer_costs=tuple(
            {"kv_bytes": bytes_at(m, 131072), "latency_ms": NATURE[m][2], "params": NATURE[m][5]}
            for m in mixers
        ),
        evaluation_key=f"{record.key}/{origin}",
    )


def result(mixers: tuple[str, ...], noise: random.Random) -> ResultRecord:
    """What training such a layout might have given."""
    recall = (
        1 - 0.9 * min(1 - NATURE[m][3] for m in mixers) - 0.35 * sum(1 - NATURE[m][3] for m in mixers) / 4
    )
    track = 0.4 * max(NATURE[m][4] for m in mixers) + 0.6 * sum(NATURE[m][4] for m in mixers) / 4
    scores = {
        "mqar": min(0.995, max(0.02, recall + noise.gauss(0, 0.01))),
        "parity": min(0.995, track + noise.gauss(0, 0.01)),
        "bytes": min(0.9, 0.5 * (recall + track) + noise.gauss(0, 0.01)),
    }
    steps = range(0, 201, 20)
    floor = {task: 2.2 * (1 - score) for task, score in scores.items()}
    return ResultRecord(
        rung=0,
        quality=sum(scores.values()) / 3,
        scores=scores,
        details={
            "curves": {
                task: [[s, low + (3.4 - low) * 0.975**s * (1 + noise.gauss(0, 0.02))] for s in steps]
                for task, low in floor.items()
            },
            "data": {"sha256": "3f9c" * 16, "path": "stdlib"},
            "learning_rates": dict.fromkeys(scores, 0.003),
        },
        steps=200,
        tokens=614_400,
        train_s=3.1,
        worker_s=3.4,
        seed=0,
    )


def fill(store: Store, study: StudyRecord, *, found: int = 32) -> None:
    """Six uniform layouts, two presets, and what a search then found; one unfit, one running, one waiting."""
    noise = random.Random(7)
    planned: list[tuple[tuple[str, ...], str, int]] = [((m,) * 4, "uniform", 1024) for m in FAMILIES]
    planned += [(mixers, name, 1024) for name, mixers in PRESETS.items()]
    for _ in range(found):
        mixers = tuple(noise.choice([*FAMILIES, "kda", "kda", "mamba2"]) for _ in range(4))
        planned.append((mixers, "search", noise.choice((512, 1024, 2048))))
    for mixers, origin, window in planned:
        end(store, study, new_trial(mixers, origin, window=window), result(mixers, noise))
    unfit = store.add_trial(study, new_trial(("full", "linear", "linear", "full"), "search"))
    attempt = store.start_trial(study, unfit.number)
    store.fail_trial(study, unfit.number, attempt, "unfit", "loss is NaN at step 41 of mqar")
    running = store.add_trial(study, new_trial(("kda", "mla", "kda", "window"), "search"))
    store.start_trial(study, running.number)
    store.add_trial(study, new_trial(("linear", "mla", "kda", "window"), "search"))


def end(store: Store, study: StudyRecord, new: NewTrial, outcome: ResultRecord) -> int:
    """Adds a trial that is measured at once; returns its number."""
    trial = store.add_trial(study, new)
    attempt = store.start_trial(study, trial.number)
    assert store.finish_trial(study, trial.number, attempt, outcome)
    return trial.number


def measure(store: Store, study: StudyRecord, mixers: tuple[str, ...]) -> int:
    """Adds a found layout and its result; returns its number."""
    return end(store, study, new_trial(mixers, "search"), result(mixers, random.Random(1)))


def make_study(store: Store, name: str) -> StudyRecord:
    """A study without trials."""
    return store.create_study(name=name, config=CONFIG, config_hash="c0ffee", axes=AXES, families=FAMILIES)


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with a filled study, an empty one, and one that an attacker named; tests only read it."""
    address = f"sqlite:///{tmp_path_factory.mktemp('dashboards')}/nas.db"
    with Store.open(address) as store:
        quick = make_study(store, "quick")
        store.log(quick, "search_planned", {"trials": 48})
        fill(store, quick)
        make_study(store, "empty")
        hostile = make_study(store, HOSTILE)
        end(store, hostile, new_trial(("kda",) * 4, "uniform"), result(("kda",) * 4, random.Random(1)))
    return address


@pytest.fixture
def live_url(tmp_path: Path) -> str:
    """A database with one layout measured, for tests that write while others read."""
    address = f"sqlite:///{tmp_path}/live.db"
    with Store.open(address) as store:
        measure(store, make_study(store, "live"), ("kda",) * 4)
    return address


@pytest.fixture
def failed(live_url: str) -> list[int]:
    """Numbers of two trials of the study "live" that failed twice, the second of which waits for another attempt."""
    numbers = []
    with Store.open(live_url) as store:
        study = store.study("live")
        assert study is not None
        for mixers in (("kda", "mla", "kda", "mla"), ("mla", "kda", "mla", "kda")):
            number = store.add_trial(study, new_trial(mixers, "search")).number
            attempt = store.start_trial(study, number)
            store.fail_trial(study, number, attempt, "waiting", f"worker {number} died")
            attempt = store.start_trial(study, number)
            store.fail_trial(study, number, attempt, "lost", f"<b>disk</b> {number}")
            numbers.append(number)
        store.retry_trials(study, numbers[1:])
    return numbers


@pytest.fixture
def measured() -> Callable[[str, str], int]:
    """Adds one measured layout (mixers by blanks) to the study "live" of a database."""

    def add(address: str, mixers: str) -> int:
        with Store.open(address) as store:
            study = store.study("live")
            assert study is not None
            return measure(store, study, tuple(mixers.split()))

    return add


@pytest.fixture
def hostile() -> str:
    """The attacker's name for a study."""
    return HOSTILE


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """The database, opened for reading."""
    with Store.open(url, read_only=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def serve():
    running = []

    def start(url, **options):
        running.append(Served(url, **options))
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


@pytest.fixture
def study(store: Store) -> StudyRecord:
    """The study of forty layouts."""
    found = store.study("quick")
    assert found is not None
    return found


@pytest.fixture
def view(store: Store, study: StudyRecord) -> StudyView:
    """What its pages are made of."""
    return study_view(study, store.trials(study))
