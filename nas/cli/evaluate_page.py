"""One evaluation outside of any study: which task, which sizes, and what came out."""

from collections.abc import Mapping
from typing import Any

from dashboards import quantities
from nas.cli.options import without_none
from nas.cli.output import print_json, say
from nas.config import check, resolve
from nas.errors import EXIT_NOTHING, reading_input
from nas.plan import make_budget, proxy_frame
from nas.workers.pool import run_job
from search_space.vocabulary import check as check_layout
from search_space.vocabulary import plain, read, shrink_layout
from trainers.evaluate import Job
from trainers.measure import check_device
from trainers.outcome import Measured, Unfit
from trainers.tasks.registry import make_task


def evaluate_layout(
    text: str, given: Mapping[str, Any], tasks: list[str] | None, changes: Mapping[str, Any], *, literal: bool
) -> dict[str, Any]:
    """Train a layout; raises Refused for bad input."""
    with reading_input():
        first = resolve(given)
        names = tasks or list(first.tasks)
        for name in names:
            make_task(name, first.data)
        chosen = {}
        for name in names:
            known = first.tasks[name].model_dump(mode="json") if name in first.tasks else {}
            chosen[name] = {**known, **without_none(dict(changes))}
        config = resolve(first.model_dump(mode="json"), {"tasks": chosen})
        check(config)
        check_device(config.proxy.device)
        layout, target, proxy = read(text), config.target.frame(), proxy_frame(config)
        if literal:
            check_layout(layout, proxy)
            trained = plain(layout, proxy)
        else:
            check_layout(layout, target)
            trained = shrink_layout(layout, target, proxy)
        budget = make_budget(config)
    job = Job(
        layers=tuple(trained.to_json()),
        frame=proxy,
        budget=budget,
        seed=config.seed,
        device=config.proxy.device,
    )
    outcome = run_job(job)
    answer: dict[str, Any] = {
        "layout": str(layout),
        "trained_as": str(trained),
        "task": names[0] if len(names) == 1 else names,
    }
    match outcome:
        case Measured():
            return answer | {
                "quality": outcome.quality,
                "scores": dict(outcome.scores),
                "metrics": dict(outcome.metrics),
                "steps": outcome.steps,
                "tokens": outcome.tokens,
                "train_s": outcome.train_s,
                "worker_s": outcome.worker_s,
                "seed": config.seed,
                "details": dict(outcome.details),
            }
        case Unfit(why=why):
            return answer | {"unfit": why, "scores": {}}
        case _:
            raise AssertionError(outcome)


def show_outcome(answer: Mapping[str, Any], *, json_output: bool) -> int:
    """Print it; returns the exit code."""
    if json_output:
        print_json(answer)
    if "unfit" in answer:
        say(f"{answer['layout']} is unfit: {answer['unfit']}")
        return EXIT_NOTHING
    if not json_output:
        print(f"{answer['layout']}  trained as {answer['trained_as']}")
        for name, score in answer["scores"].items():
            print(f"  {name:<8} {score:.3f}")
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in answer["metrics"].items()))
        share = answer["train_s"] / answer["worker_s"]
        print(
            f"  {answer['steps']} steps, {quantities.count(answer['tokens'])} tokens, {answer['train_s']:.1f} s in the loop "
            f"({share * 100:.0f} % of {answer['worker_s']:.1f} s)"
        )
    return 0
