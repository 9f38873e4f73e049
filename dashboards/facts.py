"""A study's configuration and state in words: what was searched, at which sizes, on which data, how far it is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dashboards import quantities
from storage.errors import redacted
from storage.records import State, StudyRecord, TrialRecord

_LENGTHS = ("context", "length", "contexts")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of a description: a term and what it is here."""

    term: str
    text: str


@dataclass(frozen=True, kw_only=True)
class FactGroup:
    """Facts that belong together, under one heading."""

    title: str
    facts: tuple[Fact, ...]


def searched(
    study: StudyRecord, trials: Sequence[TrialRecord], *, whole: bool = True
) -> tuple[FactGroup, ...]:
    """The resolved configuration, group by group in its own order, then data and seeds as they were met.

    Sums are told where the trials are the whole of the study.
    """
    loose, groups = [], []
    for key, value in shown(study.config).items():
        if isinstance(value, Mapping):
            groups.append(FactGroup(title=_words(str(key)), facts=tuple(_facts(value))))
        else:
            loose.append(Fact(term=_words(str(key)), text=_text(str(key), value)))
    known = {g.title for g in groups}
    first = [g for title in ("target", "proxy") for g in groups if g.title == title]
    rest = [g for g in groups if g.title not in ("target", "proxy")]
    run = FactGroup(title="search", facts=tuple(loose))
    evidence = FactGroup(title="evidence", facts=tuple(_evidence(study, trials, whole)))
    ordered = (*first, *rest, *((run,) if loose and "search" not in known else ()), evidence)
    return tuple(group for group in ordered if group.facts)


def shown(value: Any) -> Any:
    """A configuration as it may be shown: an address of a database in it loses its password."""
    if isinstance(value, Mapping):
        return {str(key): shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    return redacted(value) if isinstance(value, str) and "://" in value else value


def state(counts: Mapping[State, int], plan: int | None) -> str:
    """What a study is doing: empty, running, finished or stopped."""
    ended = sum(n for name, n in counts.items() if name not in ("waiting", "running"))
    if counts.get("running"):
        return "running"
    if not sum(counts.values()):
        return "empty"
    return "finished" if plan is not None and ended >= plan else "stopped"


def counted(counts: Mapping[State, int]) -> str:
    """How the trials stand: "34 done, 2 running, 1 unfit"."""
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "no trials"


def _evidence(study: StudyRecord, trials: Sequence[TrialRecord], whole: bool) -> Iterator[Fact]:
    results = [trial.result for trial in trials if trial.result]
    tasks = sorted({task for result in results for task in result.scores})
    if tasks:
        yield Fact(term="tasks", text=", ".join(tasks))
    data = [result.details.get("data") for result in results]
    for sha in sorted({str(d["sha256"]) for d in data if isinstance(d, Mapping) and d.get("sha256")}):
        yield Fact(term="data sha256", text=sha)
    seeds = sorted({result.seed for result in results})
    if seeds and whole:
        yield Fact(term="seeds", text=", ".join(map(str, seeds[:12])) + (" …" if len(seeds) > 12 else ""))
        yield Fact(term="worker time", text=quantities.duration(sum(result.worker_s for result in results)))
        yield Fact(term="tokens trained", text=quantities.count(sum(result.tokens for result in results)))
    yield Fact(term="configuration hash", text=study.config_hash)


def ran(trial: TrialRecord) -> tuple[FactGroup, ...]:
    """How a trial ran: attempts, times, seeds, learning rates and data."""
    lines = [Fact(term="attempts", text=str(trial.attempts)), Fact(term="state", text=trial.state)]
    if trial.started_at and trial.ended_at:
        lines.append(Fact(term="took", text=quantities.duration(max(0.0, trial.ended_at - trial.started_at))))
    result = trial.result
    if result:
        lines.append(Fact(term="in the training loop", text=quantities.duration(result.train_s)))
    for repeat in trial.repeats:
        if repeat.details.get("unfit"):
            lines.append(Fact(term=f"seed {repeat.seed}", text=str(repeat.details["unfit"])))
    lines.append(Fact(term="layout key", text=trial.layout.key))
    lines.append(Fact(term="evaluation key", text=trial.evaluation_key))
    groups = [FactGroup(title="run", facts=tuple(lines))]
    for title, key in (("learning rates", "learning_rates"), ("data", "data")):
        told = result.details.get(key) if result else None
        if isinstance(told, Mapping) and told:
            facts = tuple(Fact(term=str(name), text=str(value)) for name, value in told.items())
            groups.append(FactGroup(title=title, facts=facts))
    return tuple(groups)


def seed_of(trial: TrialRecord) -> int | None:
    """The seed that its weights and data began from."""
    return None if trial.result is None else trial.result.seed


def seeds_of(trial: TrialRecord) -> tuple[Fact, ...]:
    """How many seeds the numbers are a mean of, where they are several."""
    count = len(trial.by_seed("quality"))
    return (Fact(term="seeds", text=str(count)),) if count > 1 else ()


def _facts(group: Mapping[str, Any]) -> Iterator[Fact]:
    for key, value in group.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{_words(str(k))} {_text(str(k), v)}" for k, v in value.items())
            yield Fact(term=_words(str(key)), text=text)
        else:
            yield Fact(term=_words(str(key)), text=_text(str(key), value))


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_text(key, item) for item in value) or "–"
    if isinstance(value, int | float):
        if key in _LENGTHS:
            return quantities.tokens(value)
        if "bytes" in key or key.endswith("_ms"):
            return quantities.value(key, value)
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(str(k))} {_text(str(k), v)}" for k, v in value.items())
    return str(value)


def _words(key: str) -> str:
    return key.replace("_", " ")
