"""One `nas search` from the first line to the last: open, announce, search, tell what was found and what comes next."""

import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dashboards import quantities
from nas.aim import make_aim
from nas.axes import make_axes, measure_ahead
from nas.bounds import Bounds
from nas.cli.front_page import front_rows, show_front, standing_of
from nas.cli.output import console, print_json, say
from nas.cli.progress import ProgressWatcher
from nas.cli.rung_lines import rungs_json
from nas.climb import climb_of, ladder_of, rules_of
from nas.config import Config, differences, hash_of, meaning, of_study, resolve
from nas.errors import EXIT_INTERRUPTED, EXIT_NOTHING, Refused, reading_input
from nas.front import finished, front, hypervolume
from nas.logged import logged
from nas.logs import log_path
from nas.memory import ENDED
from nas.plan import Plan, families, make_plan
from nas.prices import LatencyBook, open_machine_table
from nas.redaction import secrets_in
from nas.repeats import next_repeat
from nas.samplers.registry import check_sampler, make_sampler
from nas.search import Ending, Search
from nas.workers.inline import InlinePool
from nas.workers.pool import Pool, probe_job
from storage.errors import StorageError
from storage.events import PLANNED
from storage.records import StudyRecord, TrialRecord
from storage.store import Store
from trainers.evaluate import Job

if TYPE_CHECKING:
    from nas.workers.ray_meter import RayMeter

OVERHEAD_S = 30.0
"""What a search takes besides its trials: workers that start, latencies, the front's networks run end to end."""


def run_search(given: Mapping[str, Any], *, json_output: bool) -> int:
    """Search as the given configuration says; returns the exit code.

    Raises:
        Refused: the configuration is not valid, or differs from the study's own.
        StorageError: the database cannot be used.
    """
    with reading_input():
        first = resolve(given)
        check_sampler(first.sampler)
    with Store.open(first.storage) as store:
        if store.warning is not None:
            say(store.warning)
        known = store.study(first.study)
        with reading_input():
            config = _with_study(first, given, known)
            # Where the text lies is no matter, as long as it is the same: that is known when it was read.
            _check_same(known, {key: value for key, value in meaning(config).items() if key != "data"})
            plan = make_plan(config)
        _check_same(known, _stored(plan))
        out = console(to_stderr=True)
        machine = open_machine_table(config.latency_cache, say)
        with closing(machine) if machine else nullcontext():
            meter = _meter(config)
            far = meter if config.target.device.startswith("cuda") else None
            book = LatencyBook(store=store, machine=machine, device=config.target.device, warn=say, meter=far)
            with reading_input():
                plan, bounds = _bounded(plan, book)
            probe = meter.seconds if meter and config.proxy.device.startswith("cuda") else probe_job
            _announce(plan, store, known, out, book.device_name, probe)
            study = known or _made(plan, store, book)
            ending = _search(plan, store, study, book, bounds, out)
        trials = store.trials(study)
        _tell(plan, store, study, trials, ending, json_output=json_output)
        if ending.interrupted:
            return EXIT_INTERRUPTED
        return 0 if finished(trials) else EXIT_NOTHING


def _made(plan: Plan, store: Store, book: LatencyBook) -> StudyRecord:
    """The study, made now, unless another driver has made it since."""
    with reading_input():
        axes = make_axes(plan, book, say)
    try:
        return store.create_study(
            name=plan.config.study,
            config=_stored(plan),
            config_hash=hash_of(_stored(plan)),
            axes=axes,
            families=families(),
        )
    except StorageError:
        study = store.study(plan.config.study)
        if study is None:
            raise
    _check_same(study, _stored(plan))
    return study


def _with_study(first: Config, given: Mapping[str, Any], known: StudyRecord | None) -> Config:
    """A study that is there brings its own configuration; what was given now stands above it."""
    if known is None:
        return first
    return resolve(of_study(known.config), given)


def _stored(plan: Plan) -> dict[str, Any]:
    return meaning(plan.config) | {"data_sha256": plan.data.get("sha256")}


