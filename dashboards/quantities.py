"""Prints quantities as people write them: 64 MiB, 3.1 ms, 201 M, 128k, and says what each is called."""

import math
from collections.abc import Sequence

MINUS = "−"
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_TITLES = {
    "quality": "quality",
    "latency_ms": "decode latency",
    "latency_ms_whole": "decode latency, end to end",
    "prefill_ms": "prefill latency",
    "kv_bytes": "cache",
    "state_bytes": "state",
    "params": "parameters",
    "read_bytes": "cache read a step",
    "flops_prefill": "FLOPs a token, prefill",
    "flops_decode": "FLOPs a token, decode",
    "active_params": "active parameters",
    "tokens_per_s": "tokens a second",
    "serial_steps": "serial steps",
}


def _digits(x: float) -> str:
    """Three significant digits at most, no trailing zeros: 64, 3.1, 0.25, 1020."""
    if x == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(x))))
    text = f"{x:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _signed(x: float, text: str) -> str:
    return MINUS + text if x < 0 else text


def size(count: float) -> str:
    """Bytes in binary units: 64 MiB."""
    x, power = abs(count), 0
    while x >= 1023.5 and power < len(_BYTES) - 1:
        x, power = x / 1024, power + 1
    return _signed(count, f"{_digits(x)} {_BYTES[power]}")


def milliseconds(ms: float) -> str:
    """A time given in milliseconds, in the unit that reads best: 850 µs, 3.1 ms, 1.25 s."""
    x = abs(ms)
    if x >= 1000:
        return _signed(ms, f"{_digits(x / 1000)} s")
    if x >= 1 or x == 0:
        return _signed(ms, f"{_digits(x)} ms")
    return _signed(ms, f"{_digits(x * 1000)} µs")


def count(n: float) -> str:
    """A large number in decimal units: 201 M, 1.3 G."""
    x = abs(n)
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= 0.9995 * scale:
            return _signed(n, f"{_digits(x / scale)} {unit}")
    return _signed(n, _digits(x))


def tokens(n: float) -> str:
    """A length as people write it: 128k, 8k, 1M, 48."""
    whole = int(n)
    if whole >= 1024**2 and whole % 1024**2 == 0:
        return f"{whole // 1024**2}M"
    if whole >= 1024 and whole % 1024 == 0:
        return f"{whole // 1024}k"
    return f"{whole:,}"


def quality(x: float) -> str:
    """A share between 0 and 1 to three places, without its idle zero: .951."""
    text = f"{abs(x):.3f}"
    return _signed(x, text[1:] if text.startswith("0.") else text)


def percent(x: float) -> str:
    """A signed share as percent: −22 %."""
    rounded = round(100 * x, 1 if abs(x) < 0.1 else 0)
    sign = MINUS if rounded < 0 else "+" if rounded > 0 else ""
    return f"{sign}{_digits(abs(rounded))} %"


def share(x: float) -> str:
    """A share of a whole as percent: 22 %."""
    return f"{100 * x:.0f} %"


def interval(x: float, low: float, high: float) -> str:
    """A change and half the width of the interval around it, to the places that it deserves: +.12 ± .03."""
    half = (high - low) / 2
    places = 3 if half < 0.01 else 2 if half < 1 else 1
    texts = [f"{number:.{places}f}" for number in (abs(x), half)]
    change, doubt = (text[1:] if text.startswith("0.") else text for text in texts)
    sign = "" if not change.strip("0.") else MINUS if x < 0 else "+"
    return f"{sign}{change} ± {doubt}"


def listed(numbers: Sequence[int]) -> str:
    """Whole numbers as people list them: 1, 2 and 5."""
    words = [str(number) for number in numbers]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def duration(seconds: float) -> str:
    """How long something took: 1.2 s, 2 min 30 s, 3 h 5 min, 2 d 4 h."""
    if seconds < 60:
        return f"{_digits(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for big, small, unit, lesser in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= big:
            rest = whole % big // small
            return f"{whole // big} {unit} {rest} {lesser}" if rest else f"{whole // big} {unit}"
    return f"{whole} s"


