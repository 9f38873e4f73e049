"""Fills the pages from a store; every page reads what it needs in one go and keeps no connection."""

import time
from urllib.parse import urlencode

from dashboards import addresses, charts, commands, facts, quantities, strips, tables
from dashboards.facts import Fact, FactGroup
from dashboards.pages import AxisChoice, BesideLine, FrontPage, StudiesPage, TrialPage, legend
from dashboards.view import Point, StudyView, study_view
from storage.records import State, StudyRecord, TrialRecord
from storage.store import Store

PAGE_ROWS = 50
DONE: tuple[State, ...] = ("done",)


class Missing(Exception):
    """What was asked for is not in the database; the message says so in one line."""


def find_study(store: Store, name: str) -> StudyRecord:
    """The study of this name, or Missing."""
    # A zero byte is no text to PostgreSQL, so no study is ever called that.
    study = None if "\0" in name else store.study(name)
    if study is None:
        raise Missing(f"There is no study called “{name}” in {store.shown_url}.")
    return study


def find_trial(store: Store, study: StudyRecord, number: int) -> TrialRecord:
    """The trial of this number, or Missing."""
    trial = store.trial(study, number)
    if trial is None:
        raise Missing(f"The study “{study.name}” has no trial {number}.")
    return trial


def measured_view(store: Store, study: StudyRecord) -> StudyView:
    """The view of everything measured so far."""
    return study_view(study, store.trials(study, states=DONE))


def headline(view: StudyView, trials: int) -> tuple[Fact, ...]:
    """The few numbers that tell how a study stands."""
    told = [
        Fact(term="on the front", text=f"{len(view.front)} of {trials}"),
        Fact(term="hypervolume", text=quantities.quality(view.hypervolume)),
    ]
    for axis in view.axes:
        if view.points:
            best = (max if axis.maximise else min)(p.values[axis.name] for p in view.points)
            word = "highest" if axis.maximise else "lowest"
            text = quantities.value(axis.name, best, axis.unit)
            told.append(Fact(term=f"{word} {view.title(axis.name)}", text=text))
    known = sum(p.kind != "found" for p in view.points)
    if known:
        told.append(Fact(term="known layouts beaten", text=f"{len(view.beaten)} of {known}"))
    return tuple(told)


def studies_page(store: Store) -> StudiesPage:
    """Every study of the database, the newest first."""
    rows = [_study_row(store, study) for study in reversed(store.studies())]
    titles = ("study", "state", "trials", "best", "best layout", "hypervolume", "made")
    columns = tuple(
        tables.Column(title=title, numeric=title in ("trials", "best", "hypervolume")) for title in titles
    )
    return StudiesPage(
        storage=store.shown_url,
        studies=tables.Table(caption="Studies, the newest first", columns=columns, rows=tuple(rows)),
        start=commands.search(store.shown_url, "quick"),
    )


