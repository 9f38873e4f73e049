"""The README's table of all mixers, made from the vocabulary; `make readme` writes it where it belongs."""

import inspect
import sys
from pathlib import Path

from dashboards import quantities
from search_space.frame import Frame
from search_space.spec import REACHES, Spec
from search_space.vocabulary import VOCABULARY

WIDTH = 2048
CONTEXTS = (8192, 131072)
BEGIN, END = "<!-- mixers -->", "<!-- /mixers -->"


def about(spec: type[Spec]) -> str:
    """What a mixer is: the first paragraph of its module's docstring, in one line and without its full stop."""
    words = inspect.getdoc(sys.modules[spec.__module__]) or ""
    return " ".join(words.split("\n\n")[0].split()).removesuffix(".")


def kept(spec: type[Spec]) -> str:
    """Bytes that a layer of default sizes keeps of a shorter and of a longer text; one number if it is the same."""
    sizes = (spec().cost(Frame(width=WIDTH, context=context)).stored_bytes for context in CONTEXTS)
    return " → ".join(dict.fromkeys(quantities.size(size) for size in sizes))


def markdown() -> str:
    """The table, and what its columns mean."""
    rows = [
        f"| `{spec.name}` | {spec.family} | {about(spec)} | {kept(spec)} | {spec.reach} | {spec.source} |"
        for spec in VOCABULARY.values()
    ]
    shorter, longer = (quantities.tokens(context) for context in CONTEXTS)
    return "\n".join(
        [
            "| mixer | family | what it is | state | reach | source |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"State: what a layer of width {WIDTH} and default sizes keeps of {shorter} tokens, and → of {longer} where that is",
            "another number (batch 1, bfloat16). Reach: how far back a token sees in one layer with the default settings:",
            "",
            *(f"- {name}: {meaning}" for name, meaning in REACHES.items()),
        ]
    )


def renewed(text: str) -> str:
    """The text with the table between its two marks made anew.

    Raises:
        ValueError: it does not hold each mark once, the first one first.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"the text does not hold the marks {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def main() -> None:
    """Renew the files that are named."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
