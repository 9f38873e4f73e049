"""The still picture holds what the figure holds, where it holds it, and is XML whatever the names are."""

import re
import struct
import zlib
from base64 import b64decode
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from fastapi.testclient import TestClient

from dashboards import addresses, front_chart, scene
from dashboards.app import create_app
from dashboards.choice import Choice
from dashboards.limits import limits_of
from dashboards.scene import Doubt, Scene
from dashboards.still import SVG, still
from tests.dashboards.conftest import HOSTILE

AXES = ("quality", "latency_ms", "kv_bytes")
TAG = f"{{{SVG}}}"


def shares(figure, trace):
    """Where a trace's points stand, in per cent from the left and the top, by the figure's own axes."""
    found = []
    for letter in "xy":
        axis = figure["layout"][f"{letter}axis"]
        values = trace[letter]
        if isinstance(values, dict):
            values = np.frombuffer(b64decode(values["bdata"]), dtype="<f4")
        at = np.array([np.nan if x is None else x for x in values], dtype=float)
        at = np.log10(at) if axis["type"] == "log" else at
        found.append((at - axis["range"][0]) / (axis["range"][1] - axis["range"][0]))
    return found[0], 1 - found[1]


def percent(text):
    return float(text.removesuffix("%")) / 100


def marks_of(root):
    """Every mark with a place of its own: its shape, and where it stands."""
    shapes = {f"{TAG}circle": "circle", f"{TAG}rect": "square", f"{TAG}path": "diamond"}
    found = []
    for holder in root.iter(f"{TAG}svg"):
        x, y = holder.get("x", ""), holder.get("y", "")
        if x.endswith("%") and y.endswith("%") and len(holder) and holder[0].tag in shapes:
            found.append((shapes[holder[0].tag], percent(x), percent(y)))
    return found


