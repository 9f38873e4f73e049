"""Command lines that people can paste: the ones that made what a page shows."""

import shlex


def search(storage: str, study: str) -> str:
    """Starts a study, or goes on with it."""
    return _line("nas", "search", f"--study={study}", f"--storage={storage}")


def show(storage: str, study: str, number: int) -> str:
    """Prints one trial of a study."""
    return _line("nas", "show", str(number), f"--study={study}", f"--storage={storage}")


def evaluate(layout: str) -> str:
    """Trains and measures one layout again."""
    return _line("nas", "evaluate", layout)


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
