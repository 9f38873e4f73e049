"""The parser of the notation: text to a checked, canonical layout, or an error that points at the place."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from search_space.layout import DEFAULT_CHANNEL, JOINS, MOST_SHARES, Branch, Layer, Layout
from search_space.setting import Setting, Value

MOST_LAYERS = 512
MOST_OPEN = 64
"""Parentheses that may be open at once; reading is recursive."""
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHARE = re.compile(r"\d{1,3}(?!\d)")
_COUNT = re.compile(r"(\d+)\s*\*")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")


class LayoutError(ValueError):
    """A layout that cannot be read; `position` counts characters from 0."""

    def __init__(self, message: str, text: str, position: int) -> None:
        super().__init__(message)
        self.text = text
        self.position = position


@dataclass(frozen=True, kw_only=True)
class Word:
    """A mixer as the notation sees it."""

    name: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True)
class Words:
    """All that may be written: sequence mixers and channel mixers by name."""

    mixers: Mapping[str, Word]
    channels: Mapping[str, Word]


def parse(text: str, words: Words) -> Layout:
    """Read a layout.

    Raises:
        LayoutError: the text breaks the grammar, or names a mixer, setting or value that does not exist.
    """
    reader = _Reader(text, words)
    layers = reader.sequence(opened_at=None)
    return Layout(tuple(layers))


def nearest(wrong: str, right: Iterable[str]) -> str:
    """ "; did you mean x or y?" for the known words closest to a wrong one, or nothing."""
    close = difflib.get_close_matches(wrong, list(right), n=3, cutoff=0.55)
    return f"; did you mean {' or '.join(close)}?" if close else ""


class _Reader:
    """A cursor over the text; each method reads one rule of the grammar."""

    def __init__(self, text: str, words: Words) -> None:
        self.text = text
        self.words = words
        self.at = 0
        self.open = 0

    def fail(self, message: str, position: int | None = None) -> LayoutError:
        return LayoutError(message, self.text, self.at if position is None else position)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip_blanks(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def take(self, mark: str) -> bool:
        self.skip_blanks()
        if self.peek() != mark:
            return False
        self.at += 1
        return True

    def word(self, what: str) -> tuple[str, int]:
        self.skip_blanks()
        found = _WORD.match(self.text, self.at)
        if not found:
            here = f'"{self.peek()}"' if self.peek() else "the end"
            raise self.fail(f"expected {what} at position {self.at + 1}, found {here}")
        start, self.at = self.at, found.end()
        return found.group(), start

    def sequence(self, opened_at: int | None) -> list[Layer]:
        layers: list[Layer] = []
        while True:
            self.skip_blanks()
            if not self.peek():
                if opened_at is not None:
                    raise self.fail(f'"(" at position {opened_at + 1} is never closed', opened_at)
                if not layers:
                    raise self.fail("the layout is empty: write at least one mixer, such as full")
                return layers
            if self.peek() == ")":
                if opened_at is None:
                    raise self.fail(f'")" at position {self.at + 1} closes nothing')
                if not layers:
                    raise self.fail(f'"()" at position {opened_at + 1} is empty', opened_at)
                self.at += 1
                return layers
            start = self.at
            layers.extend(self.item())
            if len(layers) > MOST_LAYERS:
                raise self.fail(f"more than {MOST_LAYERS} layers: no network is that deep", start)

    def item(self) -> list[Layer]:
        times, start = 1, self.at
        counted = _COUNT.match(self.text, self.at)
        if counted:
            if len(counted.group(1)) > 6 or not 1 <= int(counted.group(1)) <= MOST_LAYERS:
                raise self.fail(f"count {counted.group(1)} is not between 1 and {MOST_LAYERS}", start)
            times, self.at = int(counted.group(1)), counted.end()
            self.skip_blanks()
        inside = self.group() if self.peek() == "(" else [self.layer()]
        if times * len(inside) > MOST_LAYERS:
            raise self.fail(f"more than {MOST_LAYERS} layers: no network is that deep", start)
        return inside * times

    def group(self) -> list[Layer]:
        if self.open == MOST_OPEN:
            raise self.fail(f'more than {MOST_OPEN} "(" are open at position {self.at + 1}')
        opened_at = self.at
        self.at += 1
        self.open += 1
        inside = self.sequence(opened_at)
        self.open -= 1
        return inside

    def layer(self) -> Layer:
        self.skip_blanks()
        start, branches = self.at, [self.shared()]
        while self.take("|"):
            branches.append(self.shared())
        join = self.join() if self.take("&") else JOINS[0]
        channel = Branch(DEFAULT_CHANNEL)
        if self.take("/"):
            channel = self.branch("channel mixer", self.words.channels)
        # 2:6 is 1:3, and equal layers have one text.
        common = math.gcd(*(branch.share for branch in branches)) or 1
        try:
            return Layer(
                tuple(replace(branch, share=branch.share // common) for branch in branches), channel, join
            )
        except ValueError as error:
            raise self.fail(str(error), start) from None

    def shared(self) -> Branch:
        branch = self.branch("mixer", self.words.mixers)
        if not self.take("@"):
            return branch
        self.skip_blanks()
        number = _SHARE.match(self.text, self.at)
        if not number or not 1 <= int(number.group()) <= MOST_SHARES:
            raise self.fail(f'expected a share from 1 to {MOST_SHARES} after "@" at position {self.at + 1}')
        self.at = number.end()
        return replace(branch, share=int(number.group()))

    def join(self) -> str:
        name, start = self.word("a join")
        if name not in JOINS:
            raise self.fail(f'no join "{name}"{nearest(name, JOINS)} (use one of {", ".join(JOINS)})', start)
        return name

    def branch(self, kind: str, known: Mapping[str, Word]) -> Branch:
        name, start = self.word(f"a {kind}")
        if name not in known:
            listing = "nas mixers" if kind == "mixer" else "nas mixers --channels"
            raise self.fail(f'no {kind} "{name}"{nearest(name, known)} ({listing} lists all)', start)
        if self.peek() != "[":
            return Branch(name)
        opened_at = self.at
        self.at += 1
        settings: dict[str, Value] = {}
        while True:
            setting, place = self.word(f"a setting of {name}")
            settings_known = known[name].settings
            if setting not in settings_known:
                has = f"it has {', '.join(settings_known)}" if settings_known else "it has none"
                raise self.fail(
                    f'{name} has no setting "{setting}"{nearest(setting, settings_known)} ({has})', place
                )
            if setting in settings:
                raise self.fail(f"{name}[{setting}] is given twice", place)
            if not self.take("="):
                raise self.fail(f'expected "=" after {setting} at position {self.at + 1}')
            self.skip_blanks()
            place, raw = self.at, self.value()
            try:
                settings[setting] = settings_known[setting].read(raw)
            except ValueError as error:
                raise self.fail(f"{name}: {error}", place) from None
            if self.take(","):
                continue
            if self.take("]"):
                break
            if not self.peek():
                raise self.fail(f'"[" at position {opened_at + 1} is never closed', opened_at)
            raise self.fail(f'expected "," or "]" at position {self.at + 1}, found "{self.peek()}"')
        kept = {key: item for key, item in settings.items() if item != known[name].settings[key].default}
        return Branch(name, tuple(sorted(kept.items())))

    def value(self) -> Value:
        number = _NUMBER.match(self.text, self.at)
        if number:
            self.at = number.end()
            size = float(number.group())
            if self.peek() in ("k", "K"):
                self.at += 1
                return int(size * 1024) if (size * 1024).is_integer() else size * 1024
            # Beyond sixteen digits no setting has an option, and int() refuses thousands of them.
            whole = not (number.group(1) or number.group(2)) and len(number.group()) <= 16
            return int(number.group()) if whole else size
        word, _ = self.word("a value")
        return {"true": True, "false": False}.get(word, word)