def mask_of(root):
    """The image of the crowd, read back by the rules of PNG."""
    (image,) = root.iter(f"{TAG}image")
    data = b64decode(image.get("href").removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height, *depth = struct.unpack(">2I5B", chunks[b"IHDR"])
    assert depth == [8, 0, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any(), "every row says that it is not filtered"
    return rows[:, 1:]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("third", [None, "none"])
@pytest.mark.parametrize(("x", "y"), [(x, y) for x in AXES for y in AXES if x != y])
def test_every_mark_stands_where_the_figure_has_it(view, study, x, y, third, narrow):
    choice = Choice(x=x, y=y, third=third)
    figure = front_chart.front(
        view, scene=Scene(choice=choice, narrow=narrow, limits=limits_of(study.config))
    )
    root = ElementTree.fromstring(still(figure, narrow=narrow))
    wanted = []
    for trace in figure["data"]:
        if "marker" in trace and trace["name"] != scene.CROWD:
            for a, b in zip(*shares(figure, trace), strict=True):
                if np.isfinite(a) and np.isfinite(b):
                    wanted.append((trace["marker"]["symbol"], a, b))
    assert len(wanted) >= 40
    found = marks_of(root)
    assert [shape for shape, *_ in found] == [shape for shape, *_ in wanted]
    assert np.array([at for _, *at in found]) == pytest.approx(np.array([at for _, *at in wanted]), abs=1e-4)
    words = {element.text for element in root.iter(f"{TAG}text")}
    assert {"kimi-linear", "samba", "front of these two axes"} <= words
    assert figure["layout"]["xaxis"]["title"]["text"] in words
    assert len(list(root.iter(f"{TAG}linearGradient"))) == (not third)


def test_the_stairs_turn_where_the_figure_turns(view):
    figure = front_chart.front(view)
    (stairs,) = [t for t in figure["data"] if t["mode"] == "lines"]
    root = ElementTree.fromstring(still(figure))
    (path,) = [p.get("d") for p in root.iter(f"{TAG}path") if "V" in p.get("d")]
    turns = [(float(a), float(b)) for a, b in re.findall(r"H([-\d.]+)V([-\d.]+)", path)]
    assert np.array(turns) / 1000 == pytest.approx(np.array(shares(figure, stairs)).T, abs=1e-4)


def test_a_crowd_is_dots_and_nothing_else(view, monkeypatch):
    monkeypatch.setattr(scene, "MANY", 3)
    figure = front_chart.front(view)
    (crowd,) = [t for t in figure["data"] if t["name"] == scene.CROWD]
    mask = mask_of(ElementTree.fromstring(still(figure)))
    high, wide = mask.shape
    far = np.full(mask.shape, np.inf)
    rows, columns = np.indices(mask.shape)
    for a, b in zip(*shares(figure, crowd), strict=True):
        middle = round(b * (high - 1)), round(a * (wide - 1))
        assert mask[middle] >= round(255 * crowd["marker"]["opacity"]) - 1
        far = np.minimum(far, np.hypot(rows - middle[0], columns - middle[1]))
    assert not mask[far > 2.3].any(), "nothing is drawn where no layout stands"
    assert (mask[far <= 1.5] > 0).all()


def test_what_a_lasso_left_out_stands_back(view, monkeypatch):
    monkeypatch.setattr(scene, "MANY", 3)
    figure = front_chart.front(view)
    numbers = np.frombuffer(b64decode(figure["data"][0]["customdata"]["bdata"]), dtype="<i4")
    caught = front_chart.front(view, scene=Scene(caught=numbers[:6]))
    crowd = caught["data"][0]
    mask = mask_of(ElementTree.fromstring(still(caught)))
    order = np.frombuffer(b64decode(crowd["customdata"]["bdata"]), dtype="<i4").tolist()
    depth = {
        number: mask[round(b * (mask.shape[0] - 1)), round(a * (mask.shape[1] - 1))]
        for number, a, b in zip(order, *shares(caught, crowd), strict=True)
    }
    within = [depth[n] for n in numbers[:6].tolist()]
    assert min(within) >= 88 and sum(d < 60 for n, d in depth.items() if n not in numbers[:6]) >= 12


def test_layouts_over_one_another_are_darker(view, monkeypatch):
    monkeypatch.setattr(scene, "MANY", 3)
    figure = front_chart.front(view)
    (crowd,) = [t for t in figure["data"] if t["name"] == scene.CROWD]
    once = mask_of(ElementTree.fromstring(still(figure)))
    for key in ("x", "y"):
        values = np.frombuffer(b64decode(crowd[key]["bdata"]), dtype="<f4")
        crowd[key] = scene.packed(np.tile(values, 3))
    thrice = mask_of(ElementTree.fromstring(still(figure)))
    assert ((once > 0) == (thrice > 0)).all() and (thrice[once > 0] > once[once > 0]).all()


def test_intervals_are_drawn_where_they_are_known(view):
    best = view.front[0]
    doubt = Doubt(intervals={"quality": {best.number: (0.1, 0.9)}})
    bare, doubtful = (
        sum("stroke" in line.attrib for line in ElementTree.fromstring(still(figure)).iter(f"{TAG}line"))
        for figure in (front_chart.front(view), front_chart.front(view, scene=Scene(doubt=doubt)))
    )
    assert doubtful == bare + 1


@pytest.mark.parametrize("name", [HOSTILE, "a\x00\x08\x1b\x7f\x9fb", "\ud800half", "]]>&amp;<!--", "\ufffe"])
def test_whatever_a_name_holds_the_picture_is_xml(view, name):
    points = view.front_numbers.tolist()
    glances = tuple(
        replace(seen, origin=f"preset:{name}") if seen is not None and seen.number in points else seen
        for seen in view.glances
    )
    figure = front_chart.front(replace(view, glances=glances))
    for trace in figure["data"]:
        trace["text"] = [name for _ in trace.get("text", ())]
    text = still(figure)
    ElementTree.fromstring(text.encode())
    assert "<img" not in text and "<script" not in text


def test_the_page_names_a_picture_that_is_there(url, store):
    client = TestClient(
        create_app(url, token="t"), base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"}
    )
    for study in store.studies():
        page = client.get(addresses.study(study.name)).text
        addressed = re.findall(r'<(?:img src|source media="[^"]*" srcset)="([^"]+)"', page)
        assert len(addressed) == (2 if "data-chart" in page else 0)
        for address in addressed:
            answer = client.get(address.replace("&amp;", "&"))
            assert answer.status_code == 200 and answer.headers["content-type"] == "image/svg+xml"
            ElementTree.fromstring(answer.content)
    first = client.get("/api/v1/studies/quick/front.svg?x=latency_ms")
    again = client.get(
        "/api/v1/studies/quick/front.svg?x=latency_ms", headers={"If-None-Match": first.headers["ETag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    refused = client.get("/api/v1/studies/quick/front.svg?x=quality&y=quality")
    assert refused.status_code == 400 and "two different" in refused.json()["detail"]
