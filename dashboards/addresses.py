"""Every path of the pages and the interface is written here, whatever characters a study's name holds."""

import re
from collections.abc import Sequence
from contextvars import ContextVar
from urllib.parse import quote, unquote, urlencode

ROOT: ContextVar[str] = ContextVar("root", default="")
"""What a proxy puts before every path of this dashboard; set while a request is answered."""


def root() -> str:
    """What stands before every path, without a slash at its end."""
    return ROOT.get()


def slug(name: str) -> str:
    """A name as one path segment, without percent signs, slashes or a leading dot.

    Browsers resolve "%2e%2e" and servers decode "%2F" before routes are matched, so plain percent-quoting
    would lose such names; here "~" leads the two digits instead.
    """
    quoted = quote(name, safe="").replace("~", "%7E")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    return quoted.replace("%", "~")


def name_of(segment: str) -> str:
    """The name that a path segment stands for."""
    quoted = segment.replace("%", "%25")
    return unquote(re.sub(r"~(?=[0-9A-Fa-f]{2})", "%", quoted))


def study(name: str) -> str:
    """The page of a study's front."""
    return f"{root()}/studies/{slug(name)}"


def trial(name: str, number: int) -> str:
    """The page of one layout."""
    return f"{study(name)}/trials/{number}"


def api(name: str) -> str:
    """The interface's root of a study."""
    return f"{root()}/api/v1/studies/{slug(name)}"


def together(names: Sequence[str], **query: str) -> str:
    """The data of the picture of several studies."""
    return f"{root()}/api/v1/together?" + urlencode([*(("study", name) for name in names), *query.items()])


def still(name: str, query: str, *, narrow: bool = False) -> str:
    """The front as a picture of its own."""
    asked = "&".join(part for part in (query, "narrow=1" if narrow else "") if part)
    return f"{api(name)}/front.svg" + (f"?{asked}" if asked else "")


def figure(name: str, chart: str, **query: str) -> str:
    """The data of a picture."""
    return f"{api(name)}/figure/{chart}" + (f"?{urlencode(query)}" if query else "")
