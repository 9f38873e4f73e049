"""Every template prints exactly the fields of its page."""

import re
from dataclasses import fields

import pytest
from jinja2 import meta, nodes

from dashboards import addresses, app, strips
from dashboards.pages import ENVIRONMENT, MessagePage, Page, render
from dashboards.strips import style
from search_space.family import FAMILIES

assert app.create_app, "every page is known once the app is"
PAGES = Page.__subclasses__()


def keys_of(template):
    source = ENVIRONMENT.loader.get_source(ENVIRONMENT, template)[0]
    tree = ENVIRONMENT.parse(source)
    # A block does not see what its file imported by the parser's reckoning, though it does when rendered.
    keys = (
        meta.find_undeclared_variables(tree)
        - set(ENVIRONMENT.globals)
        - {found.target for found in tree.find_all(nodes.Import)}
    )
    for extended in tree.find_all(nodes.Extends):
        keys |= keys_of(extended.template.value)
    return keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.template)
def test_a_template_prints_the_declared_fields(page):
    assert keys_of(page.template) == {field.name for field in fields(page)}


def test_every_template_is_a_page_or_a_part():
    whole = set(ENVIRONMENT.list_templates()) - {"base.html", "parts.html", "scripts.html"}
    assert whole == {page.template for page in PAGES}


def test_text_is_escaped():
    assert "<b>" not in render(MessagePage(heading="<b>", line="<b>", command="<b>"))


def test_every_family_has_its_colour_from_the_list():
    css = style()
    for family in FAMILIES.values():
        assert f"--family-{family.name}:{family.colour};" in css


def test_every_mark_can_be_read_on_its_colour():
    for scheme in style().split("@media"):
        colours = dict(re.findall(r"--family-((?:ink-)?\w+):(#[0-9a-f]{6})", scheme))
        for name in [name for name in colours if not name.startswith("ink-")]:
            assert strips.contrast(colours[name], colours[f"ink-{name}"]) >= 4.5, (name, colours[name])


@pytest.mark.parametrize(
    "name",
    [
        "quick",
        "a/b",
        "..",
        ".",
        "%2e%2e",
        "50%",
        "~41",
        "é 漢",
        "a?b#c",
        "<img>",
        "trials/3",
        "\\",
        " ",
        "a~b%20c",
    ],
)
def test_any_name_survives_its_address(name):
    segment = addresses.slug(name)
    assert addresses.name_of(segment) == name
    assert not set(segment) & set("/%?#\\<> ")
    assert segment.strip(".")
