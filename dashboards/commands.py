"""Command lines that people can paste: the ones that made what a page shows."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any


def search(storage: str, study: str) -> str:
    """Starts a study, or goes on with it."""
    return _line("nas", "search", f"--study={study}", f"--storage={storage}")


def show(storage: str, study: str, number: int) -> str:
    """Prints one trial of a study."""
    return _line("nas", "show", str(number), f"--study={study}", f"--storage={storage}")


def measure(layout: str, storage: str, study: str, context: int, batch: int, width: int | None = None) -> str:
    """Measures a layout's latency by layer at a context and a batch, and keeps it in the study's database.

    `width` where it is the layout's own and not the study's.
    """
    where = [f"--study={study}", f"--storage={storage}", f"--context={context}", f"--batch={batch}"]
    where += [] if width is None else [f"--width={width}"]
    return _line("nas", "measure", layout, *where, "--no-whole")


def evaluate(
    layout: str,
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Trains and measures one layout again, on the tasks and at the sizes of a study's configuration.

    What is so by default is not written.
    """
    words = ["nas", "evaluate", layout]
    if seed is not None:
        words.append(f"--seed={seed}")
    for section in ("target", "proxy", "tasks"):
        usual = dict(_leaves(section, (defaults or {}).get(section)))
        for key, value in _leaves(section, (config or {}).get(section)):
            words += [] if usual.get(key) == value else [f"--set={key}={value}"]
    return _line(*words)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every setting below a key with its value as YAML, which JSON is; those of nothing are left out."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    elif value is not None and value != []:
        yield key, value if isinstance(value, str) else json.dumps(value)


def dashboard(storage: str) -> str:
    """Opens these pages."""
    return _line("nas", "dashboard", f"--storage={storage}")


def _line(*words: str) -> str:
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    # "--name=value" survives names that begin with a dash; only the value is quoted, as people would write it.
    if word.startswith("--") and "=" in word:
        option, value = word.split("=", 1)
        return f"{option}={shlex.quote(value)}" if value.startswith("-") else f"{option} {shlex.quote(value)}"
    return shlex.quote(word)
