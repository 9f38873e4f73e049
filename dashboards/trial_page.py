"""The page of one layout: where it stands, what each layer costs at any context, what it learnt, what stands near it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dashboards import addresses, commands, facts, latencies, near, quantities, strips, tables, trial_tables
from dashboards.desk import Desk, Missing, NetworkPrice, find_trial
from dashboards.facts import Fact, FactGroup
from dashboards.front_page import tabs
from dashboards.latencies import with_latencies
from dashboards.memory import Snapshot
from dashboards.pages import LegendItem, Page, Tab, legend
from dashboards.strips import Strip
from dashboards.tables import Table
from dashboards.view import StudyView
from storage.records import StudyRecord, TrialRecord

MOST_CONTEXT, MOST_BATCH = 2**24, 4096


class Deployment(BaseModel):
    """At which context and batch a network is priced; as the study has it, where left out."""

    model_config = ConfigDict(frozen=True)

    context: Annotated[int | None, Field(ge=1, le=MOST_CONTEXT, description="Tokens that are visible.")] = (
        None
    )
    batch: Annotated[int | None, Field(ge=1, le=MOST_BATCH, description="Texts at once.")] = None

    def of(self, study: StudyRecord) -> tuple[int, int]:
        """Context and batch of a study's target where the address says none."""
        target = study.config.get("target")
        known = target if isinstance(target, dict) else {}
        return self.context or int(known.get("context") or 32768), self.batch or int(known.get("batch") or 1)


@dataclass(frozen=True, kw_only=True)
class TrialPage(Page):
    """One layout: where it stands, what each layer costs, what it learnt."""

    template = "trial.html"
    name: str
    study_path: str
    tabs: tuple[Tab, ...]
    events: str
    number: int
    layout: str
    state: str
    standing: str
    origin: str
    strip: Strip
    legend: tuple[LegendItem, ...]
    figures: tuple[Fact, ...]
    why: str
    before: str
    after: str
    compare: str
    context: int
    contexts: tuple[int, ...]
    context_words: str
    batch: int
    batches: tuple[int, ...]
    priced: tuple[Fact, ...]
    price_command: str
    latency_words: str
    """At which context and batch, and where, the latency by layer was measured."""
    latency_command: str
    """What measures it at the context and the batch that are shown; empty where it is known."""
    layers: Table
    layers_source: str
    scores: Table
    scores_source: str
    rungs: Table
    attempts: Table
    curves: Table
    curves_source: str
    changes: Table
    costs: Table
    facts: tuple[FactGroup, ...]
    commands: tuple[str, ...]
    export: str


def trial_page(desk: Desk, segment: str, number: int, wanted: Deployment) -> TrialPage:
    """One layout of a study, or Missing; ValueError where it cannot be priced as wanted."""
    with desk.study(segment) as (store, study):
        trial = find_trial(store, study, number)
        again = trial.attempts > len(trial.results)  # each attempt brings one result or none
        told = store.last_events(study, set(trial_tables.FAILED), 0, trial_tables.MOST_TOLD) if again else ()
        snapshot = desk.library.snapshot(store, study)
        shown_url = store.shown_url
    view, name = snapshot.view, study.name
    context, batch = wanted.of(study)
    price = price_of(desk, snapshot, trial, context, batch)
    latency_words, latency_command = _timed(snapshot, trial, price, (context, batch), shown_url)
    cells = strips.strip(trial.layout, view.families, view.marks)
    used = {part.mixer for cell in cells for part in cell.parts}
    before, after = near.on_front(view, number)
    asked = f"?context={context}&batch={batch}"
    figure = f"{asked}&trial={number}"
    mean = facts.seeds_of(trial)
    return TrialPage(
        name=name,
        study_path=addresses.study(name),
        tabs=tabs(name, ""),
        events=f"{addresses.api(name)}/events",
        number=number,
        layout=trial.layout.text,
        state=trial.state,
        standing=_standing(view, trial),
        origin=trial.origin,
        strip=cells,
        legend=tuple(item for item in legend(view) if item.mixer in used),
        figures=(*_values(desk, snapshot, trial), *mean),
        why=trial.why,
        before="" if before is None else addresses.trial(name, before) + asked,
        after="" if after is None else addresses.trial(name, after) + asked,
        compare=f"{addresses.study(name)}/compare?pick={number}"
        + "".join(f"&pick={n}" for n in (before, after) if n is not None),
        context=context,
        contexts=_powers(context, 10, 20),
        context_words=quantities.tokens(context),
        batch=batch,
        batches=_powers(batch, 0, 8),
        priced=() if price is None else _priced(price),
        price_command="" if price is None else price.command,
        latency_words=latency_words,
        latency_command=latency_command,
        layers=trial_tables.layers(view, trial, price),
        layers_source=addresses.figure(name, "layers") + figure,
        scores=trial_tables.scores(snapshot, trial),
        scores_source=addresses.figure(name, "scores") + figure,
        rungs=trial_tables.rungs(trial),
        attempts=trial_tables.attempts(told, trial),
        curves=trial_tables.curves(trial),
        curves_source=addresses.figure(name, "curves") + figure,
        changes=trial_tables.changes(snapshot, near.one_change(snapshot, number)),
        costs=tables.costs(view, trial),
        facts=facts.ran(trial),
        commands=(
            commands.evaluate(
                trial.layout.text,
                study.config,
                facts.seed_of(trial),
                {} if desk.workshop is None else desk.workshop.defaults(),
            ),
            commands.show(shown_url, name, number),
        ),
        export=f"{addresses.api(name)}/trials/{number}",
    )


