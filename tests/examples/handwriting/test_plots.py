"""The charts: well-formed SVG whose lines stay inside, round ticks, odd input."""

import xml.etree.ElementTree as ElementTree

import pytest

from examples.handwriting.plots import HEIGHT, WIDTH, line_chart, log_ticks, moving_average, ticks


@pytest.mark.parametrize(
    "values, logarithmic",
    [
        ([1.0, 0.5, 0.25], False),
        ([100.0, 1.0, 0.01], True),
        ([0.0, 0.0, 0.0], True),
        ([-3.0, 2.0, 5.0], True),
        ([7.0], False),
        ([1e-12, 1e12], True),
    ],
)
def test_lines_stay_inside(values, logarithmic):
    chart = ElementTree.fromstring(line_chart("a < b", range(len(values)), values, logarithmic))
    lines = chart.findall("polyline")
    assert [line.get("class") for line in lines] == ["raw", "smooth"]
    for line in lines:
        points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        assert len(points) == len(values)
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert chart.find("text").text == "a < b"


def test_what_is_not_finite_is_left_out():
    chart = ElementTree.fromstring(line_chart("loss", [1, 2, 3], [1.0, float("nan"), 2.0]))
    assert len(chart.find("polyline").get("points").split()) == 2
    assert "no values" in line_chart("loss", [1], [float("inf")])
    assert "no values" in line_chart("loss", [], [])


def test_ticks_are_round_and_enclose():
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1])
    assert ticks(0, 0.07) == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert ticks(-3, 5)[0] <= -3 and ticks(-3, 5)[-1] >= 5
    assert log_ticks(0.03, 4) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.1, 1) == pytest.approx([0.1, 1])


def test_the_average_is_not_pulled_to_zero():
    assert moving_average([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
    assert moving_average([0.0, 1.0])[-1] < 1