def _check_same(known: StudyRecord | None, wanted: Mapping[str, Any]) -> None:
    """A study means one thing for all its life; raises Refused with the keys of `wanted` that differ."""
    if known is None:
        return
    # Keys that are younger than the study had their defaults when it was made.
    before = meaning(_with_study(Config(), {}, known)) | {"data_sha256": known.config.get("data_sha256")}
    if "data" in wanted and before["data_sha256"] == wanted["data_sha256"]:
        wanted = {key: value for key, value in wanted.items() if key != "data"}
    changed = differences({key: value for key, value in before.items() if key in wanted}, wanted)
    if changed:
        raise Refused(
            f"study {known.name!r} was made with another configuration: {'; '.join(changed[:6])}\n"
            "give the new search another --study name, or leave these settings as they were"
        )


def _bounded(plan: Plan, book: LatencyBook) -> tuple[Plan, Bounds]:
    """The plan without the starts that break a bound, and its bounds; ValueError if nothing keeps them."""
    bounds = plan.bounds(book.milliseconds)
    if not plan.rules.beyond_space:
        return plan, bounds
    if bounds.measurable:
        measure_ahead(book, [([layer], frame, phase) for layer, frame, phase in bounds.to_measure()], say)
    bounds.check()
    kept = []
    for start in plan.starts:
        why = bounds.why_not(start.layout)
        if why is None:
            kept.append(start)
        else:
            say(f"not tried: {start.layout} ({start.origin}), whose {why}")
    return replace(plan, starts=tuple(kept)), bounds


def _announce(
    plan: Plan,
    store: Store,
    known: StudyRecord | None,
    out: Console,
    device: str,
    probe: Callable[[Job], float | None],
) -> None:
    """What will be done, where it goes, and about how long it takes."""
    config, size = plan.config, plan.size
    at_most = "" if size.exact else "at most "
    done = store.counts(known) if known else {}
    pool = (
        "1 worker, inline"
        if _inline(config)
        else f"{config.workers} workers (Ray, {config.ray_address or 'local'})"
    )
    tasks = " · ".join(f"{name} ({task.steps} steps of {task.batch})" for name, task in config.tasks.items())
    corpus = f" · text {plan.data['source']}, sha256 {plan.data['sha256'][:8]}…" if plan.data else ""
    lines = [
        f'nas · study "{config.study}" · {store.shown_url} · {pool} · {device}',
        f"space    {plan.space.layers}-layer patterns of {len(plan.space.entries)} mixers × sizes = "
        f"{at_most}{size.count:,} layouts, {config.target.fill}ed to {config.target.depth} layers",
        f"target   width {config.target.width} · context {quantities.tokens(config.target.context)} · "
        f"batch {config.target.batch} · {config.target.dtype}      "
        f"proxy  width {config.proxy.width} · length {config.proxy.length}",
        f"quality  {tasks}{corpus}",
        f"front    {_toward(plan)}",
    ]
    if plan.rules.limits or plan.rules.params:
        lines.append(f"bounds   {_bound_words(plan)}")
    if config.rungs.stop:
        shares = ", ".join(f"{share * 100:.0f}" for share in config.rungs.shares)
        lines.append(
            f"rungs    at {shares} % of the steps; the best {config.rungs.keep * 100:.0f} % go on, "
            f"{config.rungs.chance * 100:.0f} % by chance, and whatever may still join the front"
        )
    if config.most_repeats:
        lines.append(f"seeds    {_repeat_words(config.most_repeats)}, of layouts near the front, at the end")
    already = sum(done.values())
    if already:
        lines.append(f"goes on  {already} trials are there, {max(0, config.trials - already)} to come")
    else:
        lines.append(f"start    {_start_words(plan)}")
    lines.append(f"log      {log_path(config.log_file, config.storage, config.study)}")
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    before = store.last_events(known, {PLANNED}, 0, 1) if known else []
    other = before[0].payload.get("device") if before else None
    if known and other not in (None, device) and any("latency" in axis.name for axis in known.axes):
        say(
            f"warning: this study's latencies were measured on {other}; those of {device} do not compare with them"
        )
    left = config.trials - already
    a_trial = _seconds_a_trial(plan, probe) if left > 0 else None
    if left > 0 and a_trial is None:
        say("how long it takes is not known. Ctrl-C stops cleanly; the same command goes on.")
    elif a_trial is not None:
        seconds = (
            a_trial * (left + config.most_repeats) / (1 if _inline(config) else config.workers) + OVERHEAD_S
        )
        about = "at most about" if config.rungs.stop else "about"
        say(f"{about} {quantities.duration(seconds)}. Ctrl-C stops cleanly; the same command goes on.")


