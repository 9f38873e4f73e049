"""Every mixer on one CPU thread, forward and backward: chunked against the loop over time, and against full attention.

Two ratios to the loop: of the mixer's operators alone, at the inputs that it gives them, and of the whole mixer, whose
projections cost the same in both.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.common import save
from search_space.frame import Frame
from search_space.spec import Mixer
from search_space.vocabulary import VOCABULARY

BATCH, TIME, WIDTH = 4, 512, 128
FRAME = Frame(width=WIDTH, train_length=TIME, context=TIME, batch=BATCH, dtype="float32")
ROUNDS, LOOP_ROUNDS = 9, 3
WANTED_SPEEDUP, MOST_OVER_FULL = 10, 4

# Norms have no loop over time to be faster than.
OPERATORS: list[ModuleType] = [
    import_module(f"kernels.{item.name}.ops")
    for item in iter_modules(kernels.__path__)
    if item.ispkg and item.name != "norm"
]

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@contextmanager
def by_reference() -> Iterator[None]:
    """Every operator answers with its loop over time."""
    before = [(ops, vars(ops)["resolve"]) for ops in OPERATORS]
    for ops in OPERATORS:
        vars(ops)["resolve"] = lambda *_, **__: "reference"
    try:
        yield
    finally:
        for ops, resolve in before:
            vars(ops)["resolve"] = resolve


def leaf(value: Any) -> Any:
    """A tensor, alone or in a list, cut off from what made it; it still takes a gradient where it did."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(leaf(item) for item in value)
    return value


def calls_of(mixer: Mixer, x: Tensor) -> list[Call]:
    """What a mixer's forward pass asks of the operators, in order."""
    calls: list[Call] = []
    public = {function for ops in OPERATORS for function in vars(ops).values() if callable(function)}
    public = {function for function in public if function.__module__ in {ops.__name__ for ops in OPERATORS}}

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*values: Any, **named: Any) -> Any:
            calls.append((function, tuple(map(leaf, values)), {name: leaf(v) for name, v in named.items()}))
            return function(*values, **named)

        return answer

    changed: list[tuple[ModuleType, str, Any]] = []
    for module in [m for name, m in sys.modules.items() if name.startswith("search_space.")]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in public:
                changed.append((module, name, value))
                setattr(module, name, recorded(value))
    try:
        mixer(x)
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
    return calls


def backward(results: Any) -> None:
    """Gradients of the first result, which is an operator's output."""
    output = results[0] if isinstance(results, tuple) else results
    if output.requires_grad:
        output.real.sum().backward()


def seconds_of(calls: list[Call]) -> float:
    """One forward and backward pass of the operators alone."""
    began = time.perf_counter()
    for function, values, named in calls:
        backward(function(*values, **named))
    return time.perf_counter() - began


def seconds(mixer: Mixer, x: Tensor) -> float:
    """One forward and backward pass."""
    began = time.perf_counter()
    mixer(x)[0].sum().backward()
    return time.perf_counter() - began


def shortest(run: Callable[[], float], rounds: int) -> float:
    """The least of several: what else the machine does only ever adds."""
    return min(run() for _ in range(rounds))


def main() -> None:
    """Measure all mixers in turn, several rounds, and save."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(BATCH, TIME, WIDTH, requires_grad=True)
    mixers = {name: spec().build(FRAME) for name, spec in VOCABULARY.items()}
    calls = {name: calls_of(mixer, x) for name, mixer in mixers.items()}
    own = dict.fromkeys(mixers, float("inf"))
    over_full: dict[str, list[float]] = {name: [] for name in mixers}
    for number in range(ROUNDS + 1):
        for name, mixer in mixers.items():
            # The first round warms up. Attention runs beside each mixer, so that a slow minute slows both.
            full, mine = seconds(mixers["full"], x), seconds(mixer, x)
            if number:
                own[name] = min(own[name], mine)
                over_full[name].append(mine / full)
    alone = {name: shortest(partial(seconds_of, calls[name]), ROUNDS) for name in mixers}
    with by_reference():
        loops = {name: shortest(partial(seconds, mixer, x), LOOP_ROUNDS) for name, mixer in mixers.items()}
        loops_alone = {name: shortest(partial(seconds_of, calls[name]), LOOP_ROUNDS) for name in mixers}
    rows = [
        {
            "mixer": name,
            "sequential": VOCABULARY[name]().sequential,
            "operators": [function.__name__ for function, _, _ in calls[name]],
            "operators_ms": round(alone[name] * 1e3, 1) if calls[name] else None,
            "operators_speedup": round(loops_alone[name] / alone[name], 1) if calls[name] else None,
            "mixer_ms": round(own[name] * 1e3, 1),
            "mixer_speedup": round(loops[name] / own[name], 1),
            "over_full": round(statistics.median(over_full[name]), 2),
        }
        for name in mixers
    ]
    parallel = [row for row in rows if not row["sequential"]]

    def below(column: str) -> list[Any]:
        return [
            row["mixer"]
            for row in parallel
            if row[column] is not None and float(str(row[column])) < WANTED_SPEEDUP
        ]

    save(
        "mixers_cpu",
        {
            "shape": {"B": BATCH, "T": TIME, "D": WIDTH},
            "operators_below_ten_times_the_loop": below("operators_speedup"),
            "whole_mixers_below_ten_times_the_loop": below("mixer_speedup"),
            "above_four_times_full_attention": [
                row["mixer"] for row in rows if float(str(row["over_full"])) > MOST_OVER_FULL
            ],
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
