"""The page of a report: well-formed, alone, with every figure, the best marked, and the curves where they are given."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

import metarec_fast as mf
from metarec_fast import comparison
from metarec_fast._svg import Line, line_chart, ticks
from metarec_fast.html_report import write_html

VOID = {"meta"}


class Page(HTMLParser):
    """Which elements there are; fails where one is not closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.attributes, self.rows = text, [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("*" if ("class", "best") in attributes else "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] = data + self.rows[-1][-1]


@pytest.fixture
def made():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 12)
    items = np.concatenate([rng.choice(30, 12, replace=False) for _ in range(40)])
    log = mf.Interactions.from_arrays(users, items, rng.integers(1, 6, 480).astype(float))
    split = mf.split_users(log, seed=0)
    learner, history = comparison.train("maml", split, dim=3, epochs=2, progress=False)
    report = mf.evaluate(learner, split.test, support=3, baselines=split.train)
    curve = mf.cold_start_curve(learner, split.test, metric="ndcg@10", baselines=split.train)
    return report, history, curve


def test_the_page_has_all_figures_with_the_best_marked_and_the_chance_level(made, tmp_path):
    report, history, curve = made
    report.to_html(tmp_path / "report.html", history=history, curve=curve)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    columns = report.columns()
    figures = {row[0]: row[1:] for row in page.rows if len(row) == len(columns) + 1 and row[0]}
    assert list(figures) == [*report.results, "chance"]
    for name, found in {**report.results, "chance": report.chance}.items():
        expected = [f"{found[column]:.4f}" if column in found else "–" for column in columns]
        assert [cell.strip("*") for cell in figures[name]] == expected
    assert {name for name, row in figures.items() if row[0].endswith("*")} == {
        name for name, row in figures.items() if row[0].strip("*") == min(row[0].strip("*") for row in figures.values())
    }
    assert page.text.count("<svg") == 2
    for told in (report.caption(), curve.caption(), f"The weights of epoch {history.best_epoch}"):
        assert told in page.text


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(made, tmp_path):
    report, history, curve = made
    write_html(tmp_path / "report.html", report, history=history, curve=curve)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "<script" not in page.text
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import|https?:", page.text)


def test_curves_that_are_not_given_are_left_out_and_names_are_escaped(made, tmp_path):
    report = made[0]
    report.results["<b>&"] = report.results.pop("maml")
    report.per_user["<b>&"] = report.per_user.pop("maml")
    unjudged = mf.History("rmse", [mf.history.Epoch(0, None, None, 0.1, 0.0)])
    write_html(tmp_path / "report.html", report, history=unjudged, title="A < B")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "<svg" not in page.text
    assert "<h1>A &lt; B</h1>" in page.text
    assert "<th>&lt;b&gt;&amp;</th>" in page.text


def test_other_things_than_a_report_a_history_and_a_curve_are_refused_by_name(made, tmp_path):
    report, history, curve = made
    for message, arguments in (
        ("report: expected a Report, got NoneType", {"report": None}),
        ("history: expected a History, got ColdStartCurve", {"report": report, "history": curve}),
        ("curve: expected a ColdStartCurve, got History", {"report": report, "curve": history}),
    ):
        with pytest.raises(TypeError, match=message):
            write_html(tmp_path / "report.html", **arguments)
    assert not (tmp_path / "report.html").exists()


def test_higher_values_are_drawn_higher_and_later_ones_further_right():
    chart = line_chart([Line("a", [(0, 1.0), (2, 3.0), (4, 2.0)], "red")], [(0, "0"), (4, "4")], "x", "y")
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert [x for x, _ in places] == sorted({x for x, _ in places})
    assert places[0][1] > places[2][1] > places[1][1]
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2, abs=0.1)


@pytest.mark.parametrize("points", [[(0, 0.9)], [(0, 0.9), (1, 0.9)], [(0, -2e-7), (1, 3e-7)], [(0, 1e6), (1, 3e6)]])
def test_any_range_of_values_can_be_drawn(points):
    chart = line_chart([Line("a", points, "red", thick=True)], [(0, "0")], "x", "y")
    places = re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', chart)
    assert len(places) == len(points)
    assert all(0 <= float(x) <= 800 and 0 <= float(y) <= 400 for x, y in places)


@pytest.mark.parametrize("low", [-3.0, 0.0, 0.83])
@pytest.mark.parametrize("span", [1e-4, 0.019, 0.5, 7.0, 3e5])
def test_ticks_are_few_round_and_around_the_values(low, span):
    marks = ticks(low, low + span)
    assert 4 <= len(marks) <= 9
    assert marks[0][0] <= low + 1e-9 * span
    assert marks[-1][0] >= low + span * (1 - 1e-9)
    assert len({label for _, label in marks}) == len(marks)
    assert all(float(label) == pytest.approx(place, abs=1e-9 * span) for place, label in marks)