def price_of(
    desk: Desk, snapshot: Snapshot, trial: TrialRecord, context: int, batch: int
) -> NetworkPrice | None:
    """A layout at a context and a batch, None where nobody prices; ValueError where it cannot be priced.

    Its latency is there where it was measured there.
    """
    if desk.workshop is None:
        return None
    try:
        found = desk.workshop.price(
            snapshot.study.config, trial.layout.text, ((context, batch),), width=own_width(trial.costs)
        )
    except Missing:
        # A layout of a newer vocabulary, or a configuration of another program: its stored costs are shown.
        return None
    ((price,),) = with_latencies(desk, snapshot, (found,))
    return price


def own_width(costs: Mapping[str, float]) -> int | None:
    """A layout's own width by its costs, where the study gives each its own."""
    width = costs.get("width")
    return None if width is None else int(width)


def _timed(
    snapshot: Snapshot,
    trial: TrialRecord,
    price: NetworkPrice | None,
    asked: tuple[int, int],
    shown_url: str,
) -> tuple[str, str]:
    """Where the latency by layer was measured, and what measures it as asked; empty where there is nothing to say."""
    if price is None or not latencies.by_layer(trial, price):
        return "", ""
    if price.latency is not None:
        return f"Decode latency as measured at {_place(asked)}, on {price.latency.device}.", ""
    searched = Deployment().of(snapshot.study)
    words = f"Decode latency as measured at {_place(searched)}"
    if searched == asked:
        return f"{words}.", ""
    width = own_width(trial.costs)
    command = commands.measure(trial.layout.text, shown_url, snapshot.study.name, *asked, width)
    return f"{words}; at {_place(asked)} it was not measured yet. What measures it:", command


def _place(at: tuple[int, int]) -> str:
    return f"{quantities.tokens(at[0])} and batch {at[1]}"


def _powers(own: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(sorted({own, *(2**power for power in range(low, high + 1))}))


def _priced(price: NetworkPrice) -> tuple[Fact, ...]:
    return (
        Fact(term="cache", text=f"{quantities.size(price.stored_bytes)} ({price.stored_bytes:,} bytes)"),
        Fact(term="read a step", text=quantities.size(price.read_bytes)),
        Fact(term="parameters of the layers", text=quantities.count(price.params)),
        *(
            (Fact(term="decode latency", text=quantities.milliseconds(price.latency.latency_ms)),)
            if price.latency
            else ()
        ),
        Fact(term="FLOPs a token, prefill", text=quantities.count(price.flops_prefill)),
        Fact(term="FLOPs a token, decode", text=quantities.count(price.flops_decode)),
    )


def _standing(view: StudyView, trial: TrialRecord) -> str:
    if trial.number in view.on_front:
        return "on the front"
    return "done, beaten" if trial.number in set(view.measured.tolist()) else trial.state


def _values(desk: Desk, snapshot: Snapshot, trial: TrialRecord) -> tuple[Fact, ...]:
    view, doubt = snapshot.view, desk.doubt(snapshot)
    units = {axis.name: axis.unit for axis in view.axes}
    values = dict(trial.costs)
    for axis in view.axes:
        value = trial.value(axis.name)
        if value is not None:
            values[axis.name] = value
    told = []
    for name in dict.fromkeys((*units, "params")):
        if name not in values:
            continue
        text = quantities.value(name, values[name], units.get(name, ""))
        known = doubt.intervals.get(name, {}).get(trial.number)
        if known:
            text += f" ({' to '.join(quantities.value(name, x, units.get(name, '')) for x in known)})"
        told.append(Fact(term=view.title(name), text=text))
    if trial.number in doubt.chances:
        chance = quantities.share(doubt.chances[trial.number])
        told.append(Fact(term="chance of being on the front", text=chance))
    return tuple(told)