def _start_words(plan: Plan) -> str:
    """How many trials are which, such as "6 uniform layouts first, then 15 chosen by layout, 3 published among them"."""
    trials = plan.config.trials
    published = [start for start in plan.starts if not start.at_once]
    uniform = min(len(plan.starts) - len(published), trials)
    places = sum(published[0].due(number) for number in range(uniform, trials)) if published else 0
    presets = min(places, len(published))
    first = f"{uniform} uniform layout{'s' * (uniform != 1)} first"
    if trials == uniform:
        return first
    among = f", {presets} published among them" if presets else ""
    return f"{first}, then {trials - uniform - presets} chosen by {plan.config.sampler}{among}"


def _repeat_words(count: int) -> str:
    return "1 training with a new seed" if count == 1 else f"{count} trainings with new seeds"


def _toward(plan: Plan) -> str:
    """The objectives in words, the better way first."""
    words = [
        f"{'highest' if objective.maximise else 'lowest'} "
        f"{quantities.title(objective.quantity.name, plan.config.target.context)}"
        for objective in plan.objectives
    ]
    measured = any(objective.quantity.kind.source == "measured" for objective in plan.objectives)
    return " · ".join(words) + (" (latency on this machine)" if measured else "")


def _bound_words(plan: Plan) -> str:
    """The bounds as they were written, and which widths they lead to."""
    words = [limit.text for limit in plan.rules.limits]
    if plan.widths is not None:
        widths = plan.widths.among(plan.space.alphabet)
        words.append(
            f"{plan.widths.rule.text}, each layout at its own width: {widths[0]} to {widths[-1]} in steps of "
            f"{plan.widths.step}, at most {len(widths) * len(plan.space.alphabet)} latencies measured as they come up"
        )
    return " · ".join(words)


def _seconds_a_trial(plan: Plan, probe: Callable[[Job], float | None]) -> float | None:
    """A guess from a few real training steps of the first and the last layout that will be tried unasked, if they work."""
    layouts = [start.layout for start in plan.starts] or [plan.space.sample(random.Random(plan.config.seed))]
    probed = [probe(plan.job(layout)) for layout in (layouts[0], layouts[-1])]
    known = [seconds for seconds in probed if seconds is not None]
    return sum(known) / len(known) if known else None


def _inline(config: Config) -> bool:
    if config.pool == "auto":
        return config.workers == 1 and config.ray_address is None
    return config.pool == "inline"


def _search(
    plan: Plan, store: Store, study: StudyRecord, book: LatencyBook, bounds: Bounds, out: Console
) -> Ending:
    config = plan.config
    there = store.counts(study)
    known = store.trials(study)
    ended = sum(there[state] for state in ENDED)
    waiting = there["waiting"] + there["running"]
    complete = ended >= config.trials and not waiting and not _resting(plan, study, known)
    if complete and not _to_repeat(plan, study, known):
        say(f"the study has its {config.trials} trials; nothing is left to train")
        return Ending(interrupted=False, exhausted=False, skipped=0)
    with reading_input():
        sampler = make_sampler(
            config.sampler, plan.space, make_aim(plan, study.axes, book, bounds), seed=config.seed
        )
    pool = _make_pool(config)
    trials, repeats = max(config.trials, ended + waiting), _repeats_left(config, known)
    try:
        with (
            ProgressWatcher(out, total=trials, done=ended, repeats=repeats) as shown,
            logged(config, store, shown) as watcher,
        ):
            search = Search(
                plan=plan,
                store=store,
                study=study,
                pool=pool,
                sampler=sampler,
                book=book,
                watcher=watcher,
                given_bounds=bounds,
                climb=climb_of(plan, study),
                isolate=pool.isolate if isinstance(pool, InlinePool) else None,
            )
            ending = search.run()
            watcher.over(ending)
            return ending
    finally:
        pool.stop()


