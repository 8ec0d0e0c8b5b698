"""The report: a page that is whole, asks for nothing and escapes everything, to a parser and to a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

pytest.importorskip("transformers")

from longattn.evaluate import Cell, Score, SlidingScore
from longattn.evaluate.charts import Line, line_chart
from longattn.evaluate.page import findings, page_of, write_page
from longattn.evaluate.results import Evaluation, ModelScores, Settings

EVIL = "<script>alert('x')</script>&\"'"
VOID = {"meta", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def scores(role, name, values):
    last = [Score(length, math.log(value) * 100, 100, 200, 4) for length, value in values.items()]
    sliding = [SlidingScore(length, 64, 5, 2, value, value + 1) for length, value in values.items()]
    right = {0.0: 4 if role == "after" else 0, 1.0: 4}
    cells = [
        Cell("passkey", length, depth, 4, correct, 0, [("123", EVIL)] * (4 - correct))
        for length in values
        for depth, correct in right.items()
    ]
    plans = [{"rope": {"rope_type": "yarn", "factor": 4.0}, "tokens": {"tokens": [EVIL]}}] if role == "after" else []
    facts = {"family": "llama", "length": "256" if role == "before" else "1024", "rope": EVIL}
    return ModelScores(name, role, "0123", facts, plans, last, sliding, cells)


@pytest.fixture
def evaluation():
    models = [scores("before", "small", {256: 4.0, 1024: 40.0}), scores("after", EVIL, {256: 4.2, 1024: 3.9})]
    text = {"name": EVIL, "documents": 3, "characters": 9000, "pieces": 4, "pieces_digest": "abcd"}
    settings = Settings([256, 1024], last=100, tasks=["passkey"], depths=[0.0, 1.0], trials=4)
    machine = {"cpu": "a <b>", "date": "2026-01-02T03:04:05"}
    return Evaluation(settings, text, models, machine, [f"longattn eval {EVIL}"], True)


class Tree(HTMLParser):
    """Every element that opens closes in its turn; keeps attributes, and the text of cells."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_page_is_whole_and_escapes_everything(evaluation):
    page = page_of(evaluation)
    tree = Tree(page)
    assert "script" not in tree.tags and page.count("<script") == 0
    assert {"svg", "table", "style", "pre"} <= set(tree.tags)
    assert sum(tag == "table" for tag in tree.tags) == 2 + 2 + 2 + 1 + 1  # scores, sliding, heat maps, wrong, facts


def test_page_asks_for_nothing(evaluation):
    page = page_of(evaluation)
    asking = [(tag, name) for tag, name, _ in Tree(page).attributes if name in ("src", "href", "srcset", "action")]
    assert asking == []
    assert not re.search(r"url\(|@import|https?://", page)
    assert not {"img", "link", "iframe", "object", "embed"} & set(Tree(page).tags)


def test_tables_hold_the_numbers(evaluation):
    cells = Tree(page_of(evaluation)).cells
    row = cells.index("before")
    assert cells[row : row + 3] == ["before", "4.00", "40.00"]
    assert cells[row + 3 : row + 9] == ["after", "4.20", "3.90", "change", "+5.0%", "-90.2%"]
    assert {"0/4", "4/4", "0%", "100%"} <= set(cells)


def test_heat_is_the_share_of_answers(evaluation):
    page = page_of(evaluation)
    for share, text, count in (("0%", "0/4", 2), ("100%", "4/4", 6)):
        assert len(re.findall(rf'style="--share:{share}">{text}<', page)) == count


def test_findings_follow_from_the_numbers(evaluation):
    lines = findings(evaluation)
    assert lines[:2] == [
        "Perplexity of before: 4.00 with 256 tokens in sight, 40.00 with 1,024, a higher one: more text harms.",
        "Perplexity of after: 4.20 with 256 tokens in sight, 3.90 with 1,024, a lower one: it uses the text.",
    ]
    assert "With 1,024 tokens: 40.00 before, 3.90 after, -90.2%." in lines
    assert "Answers found, passkey: before 50%, after 100%." in lines


