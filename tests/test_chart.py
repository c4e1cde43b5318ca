"""Line charts: the points stand where their values say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from lorafit.chart import LEFT, RIGHT, WIDTH, Mark, Panel, chart

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
