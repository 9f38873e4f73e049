"""One trial in the terminal: why it costs what it costs, and what it learnt."""

import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dashboards import quantities
from nas.cli.picture import strip
from search_space.layout import from_json
from storage.records import StudyRecord, TrialRecord


def print_trial(
    trial: TrialRecord,
    study: StudyRecord,
    url: str,
    *,
    on_front: bool,
    trials: Sequence[TrialRecord],
    out: Console,
) -> None:
    """Everything that is known of a trial."""
    place = "on the front" if on_front else "not on the front"
    out.print(Text.assemble(f"trial {trial.number}  ", (trial.layout.text, "bold"), "  "), end="")
    out.print(strip(trial.layout.layers, study.families))
    out.print(f"{trial.state}, {place}, {trial.origin}; attempts {trial.attempts}", highlight=False)
    if trial.why:
        out.print(Text(f"why: {trial.why}"), soft_wrap=True)
    out.print(_layers(trial, study))
    costs = trial.costs
    whole = (
        f", {quantities.milliseconds(costs['latency_ms_whole'])} run end to end"
        if "latency_ms_whole" in costs
        else ""
    )
    out.print(
        f"network of {study.config['target']['depth']} layers{_at_width(trial)}: {quantities.count(costs['params'])} parameters, "
        f"{quantities.size(costs['kv_bytes'])} of cache, {quantities.milliseconds(costs['latency_ms'])} a decode step summed{whole}",
        highlight=False,
        soft_wrap=True,
    )
    shown = ("quality", "params", "kv_bytes", "latency_ms")
    further = [axis for axis in study.axes if axis.log and axis.name not in shown]
    if further:
        words = [
            f"{quantities.title(axis.name)} {quantities.value(axis.name, trial.value(axis.name), axis.unit)}"
            for axis in further
        ]
        out.print("  " + ", ".join(words), highlight=False, soft_wrap=True)
    result = trial.result
    if result is None:
        return
    scores = ", ".join(f"{name} {score:.3f}" for name, score in result.scores.items())
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in result.details.get("metrics", {}).items())
    out.print(f"quality {result.quality:.3f}: {scores}", highlight=False)
    out.print(f"  {metrics}", highlight=False, soft_wrap=True)
    if trial.repeats:
        seeds = [f"{one.quality:.3f} (seed {one.seed})" for one in (result, *trial.repeats)]
        mean = trial.value("quality") or 0.0
        out.print(
            f"  {mean:.3f} over {len(seeds)} seeds: {', '.join(seeds)}", highlight=False, soft_wrap=True
        )
    # Qualities of one rung only can be compared.
    rivals = [own for other in trials for own in other.results if own.rung == result.rung]
    better = sum(1 for own in rivals if own.quality > result.quality)
    there = (
        f"{len(rivals)} trials" if trial.state == "done" else f"{len(rivals)} trials that came to this rung"
    )
    out.print(
        f"  {better} of {there} have a higher quality",
        highlight=False,
    )
    share = result.train_s / result.worker_s if result.worker_s else 0.0
    out.print(
        f"trained as {result.details.get('layout', '?')}: {result.steps} steps, {quantities.count(result.tokens)} tokens; "
        f"{quantities.duration(result.worker_s)} in the worker, {share * 100:.1f} % of it inside the training loop",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    target = study.config["target"]
    where = f"--study {shlex.quote(study.name)} --storage {shlex.quote(url)}"
    out.print(
        f"\nNext:  nas cost '{trial.layout.text}' --width {trial.costs.get('width', target['width']):.0f} --depth {target['depth']} "
        f"--context {target['context']}\n       nas front {where}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _at_width(trial: TrialRecord) -> str:
    """The trial's own width in words, where it has one."""
    return f" of width {trial.costs['width']:.0f}" if "width" in trial.costs else ""


def _layers(trial: TrialRecord, study: StudyRecord) -> Table:
    """The pattern's layers, one a row, at the target's size."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("layer", "mixer", "", "parameters", "cache", "decode"):
        table.add_column(title, justify="right" if title in ("parameters", "cache", "decode") else "left")
    layers = from_json(trial.layout.layers).layers
    for index, (layer, shown, costs) in enumerate(
        zip(layers, trial.layout.layers, trial.layer_costs, strict=True)
    ):
        table.add_row(
            str(index + 1),
            Text(str(layer)),
            strip([shown], study.families),
            quantities.count(costs["params"]),
            quantities.size(costs["kv_bytes"]),
            quantities.milliseconds(costs["latency_ms"]),
        )
    return table