def test_page_of_one_model_that_fails_is_still_a_page(evaluation):
    evaluation.models = [scores("model", "one", {256: 4.0, 1024: 4.0})]
    evaluation.models[0].last[1] = Score(1024, math.nan, 100, 200, 4)
    evaluation.complete = False
    page = page_of(evaluation)
    assert "not a number" in Tree(page).cells and "did not end" in page
    again = Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict(), allow_nan=False)))
    assert page_of(again) == page


def test_page_of_an_evaluation_that_was_stopped_early(evaluation):
    evaluation.models[1] = ModelScores("large", "after")
    evaluation.complete = False
    assert "Answers found, passkey: before 50%, after not asked yet." in findings(evaluation)
    assert "did not end" in page_of(evaluation)


@pytest.mark.parametrize("values", [(1e13, 3e13), (3.0, 1e200), (2.0, 1e13), (1e300, 1e307), (1.0, 1.0)])
def test_chart_of_any_perplexities_has_few_ticks_around_them(values):
    line = Line("a", "model", list(zip((64, 128), values, strict=True)))
    chart = line_chart([line], x_label="x", y_label="y")
    heights = [float(height) for height in re.findall(r'class="grid".*? y1="([\d.]+)"', chart)]
    assert 1 <= len(heights) <= 14
    points = re.search(r'points="([^"]*)"', chart)[1].split()
    assert all(min(heights) - 0.1 <= float(point.split(",")[1]) <= max(heights) + 0.1 for point in points)


def test_chart_of_the_largest_perplexity_there_is():
    assert "<svg" in line_chart([Line("a", "model", [(64, 1.0), (128, 1.7e308)])], x_label="x", y_label="y")


def test_chart_keeps_its_lines_inside():
    lines = [Line("a", "before", [(64, 3.0), (128, 900.0)]), Line("b", "after", [(64, 3.0), (128, math.inf)])]
    chart = line_chart(lines, x_label="x", y_label="y", marks=[(64, "here"), (999, "outside")])
    points = [
        tuple(map(float, pair.split(","))) for found in re.findall(r'points="([^"]*)"', chart) for pair in found.split()
    ]
    assert len(points) == 3 and all(0 <= x <= 720 and 20 <= y <= 330 for x, y in points)
    assert points[0][1] > points[1][1] and "logarithmic" in chart
    assert "here" in chart and "outside" not in chart
    flat = line_chart([Line("a", "model", [(64, 3.0)])], x_label="x", y_label="y")
    assert "NaN" not in flat and "logarithmic" not in flat
    assert line_chart([Line("a", "model", [(64, math.nan)])], x_label="x", y_label="y") == ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(evaluation, tmp_path, scheme):
    """A browser lays it out within the page's width, in the colours asked for, and fetches nothing."""
    write_page(evaluation, tmp_path / "report.html")
    probe = (
        "<script>addEventListener('load', () => { const wide = document.documentElement.scrollWidth > innerWidth;"
        "const chart = document.querySelector('svg.chart').getBoundingClientRect();"
        "const cell = getComputedStyle(document.querySelector('.heat td.deep')).backgroundColor;"
        "document.body.dataset.seen = JSON.stringify({wide, chart: chart.height, cell,"
        " ground: getComputedStyle(document.body).backgroundColor,"
        " fetched: performance.getEntriesByType('resource').length}); });</script></body>"
    )
    probed = (tmp_path / "report.html").read_text(encoding="utf-8").replace("</body>", probe)
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--window-size=900,1200"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "probed.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert not seen["wide"] and seen["chart"] > 200 and seen["fetched"] == 0
    light = sum(map(int, re.findall(r"\d+", seen["ground"])[:3])) > 3 * 128
    assert light == (scheme == "light")
    assert seen["cell"] not in ("rgba(0, 0, 0, 0)", seen["ground"])
