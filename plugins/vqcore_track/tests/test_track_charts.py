"""Charts: values are where the axes say, and nothing leaves the drawing."""

import xml.etree.ElementTree as ElementTree

import pytest
from vqcore_track import charts, page


def svg(chart):
    """The chart as the page draws it."""
    figure = page.TEMPLATES.get_template("charts.html.j2").module.figure(chart)
    return ElementTree.fromstring(figure).find("svg")


def test_a_curve_is_where_its_values_are():
    root = svg(charts.line_chart("t", [charts.Series("a", [(0.0, 1.0), (50.0, 3.0), (100.0, 2.0)])]))
    (line,) = [node for node in root.iter("polyline")]
    x, y = zip(*(map(float, place.split(",")) for place in line.attrib["points"].split()))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1]) and y[1] < y[2] < y[0]  # y runs downwards
    labels = {node.text: float(node.attrib["y"]) for node in root.iter("text") if "dy" in node.attrib}
    assert labels["2"] == pytest.approx(y[2], abs=0.1)
    tips = [node.text for node in root.iter("title")]
    assert tips == ["a, step 0: 1", "a, step 50: 3", "a, step 100: 2"]


def test_wide_ranges_are_logarithmic():
    root = svg(charts.line_chart("t", [charts.Series("a", [(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)])]))
    (line,) = root.iter("polyline")
    y = [float(place.split(",")[1]) for place in line.attrib["points"].split()]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert "logarithmic" in root.attrib["aria-label"]


@pytest.mark.parametrize(
    "points",
    [
        [(5.0, 0.0)],
        [(0.0, 7.0), (9.0, 7.0)],
        [(0.0, -1.0), (1.0, 1e9)],
        [(0.0, float("nan")), (1.0, 2.0)],
        [(0.0, 1e-12), (1.0, 1.0)],
    ],
)
def test_charts_of_odd_values_stay_inside(points):
    chart = charts.line_chart("t", [charts.Series("a", points)])
    for node in svg(chart).iter():
        for name in ("cx", "x", "x1", "x2"):
            assert 0 <= float(node.attrib.get(name, 0)) <= charts.BOX.width
        for name in ("cy", "y", "y1", "y2"):
            assert 0 <= float(node.attrib.get(name, 0)) <= charts.BOX.height


def test_nothing_to_draw_draws_nothing():
    assert charts.line_chart("t", [charts.Series("a", [(0.0, float("nan"))])]) is None


def test_long_curves_are_thinned_by_means():
    points = [(float(step), float(step % 2)) for step in range(100_000)] + [(1e5, 0.25)]
    thin = charts.thinned(points)
    assert len(thin) == charts.MOST_POINTS and thin[-1] == (1e5, 0.25)
    assert all(abs(y - 0.5) < 0.01 for _, y in thin[:-1])
    assert charts.thinned(points[:50]) == points[:50]


def test_numbers_in_few_letters():
    assert [charts.short(v) for v in (0, 0.01234567, 12345, 2.5e6, 4e-5, -0.5, 999)] == [
        "0", "0.01235", "12.35k", "2.5M", "4e-5", "-0.5", "999",
    ]  # fmt: skip


def test_ranks_and_octaves_count_every_code():
    counts = [0, 0, 1, 3, 2, 200, 9000]
    assert page._octaves(counts) == [("0", 2), ("1", 1), ("2-3", 2), ("4-7", 0), ("8-15", 0), ("16-31", 0),
                                ("32-63", 0), ("64-127", 0), ("128+", 2)]  # fmt: skip
    root = svg(charts.rank_chart("t", [counts, [0] * 7], labels=["one", "two"]))
    assert "one: 5 of 7, two: 0 of 7" in root.attrib["aria-label"]
    assert next(node.text for node in root.iter("title")) == "one, code number 1: 9000 times"


def test_zero_is_at_the_bottom_of_a_chart_of_zeros():
    chart = charts.line_chart("t", [charts.Series("a", [(0.0, 0.0), (1.0, 0.0)])])
    assert [place.y for place in chart.curves[0].places] == [charts.BOX.bottom] * 2


def test_texts_of_charts_are_escaped():
    text = "<script>\"&'"
    series = [charts.Series(text, [(0.0, 1.0), (2.0, 3.0)], marked=True)]
    root = svg(charts.line_chart(text, series, unit=text, events=[charts.Event(1.0, text)]))
    tips = [node.text for node in root.iter("title")]
    assert tips == [f"step 1: {text}", f"{text}, step 0: 1 {text}", f"{text}, step 2: 3 {text}"]
    assert text in root.attrib["aria-label"]
    bars = svg(charts.bar_chart(text, [(text, 2.0)], across=text, what=text))
    assert [node.text for node in bars.iter("title")] == [f"{text}: 2 {text}"]
