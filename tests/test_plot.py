"""Charts: well-formed, to scale, and without what can't be drawn."""

import xml.etree.ElementTree as ET

import pytest

from nanollm.plot import line_chart, nice_ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 7, [-2, 0, 2, 4, 6]), (110, 390, [200, 300])],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert nice_ticks(low, high) == ticks


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, 2.0)]}, {"a": [(1, float("nan"))]}])
def test_little_or_nothing_makes_a_chart_too(series):
    ET.fromstring(line_chart(series))


def test_a_chart_is_to_scale_and_leaves_out_what_is_not_finite():
    points = [(0, 1.0), (1, float("inf")), (2, 3.0), (4, 5.0)]
    tree = ET.fromstring(line_chart({"a < b": points}, title="x & y"))
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in tree.iter(f"{SVG}circle")]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert {"a < b", "x & y"} <= {text.text for text in tree.iter(f"{SVG}text")}
