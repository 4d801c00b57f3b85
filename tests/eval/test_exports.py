"""Results as pandas, CSV, LaTeX and HTML."""

import builtins
import csv
import io
import re

import numpy as np
import pytest
from test_leaderboard import AD, BASE, IC, made_up

from xattn.eval import Column


@pytest.fixture
def results():
    holes = BASE.copy()
    holes[3] = np.nan
    return made_up(
        objectives={"mine": "mask"}, mine=BASE - 5, **{"grad_cam & co": holes}, random=BASE + 9
    )


def test_one_row_a_method(results):
    table = results.to_pandas()
    assert list(table["method"]) == ["mine", "grad_cam & co", "random"]
    rows = {(r.method, Column(r.metric, r.level).key): r for r in results.rows()}
    for record in table.to_dict("records"):
        for key in ("AD@50", "IC@50"):
            row = rows[record["method"], key]
            assert (record[key], record[f"{key} lo"], record[f"{key} hi"]) == (
                row.mean,
                row.lo,
                row.hi,
            )
            assert record[f"{key} n"] == row.n
        assert record["forwards"] == 3


def test_one_row_an_image_method_and_metric(results):
    table = results.to_pandas(per_image=True)
    assert list(table) == ["image", "method", "target", "target_name", "metric", "value"]
    assert len(table) == 10 * 3 * 2
    wide = table[table["method"] == "grad_cam & co"].pivot(
        index="image", columns="metric", values="value"
    )
    np.testing.assert_array_equal(wide["AD@50"], results.methods["grad_cam & co"].values[AD])
    means = table.groupby(["method", "metric"])["value"].mean()
    assert means["mine", "IC@50"] == pytest.approx(results.mean("mine", *IC))


def test_csv_is_the_same_table(results, tmp_path):
    text = results.to_csv()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in rows] == list(results.methods)
    assert float(rows[0]["AD@50"]) == results.mean("mine", *AD)
    assert results.to_csv(tmp_path / "images.csv", per_image=True) is None
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert len(rows) == 30 and sum(value == "" for row in rows for value in row.values()) == 2
    mine = [float(row["AD@50"]) for row in rows if row["method"] == "mine"]
    np.testing.assert_allclose(mine, results.methods["mine"].values[AD], rtol=1e-5)


def test_without_pandas_the_line_to_type_is_said(results, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r'^to_pandas: .*pip install "xattn\[tables\]"$'):
        results.to_pandas()
    assert results.to_csv() and results.to_latex()


def body(latex):
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", row[:-2])] for row in rows]


def test_latex_is_a_balanced_booktabs_table(results):
    latex = results.to_latex(caption="50 % of the pixels", label="tab:one")
    head, *rows = body(latex)
    assert head == ["Method", r"AD@50 $\downarrow$", r"IC@50 $\uparrow$"]
    assert [row[0] for row in rows] == ["mine", r"grad\_cam \& co", "random"]
    low, high = results.rows()[0].lo, results.rows()[0].hi
    interval = rf"{{\scriptsize [{low:.2f}, {high:.2f}]}}"
    assert rows[0][1] == rf"\textbf{{{results.mean('mine', *AD):.2f}}}$^\dagger$ {interval}"
    assert [r"\textbf" in row[2] for row in rows] == [False, True, False], (
        "a sanity row is never best"
    )
    assert r"\caption{50 \% of the pixels}" in latex and r"\label{tab:one}" in latex
    for name in ("tabular", "table"):
        assert latex.count(rf"\begin{{{name}}}") == latex.count(rf"\end{{{name}}}") == 1
    unescaped = re.sub(r"\\[{}]|(?<!\\)%.*", "", latex)
    assert unescaped.count("{") == unescaped.count("}")
    assert [latex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]


def test_latex_of_some_columns_and_rows(results):
    head, *rows = body(results.to_latex(["IC@50"], ["random", "mine"], intervals=False))
    assert len(head) == 2 and [row[0] for row in rows] == ["random", "mine"]
    assert "[" not in rows[0][1]


def test_of_few_images_nothing_is_bold():
    few = made_up(mine=BASE[:7] - 9, rival=BASE[:7], random=BASE[:7])
    for text, bold in ((few.to_latex(), r"\textbf"), (few._repr_html_(), "<b>")):
        assert bold not in text and "too few images for a verdict" in text


def test_a_notebook_shows_a_table_with_names_escaped(results):
    page = results._repr_html_()
    assert page.count("<tr>") == 4 and "grad_cam &amp; co" in page and "AD@50 ↓" in page
    assert page.count("<b>") == 2
    assert f"<b>{results.mean('mine', *AD):.2f}</b>" in page