def age(seconds: float) -> str:
    """How long ago, coarsely: just now, 5 min ago, 3 days ago."""
    if seconds < 10:
        return "just now"
    for scale, unit, plural in ((86400, "day", "days"), (3600, "h", "h"), (60, "min", "min")):
        if seconds >= scale:
            n = int(seconds // scale)
            return f"{n} {unit if n == 1 else plural} ago"
    return f"{seconds:.0f} s ago"


def title(name: str, context: float | None = None) -> str:
    """What a cost or an objective is called: kv_bytes@8192 is "cache at 8k"."""
    name, _, inside = name.partition("[")
    base, _, at = name.partition("@")
    if inside:
        return _title_in(base, dict(part.partition("=")[::2] for part in inside.rstrip("]").split(",")))
    words = _TITLES.get(base, base.replace("_", " "))
    if at.isdigit():
        return f"{words} at {tokens(int(at))}"
    if base == "kv_bytes" and context:
        return f"{words} at {tokens(context)}"
    return words


def _title_in(base: str, given: dict[str, str]) -> str:
    """The title of a cost in a phase, at a batch or a context of its own."""
    words = _TITLES.get(base, base.replace("_", " "))
    if given.get("phase") == "prefill":
        words = _TITLES["prefill_ms"]
    words += f", batch {given['batch']}" if "batch" in given else ""
    return words + (f" at {tokens(int(given['context']))}" if given.get("context", "").isdigit() else "")


def value(name: str, x: float | None, unit: str = "") -> str:
    """One number with its unit, chosen by what it is a number of; a dash where there is none."""
    if x is None or not math.isfinite(x):
        return "–"
    base = name.partition("[")[0].partition("@")[0]
    if base == "bytes" and not unit and -1 <= x <= 1:
        # The task of that name, which is scored.
        return quality(x)
    if "bytes" in base:
        return size(x)
    if base.endswith("_ms") or "_ms_" in base:
        return milliseconds(x)
    if base.endswith("params") or base.startswith("flops") or base == "serial_steps":
        return count(x)
    if unit and unit not in ("1", base):
        return f"{_signed(x, _digits(abs(x)))} {unit}"
    if base == "quality" or (-1 <= x <= 1):
        return quality(x)
    return _signed(x, _digits(abs(x)))


def change(name: str, before: float, after: float, *, log: bool) -> str:
    """What became of a number: "+.05" for a share, "−22 %" for a cost."""
    if log and before:
        return percent(after / before - 1)
    difference = after - before
    return ("+" if difference > 0 else "") + value(name, difference)


def ticks(name: str, low: float, high: float, *, log: bool, unit: str = "") -> tuple[list[float], list[str]]:
    """Places for an axis and their words, denser than needed so that a zoom still finds some."""
    if not log:
        step = _nice_step((high - low) / 5)
        first = math.ceil(low / step)
        places = [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]
    else:
        places = _log_places(max(low, 1e-12), max(high, 1e-12), binary="bytes" in name and name != "bytes")
    if name.partition("@")[0] == "quality" and not log:
        return places, [quality(x).rstrip("0") if x not in (0, 1) else str(int(x)) for x in places]
    return places, [value(name, x, unit) for x in places]


def _nice_step(rough: float) -> float:
    if rough <= 0:
        return 0.1
    scale = 10 ** math.floor(math.log10(rough))
    return next(float(m * scale) for m in (1, 2, 5, 10) if m * scale >= rough * 0.999)


def _log_places(low: float, high: float, *, binary: bool) -> list[float]:
    if binary:
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        stride = max(1, round((last - first) / 7))
        return [2.0**power for power in range(first - first % stride, last + 1, stride)]
    decades = math.log10(high / low)
    steps: Sequence[float] = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**power for power in powers for m in steps if low * 0.7 <= m * 10.0**power <= high * 1.4]
