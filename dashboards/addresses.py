"""Every path of the pages and the interface is written here, whatever characters a study's name holds."""

import re
from urllib.parse import quote, unquote, urlencode


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
    return f"/studies/{slug(name)}"


def trial(name: str, number: int) -> str:
    """The page of one layout."""
    return f"{study(name)}/trials/{number}"


def api(name: str) -> str:
    """The interface's root of a study."""
    return f"/api/v1/studies/{slug(name)}"


def figure(name: str, chart: str, **query: str) -> str:
    """The data of a picture."""
    return f"{api(name)}/figure/{chart}" + (f"?{urlencode(query)}" if query else "")
