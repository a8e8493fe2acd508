"""Comparing several runs user by user."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mme.cli import main
from mme.errors import UserError
from mme.evaluation.user_ranks import RANKS_FILE, UNRANKED, UserRanks, read_user_ranks
from mme.report.compare import as_csv, as_latex, as_markdown, compare, diversity, holm, paired_p
from tests.report.pages import RUN, write_run

USERS = 400
ABOUT = {
    "model": "fuxi-mme",
    "step": 40,
    "split": "test",
    "seen": "exclude",
    "targets_sha256": "ab" * 32,
    "num_items": 100,
}


def user_ranks(rank: np.ndarray, **about: Any) -> UserRanks:
    users = np.arange(rank.size)
    lists = np.tile(np.arange(10), (rank.size, 1))
    lists[0] = [10, 11, *[-1] * 8]
    return UserRanks(
        ABOUT | about,
        user_row=users * 2,
        rank=rank,
        popularity_rank=np.full(rank.size, 3),
        target_place=users % 100,
        target_events=100 - users % 100 - (users % 100 == 99),
        history_events=users % 120 + 1,
        top_items=lists,
        novelty=np.linspace(4, 6, rank.size),
    )


def write_ranks(folder: Path, rank: np.ndarray, **about: Any) -> Path:
    run = write_run(folder, [RUN])
    user_ranks(rank, **about).write(run)
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run with ranks from 1 to 20, one that ranks most targets one place better, and one that differs by chance."""
    generator = np.random.default_rng(0)
    base = generator.integers(1, 20, USERS)
    better = np.maximum(base - 1, 1)
    shuffled = np.where(generator.random(USERS) < 0.5, base + 1, np.maximum(base - 1, 1))
    return [
        write_ranks(tmp_path / name, rank) for name, rank in (("base", base), ("better", better), ("noise", shuffled))
    ]


def test_ranks_are_read_back_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    rank = np.array([5, UNRANKED, 1, 12])
    written = user_ranks(rank)
    order = np.array([2, 0, 3, 1])
    shuffled = UserRanks(
        written.about, **{name: value[order] for name, value in vars(written).items() if name != "about"}
    )
    run = write_run(tmp_path / "run", [RUN])
    assert shuffled.write(run) == run / RANKS_FILE
    found = read_user_ranks(run)
    assert found.about == written.about
    for name, value in vars(written).items():
        if name != "about":
            np.testing.assert_array_equal(getattr(found, name), value)


def test_a_better_run_is_distinguished_from_chance(runs: list[Path]) -> None:
    popularity, base, better, noise = compare(runs)
    assert [row.name for row in (popularity, base, better, noise)] == ["popularity", "base", "better", "noise"]
    assert popularity.metrics["mrr"] == pytest.approx((1 / 3, 0.0)) and base.difference is None
    assert better.difference is not None and noise.difference is not None
    mean = better.metrics["ndcg@10"][0] - base.metrics["ndcg@10"][0]
    assert better.difference.mean == pytest.approx(mean)
    assert better.difference.p < 1e-4 and better.difference.p_holm == pytest.approx(2 * better.difference.p)
    assert better.difference.mean > better.difference.half_interval
    assert better.coverage == pytest.approx(0.12) and better.novelty == pytest.approx(5)
    assert better.diversity == pytest.approx(2 / USERS)  # one list shares nothing with the others, which are equal
    groups = {row["group"]: row for row in better.segments["popularity"]}
    assert (
        groups["top 1%"]["users"] == 4
        and groups["new"]["users"] == 4
        and sum(g["users"] for g in groups.values()) == USERS
    )


def test_p_equals_that_of_a_paired_test() -> None:
    differences = np.array([0.5, -0.25, 0.75, 0.5, 0.0, 0.25])
    t = differences.mean() / (differences.std(ddof=1) / 6**0.5)
    from scipy import stats

    assert paired_p(differences) == pytest.approx(2 * stats.t.sf(t, 5))
    assert paired_p(np.zeros(9)) == 1 and paired_p(np.array([1.0])) == 1


def test_diversity_equals_that_of_all_pairs() -> None:
    generator = np.random.default_rng(2)
    lists = np.stack([generator.permutation(15)[:10] for _ in range(30)])
    lists[3, 4:] = -1  # a short list
    pairs = [(a, b) for a in range(30) for b in range(a)]
    common = [len(set(lists[a][lists[a] >= 0]) & set(lists[b])) for a, b in pairs]
    assert diversity(lists) == pytest.approx(1 - np.mean(common) / 10)
    assert diversity(np.tile(np.arange(10), (3, 1))) == 0 and diversity(lists[:1]) is None


def test_test_is_calibrated() -> None:
    generator = np.random.default_rng(1)
    ps = [paired_p(generator.choice([-0.4, 0.0, 0.4], 200, p=[0.1, 0.8, 0.1])) for _ in range(2000)]
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_holm_by_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_monotone_and_between_p_and_bonferroni(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= c <= min(1, len(ps) * p) + 1e-12 for p, c in zip(ps, corrected, strict=True))
    assert [c for _, c in sorted(zip(ps, corrected, strict=True))] == sorted(corrected)


