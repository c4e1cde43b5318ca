"""Line charts: the points stand where their values say."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from lorafit.chart import LEFT, RIGHT, WIDTH, Curve, Mark, Panel, Point, chart, curves, scatter

values = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(st.integers(0, 50), values), min_size=2, max_size=20, unique_by=lambda point: point[0]))
def test_points_are_in_order_and_inside(points: list[tuple[int, float]]) -> None:
    points.sort()
    x, y = [float(at) for at, _ in points], [value for _, value in points]
    drawn = chart([Panel("a < b", x, y, (y[0], "base")), Panel("again", x, y)], "x", Mark(x[0], "here"))
    root = ET.fromstring(drawn)
    lines = [node for node in root.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 2
    height = float(root.attrib["viewBox"].split()[3])
    for line in lines:
        places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
        assert [place[0] for place in places] == sorted(place[0] for place in places)
        assert all(LEFT - 0.1 <= a <= WIDTH - RIGHT + 0.1 and 0 <= b <= height for a, b in places)
        for (_, upper), (_, lower), high, low in zip(places, places[1:], y, y[1:], strict=False):
            assert (upper - lower) * (high - low) <= 0  # what is more stands higher
    assert "a &lt; b" in drawn and "here" in drawn


def test_ticks_are_round_numbers() -> None:
    drawn = chart([Panel("loss", [0, 0.25, 0.5], [1.234, 0.9, 1.1])], "scale")
    ticks = [float(text) for text in re.findall(r'text-anchor="end">([-\d.]+)<', drawn)]
    assert len(ticks) >= 3 and all(abs(tick * 20 - round(tick * 20)) < 1e-9 for tick in ticks)


points_ = st.lists(st.tuples(st.floats(1, 1e12), st.floats(-10, 10), st.floats(0.01, 5)), min_size=1, max_size=9)


@given(points_)
def test_points_of_a_scatter_are_inside_and_in_order(given_points: list[tuple[float, float, float]]) -> None:
    points = [Point(f"m<{n}", x, y, y - half, y + half, n < 2) for n, (x, y, half) in enumerate(given_points)]
    root = ET.fromstring(scatter("a & b", points, "cost", lambda x: f"{x:.3g} B", (given_points[0][1], "base")))
    dots = [node for node in root.iter() if node.tag.endswith("circle")]
    at = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in dots]
    height = float(root.attrib["viewBox"].split()[3])
    assert all(LEFT <= x <= WIDTH - RIGHT and 0 <= y <= height for x, y in at)
    for (x, y), one in zip(at, points, strict=True):
        for (other_x, other_y), other in zip(at, points, strict=True):
            assert (x - other_x) * (one.x - other.x) >= 0 and (y - other_y) * (one.y - other.y) <= 0
    assert sum("bar" in node.attrib.get("class", "") for node in root.iter()) == len(points)


def test_labels_of_points_at_one_place_do_not_cover_each_other() -> None:
    points = [Point(f"method{n}", 100.0, 1.0, 0.9, 1.1, False) for n in range(4)]
    root = ET.fromstring(scatter("t", points, "x", str))
    labels = [node for node in root.iter() if (node.text or "").startswith("method")]
    heights = sorted(float(node.attrib["y"]) for node in labels if node.tag.endswith("text"))
    assert len(heights) == 4 and all(b - a >= 14 for a, b in itertools.pairwise(heights))


def test_curves_share_their_axes_and_are_named() -> None:
    drawn = curves("loss", [Curve("lora", [1, 2, 3], [3, 2, 1]), Curve("ia3", [1, 2], [3, 1])], "step")
    root = ET.fromstring(drawn)
    lines = [node.attrib["points"].split() for node in root.iter() if node.tag.endswith("polyline")]
    assert lines[0][0] == lines[1][0] and lines[0][2].split(",")[1] == lines[1][1].split(",")[1]
    assert ">lora<" in drawn and ">ia3<" in drawn
