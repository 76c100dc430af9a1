"""The page: hostile words stay words, nothing is loaded from elsewhere, figures that are missing are said to be."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.errors import FewerError, UsageError
from fewer.evaluation.charts import CHARACTER, Box, Point, linear_ticks, log_ticks, place_label, scatter
from fewer.evaluation.columns import COLUMNS, headline, is_best, notes
from fewer.evaluation.comparison import Comparison, Quality, Round, Row, Settings
from fewer.evaluation.report import check_writable, html_page, to_json, write_atomically, write_html
from fewer.recipe import Recipe

HOSTILE = "</title><script>alert('1')</script><img src=x onerror=\"alert(2)\"> & ${HOME} $headline http://evil.example"
VOID = {"meta", "line", "path", "circle", "rect", "img", "br"}


def row(recipe: Recipe, rate: float, kl: float, weight_bytes: int) -> Row:
    rounds = [Round(0.05, 900.0, rate * factor, 9e9 * factor, 1.0) for factor in (0.9, 1.0, 1.2)]
    return Row(recipe, weight_bytes, 23_592_960, Quality(9.5, 500, kl, 0.97, 300), rounds=rounds)


def comparison() -> Comparison:
    failed = Row(Recipe(weights="int8"), failure=f"not enough memory {HOSTILE}")
    return Comparison(
        model=HOSTILE,
        fingerprint="0123456789abcdef0123",
        architecture={"architecture": "llama", "layers": 2},
        machine={"processor": HOSTILE, "threads": 2},
        settings=Settings(),
        prompts=8,
        prompt_tokens=1024,
        text=HOSTILE,
        rows=[
            row(Recipe(weights="dense"), 60.0, 0.0, 269_000_000),
            row(Recipe(weights="int4", name=HOSTILE), 200.0, 0.03, 95_000_000),
            failed,
        ],
        bandwidths=[10e9, 12e9],
    )


class Page(HTMLParser):
    """Collects what matters, and checks that elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


def test_hostile_names_are_shown_as_words_and_open_no_element() -> None:
    page = Page(html_page(comparison()))
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1 and "img" not in names
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.words  # the model's name, letter by letter


def test_the_page_loads_nothing() -> None:
    text = html_page(replace(comparison(), model="smollm2", text="a text", machine={"threads": 2}, rows=[]))
    text += html_page(replace(comparison(), rows=comparison().rows[:1], model="smollm2", text="", machine={}))
    assert "http:" not in text and "https:" not in text
    assert not re.search(r"url\(|@import|\bsrc=|\bhref=|fetch\(|XMLHttpRequest", text)


def test_the_page_has_the_table_both_plots_and_both_schemes() -> None:
    text = html_page(comparison())
    assert text.count("<svg") == 2
    assert "prefers-color-scheme: dark" in text
    page = Page(text)
    assert "200" in page.words and "180–240" in page.words  # decoding: median, and lowest to highest
    assert "269.0" in page.words
    assert any("not enough memory" in words for words in page.words)


def test_only_what_is_clearly_better_is_marked_best() -> None:
    found = comparison()
    column = {each.title: each for each in COLUMNS}
    dense, int4, failed = found.rows

    def best(title: str) -> list[bool]:
        return [is_best(column[title], found, each) for each in (dense, int4, failed)]

    assert best("decode tok/s") == [False, True, False]
    assert best("weights MB") == [False, True, False]
    assert best("KL") == [True, False, False]
    assert best("prefill tok/s") == [False, False, False]  # all the same
    assert best("of bandwidth") == [False, False, False]  # neither end is better
    dense.rounds = [
        replace(dense.rounds[0], decode_rate=rate) for rate in (60.0, 70.0, 190.0)
    ]  # reaches int4's slowest
    found.rows.append(row(Recipe(weights="int8"), 20.0, 0.01, 135_000_000))
    assert best("decode tok/s") == [True, True, False]


def test_a_page_without_any_measured_row_still_is_one() -> None:
    nothing = replace(comparison(), rows=comparison().rows[2:], bandwidths=[])
    page = Page(html_page(nothing))
    assert page.open == []
    assert "could be measured" in headline(nothing)


def test_the_headline_holds_the_fastest_against_the_baseline() -> None:
    found = comparison()
    found.rows[1].recipe = Recipe(weights="int4")
    assert headline(found) == (
        "int4 writes 200 tokens/s, 3.33 × the rate of dense (60.0), with 35% of its weight bytes; "
        "97.0% of greedy tokens stay those of the uncompressed model (KL 0.0300)."
    )


def test_notes_tell_of_an_interruption_and_of_a_reference_that_did_not_fit() -> None:
    told = " ".join(notes(replace(comparison(), interrupted=True, reference_failure="not enough memory")))
    assert "Interrupted" in told and "not enough memory" in told and "12.0 GB/s" in told
    assert "Interrupted" not in " ".join(notes(comparison()))


def test_what_is_not_finite_is_null_in_json_and_a_dash_on_the_page() -> None:
    found = comparison()
    found.rows[0].quality = Quality(math.inf, 5, math.nan, None, 0)
    found.rows[0].rounds = [replace(each, decode_rate=math.nan) for each in found.rows[0].rounds]
    read = json.loads(to_json(found), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert read["rows"][0]["perplexity"] is None and read["rows"][0]["kl_divergence"] is None
    assert read["rows"][0]["decode_tokens_per_second"] is None
    page = html_page(found)
    assert not re.search(r"\bnan\b", page.lower()) and '<td class="figure none">–</td>' in page


def test_a_file_appears_whole_with_nothing_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_html(comparison(), path)
    assert path.read_text() == html_page(comparison())
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")  # half a surrogate pair cannot be written
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FewerError, match="cannot write"):
        write_atomically(path / "beneath-a-file.json", "text")


def test_an_output_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "report.html")
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "file" / "report.html"):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
            check_writable(wrong)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(40, 580), st.integers(40, 340), st.integers(4, 30)), min_size=1, max_size=6))
def test_labels_of_a_plot_do_not_cover_each_other(dots: list[tuple[int, int, int]]) -> None:
    frame = Box(60, 26, 576, 346)
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y, _ in dots]
    labels: list[Box] = []
    for x, y, characters in dots:
        labels.append(place_label(x, y, characters * CHARACTER, taken + labels, frame))
    for index, label in enumerate(labels):
        assert sum(label.overlap(other) for other in labels[:index]) < 1
        assert label.left >= frame.left - 1e-6 and label.right <= frame.right + 1e-6


@given(st.floats(1e-6, 1e9))
def test_ticks_reach_the_largest_figure(largest: float) -> None:
    ticks = linear_ticks(largest)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 7 and ticks[-1] >= largest * (1 - 1e-9)
    assert ticks[-2] < largest
    assert log_ticks(min(largest, 1e5))[-1] >= min(largest, 1e5) * (1 - 1e-9)


def test_a_plot_takes_equal_and_zero_points() -> None:
    point = Point("a", 5.0, 5.0, 5.0, 0.0, "a")
    assert scatter([point, point], "x", "y").count("<circle") == 2
