"""One dataclass a page: what its template prints, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dashboards import addresses, assets
from dashboards.facts import Fact, FactGroup
from dashboards.strips import family_of, family_order
from dashboards.tables import Table
from dashboards.view import Beaten, StudyView
from dashboards.why import Why


@dataclass(frozen=True, kw_only=True)
class LegendItem:
    """One mixer of the study and how its cells look."""

    mixer: str
    mark: str
    family: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Tab:
    """A way to another page of the same study."""

    title: str
    href: str
    here: bool


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page names its template; its fields are exactly the names that the template prints."""

    template: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class MessagePage(Page):
    """Something is not there, or not to be had now, and this is the way on."""

    template = "message.html"
    heading: str
    line: str
    command: str = ""
    back: str = ""
    """Another page than the list of all studies."""
    back_words: str = "All studies"


@dataclass(frozen=True, kw_only=True)
class LoginPage(Page):
    """The one page that a stranger sees; it carries its own style, since static files are behind the token."""

    template = "login.html"
    line: str
    style: Markup


@dataclass(frozen=True, kw_only=True)
class DocsPage(Page):
    """The routes of the JSON interface."""

    template = "docs.html"
    routes: Table
    openapi: str


@dataclass(frozen=True, kw_only=True)
class ReportPage(Page):
    """A whole study in one file; scripts, styles and pictures are inside it."""

    template = "report.html"
    name: str
    policy: str
    style: Markup
    counted: str
    dates: str
    measured: int
    figures: tuple[Fact, ...]
    front: Table
    legend: tuple[LegendItem, ...]
    beaten: tuple[Beaten, ...]
    hypervolume: Table
    why: Why | None
    trials: Table
    facts: tuple[FactGroup, ...]
    command: str
    config_hash: str
    storage: str
    pictures: Mapping[str, Markup]
    scripts: tuple[Markup, ...]


ENVIRONMENT = Environment(
    loader=PackageLoader("dashboards"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)

# Ways to addresses that every page has, so that none need carry them.
ENVIRONMENT.globals |= {"root": addresses.root, "static": assets.address}


def render(page: Page) -> str:
    """The page as HTML; every text in it is escaped."""
    context = {field.name: getattr(page, field.name) for field in fields(page)}
    return ENVIRONMENT.get_template(page.template).render(context)


def legend(view: StudyView) -> tuple[LegendItem, ...]:
    """The mixers of a study, family by family."""
    items = []
    for mixer, mark in view.marks.items():
        family = family_of(view.families.get(mixer, ""))
        items.append(LegendItem(mixer=mixer, mark=mark, family=family.name, title=family.title))
    return tuple(sorted(items, key=lambda item: (family_order(item.family), item.mixer)))