def front_page(store: Store, name: str, *, x: str | None, y: str | None, page: int) -> FrontPage:
    """One study; Missing where there is none, ValueError where the axes make no picture."""
    study = find_study(store, name)
    done = store.trials(study, states=DONE)
    view = study_view(study, done)
    counts = store.counts(study)
    total, plan = sum(counts.values()), facts.planned(study)
    ended = total - counts["waiting"] - counts["running"]
    across, up, _ = charts.choose_axes(study.axes, x, y)
    pages = max(1, -(-total // PAGE_ROWS))
    page = min(page, pages)
    # Newest first, while the store counts from the oldest.
    last = total - (page - 1) * PAGE_ROWS
    first = max(0, last - PAGE_ROWS)
    shown = store.trials(study, offset=first, limit=last - first) if last > first else []
    picked = {"x": across.name, "y": up.name}
    return FrontPage(
        name=name,
        state=facts.state(counts, plan),
        counted=f"{facts.counted(counts)} · made {quantities.age(time.time() - study.created_at)}",
        measured=len(view.points),
        figures=headline(view, total) if view.points else (),
        progress=min(1.0, ended / plan) if plan else None,
        axes=tuple(AxisChoice(name=a.name, title=view.title(a.name)) for a in study.axes),
        x=across.name,
        y=up.name,
        front_source=f"{addresses.figure(name, 'front')}?{urlencode(picked)}",
        front_3d_source=addresses.figure(name, "front_3d"),
        hypervolume_source=addresses.figure(name, "hypervolume"),
        layouts_source=addresses.figure(name, "layouts"),
        trials_path=f"{addresses.study(name)}/trials",
        events=f"{addresses.api(name)}/events",
        beside=tuple(_beside(view, p) for p in view.front),
        legend=legend(view),
        beaten=view.beaten,
        front=tables.front(view, linked=True),
        hypervolume=tables.hypervolume(view),
        trials=tables.trials(view, shown[::-1], linked=True),
        page=page,
        pages=pages,
        newer=_paged(name, picked, page - 1) if page > 1 else "",
        older=_paged(name, picked, page + 1) if page < pages else "",
        facts=facts.searched(study, done),
        command=commands.search(store.shown_url, name),
    )


def trial_page(store: Store, name: str, number: int) -> TrialPage:
    """One layout of a study, or Missing."""
    study = find_study(store, name)
    trial = find_trial(store, study, number)
    view = measured_view(store, study)
    point = next((p for p in view.points if p.number == number), None)
    used = {part.mixer for cell in _cells(view, trial) for part in cell.parts}
    return TrialPage(
        name=name,
        study_path=addresses.study(name),
        events=f"{addresses.api(name)}/events",
        number=number,
        layout=trial.layout.text,
        state=trial.state,
        standing=_standing(trial, point),
        origin=trial.origin,
        strip=_cells(view, trial),
        legend=tuple(item for item in legend(view) if item.mixer in used),
        figures=_values(view, trial, point),
        why=trial.why,
        layers=tables.layers(view, trial),
        layers_source=f"{addresses.figure(name, 'layers')}?trial={number}",
        scores=tables.scores(trial),
        curves=tables.curves(trial),
        curves_source=f"{addresses.figure(name, 'curves')}?trial={number}",
        costs=tables.costs(view, trial),
        facts=_ran(trial),
        commands=(
            commands.show(store.shown_url, name, number),
            commands.evaluate(trial.layout.text),
        ),
    )


def _cells(view: StudyView, trial: TrialRecord) -> strips.Strip:
    return strips.strip(trial.layout, view.families, view.marks)


def _study_row(store: Store, study: StudyRecord) -> tables.Row:
    view = measured_view(store, study)
    counts = store.counts(study)
    plan, total = facts.planned(study), sum(counts.values())
    state = facts.state(counts, plan)
    best = view.front[0] if view.points else None
    axis = study.axes[0]
    value = best.values[axis.name] if best else None
    age = time.time() - study.created_at
    return tables.Row(
        entries=(
            tables.Entry(text=study.name, href=addresses.study(study.name)),
            tables.Entry(text=state, state=state),
            tables.Entry(text=f"{total} of {plan}" if plan else str(total), sort=total),
            tables.Entry(text=quantities.value(axis.name, value, axis.unit), sort=value),
            tables.Entry(text=best.text, strip=best.strip) if best else tables.Entry(text="–"),
            tables.Entry(text=quantities.quality(view.hypervolume) if best else "–", sort=view.hypervolume),
            tables.Entry(text=quantities.age(age), sort=-age),
        )
    )


def _beside(view: StudyView, point: Point) -> BesideLine:
    return BesideLine(
        number=point.number,
        href=addresses.trial(view.name, point.number),
        strip=point.strip,
        text=point.text,
        words=tuple(
            f"{view.title(a.name)} {quantities.value(a.name, point.values[a.name], a.unit)}"
            for a in view.axes
        ),
    )


def _paged(name: str, picked: dict[str, str], page: int) -> str:
    return f"{addresses.study(name)}?{urlencode(picked | {'page': str(page)})}#trials"


def _standing(trial: TrialRecord, point: Point | None) -> str:
    if point is None:
        return trial.state
    return "on the front" if point.on_front else f"done, beaten (rank {point.rank})"


def _values(view: StudyView, trial: TrialRecord, point: Point | None) -> tuple[Fact, ...]:
    names = [axis.name for axis in view.axes]
    units = {axis.name: axis.unit for axis in view.axes}
    values = dict(trial.costs) | (dict(point.values) if point else {})
    ordered = [name for name in (*names, "params") if name in values]
    return tuple(
        Fact(term=view.title(name), text=quantities.value(name, values[name], units.get(name, "")))
        for name in dict.fromkeys(ordered)
    )


def _ran(trial: TrialRecord) -> tuple[FactGroup, ...]:
    lines = [Fact(term="attempts", text=str(trial.attempts)), Fact(term="state", text=trial.state)]
    if trial.started_at and trial.ended_at:
        lines.append(Fact(term="took", text=quantities.duration(max(0.0, trial.ended_at - trial.started_at))))
    result = trial.result
    if result:
        lines.append(Fact(term="in the training loop", text=quantities.duration(result.train_s)))
        lines.append(Fact(term="seed", text=str(result.seed)))
    for repeat in trial.repeats:
        told = repeat.details.get("unfit") or f"quality {quantities.quality(repeat.quality)}"
        lines.append(Fact(term=f"seed {repeat.seed}", text=str(told)))
    lines.append(Fact(term="layout key", text=trial.layout.key))
    lines.append(Fact(term="evaluation key", text=trial.evaluation_key))
    groups = [FactGroup(title="run", facts=tuple(lines))]
    rates = result.details.get("learning_rates") if result else None
    if isinstance(rates, dict) and rates:
        told = tuple(Fact(term=str(task), text=str(rate)) for task, rate in rates.items())
        groups.append(FactGroup(title="learning rates", facts=told))
    data = result.details.get("data") if result else None
    if isinstance(data, dict) and data:
        told = tuple(Fact(term=str(key), text=str(value)) for key, value in data.items())
        groups.append(FactGroup(title="data", facts=told))
    return tuple(groups)
