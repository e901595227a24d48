"""The charts: well-formed SVG whose lines stay inside, logarithmic axes, odd input."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from examples.handwriting.plots import line_chart, moving_average

SVG = "{http://www.w3.org/2000/svg}"


def parse(chart):
    """(its size, the points of each line by id, all of its text)."""
    root = ElementTree.fromstring(chart)
    size = [float(n) for n in root.get("viewBox").split()[2:]]
    lines = {}
    for group in root.iter(f"{SVG}g"):
        if group.get("id") in ("raw", "smooth"):
            path = group.find(f"{SVG}path")
            numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", path.get("d"))]
            lines[group.get("id")] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return size, lines, [text.text for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    "values, logarithmic",
    [
        ([1.0, 0.5, 0.25], False),
        ([100.0, 1.0, 0.01], True),
        ([0.0, 0.0, 0.0], True),
        ([-3.0, 2.0, 5.0], True),
        ([1e-12, 1e12], True),
    ],
)
def test_lines_stay_inside(values, logarithmic):
    (width, height), lines, texts = parse(line_chart("a < b", range(len(values)), values, logarithmic))
    assert set(lines) == {"raw", "smooth"} and "a < b" in texts
    for points in lines.values():
        assert len(points) == len(values)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_a_single_value_and_the_last_average_are_written():
    assert "7" in parse(line_chart("loss", [3], [7.0]))[2]
    assert f"{moving_average([1.0, 0.25])[-1]:.3g}" in parse(line_chart("loss", [1, 2], [1.0, 0.25]))[2]


def heights(chart):
    return [y for _, y in parse(chart)[1]["raw"]]


def test_a_wide_range_of_losses_is_logarithmic():
    """Equal factors are then equal distances; a share's axis stays linear, and begins at zero."""
    top, middle, bottom = heights(line_chart("loss", [1, 2, 3], [100.0, 1.0, 0.01], True))
    assert middle - top == pytest.approx(bottom - middle, abs=0.1)
    top, middle, bottom = heights(line_chart("share", [1, 2, 3], [100.0, 1.0, 0.01]))
    assert middle - top > 50 * (bottom - middle)


def test_what_is_not_finite_is_left_out():
    assert len(parse(line_chart("loss", [1, 2, 3], [1.0, float("nan"), 2.0]))[1]["raw"]) == 2
    for chart in (line_chart("loss", [1], [float("inf")]), line_chart("loss", [], [])):
        assert parse(chart)[1] == {} and "no values" in parse(chart)[2]


def test_the_same_values_give_the_same_bytes():
    assert line_chart("loss", [1, 2], [1.0, 2.0]) == line_chart("loss", [1, 2], [1.0, 2.0])


def test_the_average_is_not_pulled_to_zero():
    assert moving_average([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
    assert moving_average([0.0, 1.0])[-1] < 1
