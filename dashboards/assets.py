"""The files that a browser is given: a fixed list read once, so that no request ever names a path on disk."""

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from plotly.offline import get_plotlyjs

from dashboards import addresses, strips

SCRIPTS = ("crowd.js", "charts.js", "tables.js", "view.js", "live.js")
_TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file as it is sent."""

    body: bytes
    media_type: str
    etag: str
    version: str
    """A few letters of its content, for an address that may be kept for good."""


def text(name: str) -> str:
    """A hand-written file of static/."""
    return (files("dashboards") / "static" / name).read_text(encoding="utf-8")


def stylesheet() -> str:
    """Every rule of the pages in one text."""
    return text("colours.css") + text("style.css") + strips.style()


@cache
def plotly_js() -> str:
    """plotly.js as the installed package carries it, with the line ends that a parser of HTML makes of them."""
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


@cache
def served() -> dict[str, Asset]:
    """Every file under /static by name."""
    texts = {
        "style.css": text("colours.css") + text("style.css"),
        "families.css": strips.style(),
        **{name: text(name) for name in SCRIPTS},
        "plotly.js": plotly_js(),
    }
    return {name: _asset(name, content.encode()) for name, content in texts.items()}


def source_hash(script: str) -> str:
    """A script as a Content-Security-Policy names it."""
    return f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str, body: bytes) -> Asset:
    kind = _TYPES[name.rpartition(".")[2]]
    version = hashlib.sha256(body).hexdigest()[:20]
    return Asset(body=body, media_type=kind, etag=f'"{version}"', version=version)


def address(name: str) -> str:
    """Where a file is served, with what it holds at this moment."""
    return f"{addresses.root()}/static/{name}?v={served()[name].version}"
