"""The frozen values that storage takes and gives: plain numbers, texts and JSON, no torch, no layout class."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["waiting", "running", "done", "pruned", "unfit", "lost", "quarantined"]
STATES: tuple[State, ...] = ("waiting", "running", "done", "pruned", "unfit", "lost", "quarantined")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One objective on the frozen scale of a study: `low` maps to 0 and `high` to 1, by logarithm if `log`."""

    name: str
    maximise: bool
    low: float
    high: float
    log: bool
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A study: its resolved configuration, the hash of what may not change, and its frozen axes."""

    id: int
    name: str
    config: Mapping[str, Any]
    config_hash: str
    axes: tuple[Axis, ...]
    families: Mapping[str, str]
    """Mixer name to family, so that readers can colour a layout without the vocabulary."""
    created_at: float
    """Seconds since the epoch, by the database's clock where it has one."""


@dataclass(frozen=True, kw_only=True)
class LayoutRecord:
    """A layout as text in target units, its stable key and its JSON form (one object a layer)."""

    key: str
    text: str
    layers: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class NewTrial:
    """What the driver knows of a trial before it runs: the layout, where it came from, and its exact costs."""

    layout: LayoutRecord
    origin: str
    params: Mapping[str, Any]
    """The sampler's own parameters, so that its memory can be rebuilt."""
    sampler_attrs: Mapping[str, Any]
    costs: Mapping[str, float]
    """Costs of the whole target network by name: kv_bytes, kv_bytes@8192 (at another context), latency_ms, params."""
    layer_costs: tuple[Mapping[str, float], ...]
    """The same by layer of the pattern, in order: kv_bytes, latency_ms, params."""
    evaluation_key: str
    """Hash of layout, proxy frame, budget, tasks, data and seed: equal keys would train the same thing."""


@dataclass(frozen=True, kw_only=True)
class ResultRecord:
    """What one finished training measured, at one rung."""

    rung: int
    quality: float
    scores: Mapping[str, float]
    details: Mapping[str, Any]
    """Whatever else is worth keeping: learning curves by task, data hash, learning rates tried."""
    steps: int
    tokens: int
    train_s: float
    """Seconds inside the training loop."""
    worker_s: float
    """Seconds of the whole evaluation in the worker, building and scoring included."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as it stands: state, attempts, costs, and its results by rung (the last one counts)."""

    number: int
    """From 0, counted within the study."""
    state: State
    origin: str
    layout: LayoutRecord
    params: Mapping[str, Any]
    sampler_attrs: Mapping[str, Any]
    costs: Mapping[str, float]
    layer_costs: tuple[Mapping[str, float], ...]
    evaluation_key: str
    attempts: int
    why: str
    """The reason of an ending without a result; empty otherwise."""
    results: tuple[ResultRecord, ...] = ()
    repeats: tuple[ResultRecord, ...] = ()
    """The same training to the end with other seeds, by seed."""
    created_at: float = 0.0
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def result(self) -> ResultRecord | None:
        """The result at the highest rung, if the trial has one."""
        return max(self.results, key=lambda r: r.rung, default=None)

    def by_seed(self, name: str) -> tuple[float, ...]:
        """The quality, or the score in a task, of every seed that it was trained with; the first is the study's own."""
        results = [one for one in (self.result, *self.repeats) if one is not None]
        values = [one.quality if name == "quality" else one.scores.get(name) for one in results]
        return tuple(value for value in values if value is not None)

    def value(self, name: str) -> float | None:
        """What the trial has under an objective's name: a cost of its layout, or the mean of its seeds."""
        if name != "quality" and name in self.costs:
            return self.costs[name]
        values = self.by_seed(name)
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """A measured latency of one layer or one whole layout at one frame on one device."""

    device: str
    frame: str
    """Stable text of the frame's sizes that matter to the measurement."""
    subject: str
    """A layer's notation, or a whole layout's, as measured."""
    phase: Literal["decode", "prefill"]
    whole: bool
    """True where the subject was run as one stack end to end rather than layer by layer."""
    latency_ms: float
    spread_ms: float
    """Half the distance between the quartiles of the repetitions."""
    repetitions: int


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened, in order: `seq` rises without ties within a database."""

    seq: int
    at: float
    study: str | None
    kind: str
    payload: Mapping[str, Any] = field(default_factory=dict)