def test_tables_in_each_format(runs: list[Path]) -> None:
    rows = compare(runs)
    markdown = as_markdown(rows)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[:6]] == ["run", "---", "popularity", "base", "better", "noise"]
    assert len({line.count("|") for line in lines[:6]}) == 1 and "< 0.0001" in markdown.replace("\\<", "<")
    assert "NDCG@10 by popularity of the target" in markdown and "(4 users)" in markdown
    latex = as_latex(rows)
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert r"12.0\%" in latex and "±" not in latex
    assert {line.count(" & ") for line in latex.split(r"\bottomrule")[0].splitlines() if line.endswith(r"\\")} == {12}
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    (tested,) = [
        row for row in table if row["run"] == "better" and row["metric"] == "ndcg@10" and row["group"] == "all"
    ]
    assert rows[2].difference is not None
    assert float(tested["p_holm"]) == rows[2].difference.p_holm and tested["users"] == "400"
    assert float(tested["value"]) == rows[2].metrics["ndcg@10"][0]
    (between,) = [row for row in table if row["run"] == "better" and row["metric"] == "diversity@10"]
    assert float(between["value"]) == rows[2].diversity
    assert {"popularity: new", "history: 1–9"} <= {row["group"] for row in table}


def test_names_are_escaped_in_every_format(tmp_path: Path) -> None:
    rank = np.array([1, 2, 3])
    hostile = [write_ranks(tmp_path / name, rank) for name in ("=1|<b>_&%\n#", "$x\\~^{")]
    rows = compare(hostile)
    assert r"\n" in as_markdown(rows) and r"=1\|\<b\>\_" in as_markdown(rows)
    assert r"\textbackslash{}" in as_latex(rows) and r"\$x" in as_latex(rows) and r"\&\%" in as_latex(rows)
    assert {row["run"][:2] for row in csv.DictReader(io.StringIO(as_csv(rows)))} == {"po", "'=", "$x"}


@pytest.mark.parametrize(("key", "what"), [("targets_sha256", "other targets"), ("seen", "other eval.seen")])
def test_runs_over_other_targets_are_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, what: str
) -> None:
    other = write_ranks(tmp_path / "other", np.ones(USERS, np.int64), **{key: "include"})
    output = tmp_path / "table.md"
    assert main(["compare", str(runs[0]), str(other), "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and f"{other}: was evaluated with {what} than {runs[0]}" in printed.err
    assert not output.exists() and printed.out == ""


def damaged(run: Path, column: str, values: Any) -> None:
    table = pq.read_table(run / RANKS_FILE)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, values), run / RANKS_FILE)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("rank", pa.array([0] * USERS), "column 'rank': expected ranks from 1, found 0"),
        ("rank", pa.array(["1"] * USERS), "expected a column 'rank' of int64"),
        ("user_row", pa.array([None] * USERS, pa.int64()), "column 'user_row': expected a value in every row"),
        ("top_items", pa.array([[100]] * USERS), "column 'top_items': expected item indices from 0 to 99"),
        ("top_items", pa.array([[0] * 11] * USERS), "column 'top_items': expected at most 10 items per row"),
    ],
)
def test_damaged_ranks_are_named(runs: list[Path], column: str, values: Any, message: str) -> None:
    damaged(runs[1], column, values)
    with pytest.raises(UserError) as caught:
        compare(runs)
    assert str(caught.value).startswith(f"{runs[1] / RANKS_FILE}: {message}")


def test_missing_and_unreadable_ranks_are_named(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (runs[1] / RANKS_FILE).write_bytes(b"PAR1" + b"\x00" * 50 + b"PAR1")
    with pytest.raises(UserError, match=r"test_ranks\.parquet: not a readable Parquet file"):
        compare(runs)
    pq.write_table(pa.table({"rank": [1]}), runs[1] / RANKS_FILE, store_schema=False)
    odd = (runs[1] / RANKS_FILE).read_bytes().replace(b"rank", b"r\xad\xadk")
    (runs[1] / RANKS_FILE).write_bytes(odd)
    with pytest.raises(UserError, match=r"test_ranks\.parquet: not a readable Parquet file \('utf-8' codec"):
        compare(runs)
    pq.write_table(pa.table({"rank": [1]}), runs[1] / RANKS_FILE)
    with pytest.raises(UserError, match=r"test_ranks\.parquet: expected metadata 'mme'"):
        compare(runs)
    (runs[1] / RANKS_FILE).unlink()
    assert main(["compare", str(runs[0]), str(runs[1])]) == 2
    assert "test_ranks.parquet: no such file" in capsys.readouterr().err
    assert main(["compare", str(runs[0])]) == 2
    assert "expected at least two to compare" in capsys.readouterr().err


def test_command_prints_or_writes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run) for run in runs]
    assert main(["compare", *folders]) == 0
    printed = capsys.readouterr().out
    assert printed == as_markdown(compare(runs))
    output = tmp_path / "table.csv"
    assert main(["compare", *folders, "--format", "csv", "--output", str(output)]) == 0
    assert output.read_text() == as_csv(compare(runs)) and capsys.readouterr().out == f"wrote {output}\n"