def _resting(plan: Plan, study: StudyRecord, trials: Sequence[TrialRecord]) -> bool:
    """Whether somebody rests at a rung who is to go on."""
    rules = rules_of(plan.config.rungs, plan.config.seed)
    if rules is None:
        return False
    ladder = ladder_of(rules, study.axes, trials)
    return bool(ladder.promotable() or ladder.protected())


def _repeats_left(config: Config, trials: Sequence[TrialRecord]) -> int:
    return max(0, config.most_repeats - sum(len(trial.repeats) for trial in trials))


def _to_repeat(plan: Plan, study: StudyRecord, trials: Sequence[TrialRecord]) -> bool:
    """Whether further seeds are to be trained."""
    most = plan.config.most_repeats
    return most > 0 and next_repeat(trials, study.axes, most=most) is not None


def _meter(config: Config) -> "RayMeter | None":
    """Where Ray gives GPUs out, whoever measures on one asks Ray for it; None where no GPU is asked of Ray."""
    devices = [device for device in (config.target.device, config.proxy.device) if device.startswith("cuda")]
    if _inline(config) or not devices:
        return None
    from nas.workers.ray_meter import RayMeter

    return RayMeter(config.workers, config.ray_address, devices[0])


def _make_pool(config: Config) -> Pool:
    if _inline(config):
        return InlinePool()
    from nas.workers.ray_pool import RayPool

    if config.ray_address is not None and any(secrets_in(argument) for argument in sys.argv):
        say(
            "the password on this command line is shown to everybody who may list the cluster's jobs: "
            "give it in PGPASSWORD, in ~/.pgpass or in --config FILE"
        )
    gpus = config.gpus if config.proxy.device.startswith("cuda") or config.gpus is not None else 0.0
    return RayPool(config.workers, config.ray_address, gpus=gpus)


def _tell(
    plan: Plan,
    store: Store,
    study: StudyRecord,
    trials: list[TrialRecord],
    ending: Ending,
    *,
    json_output: bool,
) -> None:
    """The front, what it beats, and what comes next."""
    best = front(trials, study.axes)
    volume = hypervolume(trials, study.axes)
    if json_output:
        print_json(
            {
                "study": study.name,
                "storage": store.shown_url,
                "trials": store.counts(study),
                "hypervolume": volume,
                "front": front_rows(trials, study.axes),
                "rungs": rungs_json(trials, study),
            }
        )
    else:
        show_front(standing_of(study, trials, study.axes), console())
    if ending.exhausted:
        if plan.rules.beyond_space:
            say(f"no further layout that keeps the bounds was found: {len(trials)} trials")
        else:
            say(f"every layout of the space has been tried: {plan.size.count}")
    if ending.skipped:
        say(f"{ending.skipped} proposals were skipped before training: they break a constraint")
    where = f"--study {shlex.quote(study.name)} --storage {shlex.quote(store.shown_url)}"
    if ending.interrupted:
        say(f"stopped; nothing is lost. To go on: nas search {where}")
    elif not best:
        say(f"no trial ended well; nas trials {where} says why")
    elif not json_output:
        first = best[0].number
        say(f"\nNext:  nas show {first} {where}")
        say(f"       nas dashboard {where}")
        say(f"       nas report {where} -o report.html")
        say(f"       nas search {where} --trials {max(64, 2 * len(trials))}")
