"""Compares several runs user by user, from the ranks that each run saved (`mme.evaluation.user_ranks`).

The first run is the reference. The difference of NDCG@10 of every other run has a 95% confidence interval and the p-value of
a paired t-test over users, corrected for the number of comparisons by Holm's method (Scand. J. Statist. 6, 1979).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from mme.errors import UserError, one_line
from mme.evaluation.metrics import user_metrics
from mme.evaluation.segments import Floats, Ints, group_means, history_groups, popularity_groups, standard_error
from mme.evaluation.user_ranks import UserRanks, read_user_ranks
from mme.report.results import METRICS, POPULARITY, SELECTED_BY, Z_95

TESTED = SELECTED_BY
SEGMENTS = {"popularity": "popularity of the target", "history": "events before the target"}


@dataclass(frozen=True)
class Difference:
    """A run's mean NDCG@10 minus the first run's: half its 95% confidence interval, p, and p after Holm's correction."""

    mean: float
    half_interval: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Compared:
    """One row of the comparison.

    Attributes:
        metrics: (mean, half the 95% confidence interval over users) by metric.
        segments: rows of `mme.evaluation.segments.group_means`, by "popularity" and "history".
        coverage: share of the catalogue that occurs in any user's list of 10; None for popularity.
        novelty: bits per item, averaged over the users' lists; None for popularity.
        diversity: see `diversity`; None for popularity or a single user.
        difference: None for the first run and for popularity.
    """

    name: str
    about: str
    metrics: dict[str, tuple[float, float]]
    segments: dict[str, list[dict[str, Any]]]
    coverage: float | None = None
    novelty: float | None = None
    diversity: float | None = None
    difference: Difference | None = None


def compare(runs: Sequence[Path]) -> list[Compared]:
    """Rows for popularity and for the runs in their order.

    Raises:
        UserError: a run has no readable ranks, or was evaluated with other targets or another `eval.seen` than the first.
    """
    ranks = [read_user_ranks(run) for run in runs]
    for run, of_run in zip(runs[1:], ranks[1:], strict=True):
        _require_same_targets(runs[0], ranks[0], run, of_run)
    tested = [_user_metrics(of_run.rank)[TESTED] for of_run in ranks]
    differences = [values - tested[0] for values in tested[1:]]
    ps = [paired_p(values) for values in differences]
    rows = [_row(POPULARITY, "", ranks[0].popularity_rank, ranks[0])]
    found = [None] + [
        Difference(float(values.mean()), Z_95 * standard_error(values), p, p_holm)
        for values, p, p_holm in zip(differences, ps, holm(ps), strict=True)
    ]
    for name, of_run, difference in zip(_names(runs), ranks, found, strict=True):
        lists = of_run.top_items
        coverage = np.unique(lists[lists >= 0]).size / of_run.about["num_items"]
        about = f"{of_run.about['model']}, step {of_run.about['step']:,}"
        novelty, between = float(np.nanmean(of_run.novelty)), diversity(lists)
        more = {"coverage": coverage, "novelty": novelty, "diversity": between, "difference": difference}
        rows.append(_row(name, about, of_run.rank, of_run, **more))
    return rows


def diversity(lists: Ints) -> float | None:
    """How different the lists of two users are: 1 − (common items / length), the mean over all pairs of users.

    The measure of Zhou et al. (PNAS 107, 2010), who call it personalization: 0 if all users have the same list, 1 if no two
    share an item. It depends on the lists alone, so it is comparable between models. None for fewer than two users.

    Args:
        lists: (users, length) items, each at most once per list, padded with −1.
    """
    users, length = lists.shape
    if users < 2:
        return None
    users_of_item = np.unique(lists[lists >= 0], return_counts=True)[1].astype(np.float64)
    common = (users_of_item * (users_of_item - 1)).sum()  # over ordered pairs of users
    return float(1 - common / (users * (users - 1) * length))


def paired_p(differences: Floats) -> float:
    """Two-sided p-value of a paired t-test; 1 if no user differs or there is only one."""
    if differences.size < 2 or not differences.any():
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Each p-value times the number of hypotheses not rejected before it, monotone in p and at most 1.

    holm([0.01, 0.04, 0.03]) → [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected


def as_markdown(rows: Sequence[Compared]) -> str:
    """Tables of results and of NDCG@10 by segment."""
    parts = [_markdown(*_results(rows))]
    parts += [f"NDCG@10 by {title}\n\n{_markdown(*_segments(rows, name))}" for name, title in SEGMENTS.items()]
    first = next(row.name for row in rows if row.name != POPULARITY)
    notes = (
        f"± is half a 95% confidence interval over users. ΔNDCG@10 is the difference from {_cell(first)}; p is the p-value of "
        "a paired t-test over users, without and with Holm's correction. Coverage is the share of the catalogue that occurs "
        "in any list of 10; novelty is in bits per item; diversity is the share of a list that another user's list does not "
        "contain, averaged over all pairs of users."
    )
    return "\n\n".join([*parts, notes]) + "\n"


def as_latex(rows: Sequence[Compared]) -> str:
    """The same tables for LaTeX; they need the package booktabs."""
    parts = [_latex(*_results(rows))]
    parts += [f"% NDCG@10 by {title}\n{_latex(*_segments(rows, name))}" for name, title in SEGMENTS.items()]
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Compared]) -> str:
    """One line per run, metric and group of users ("all", "popularity: new", …), with unrounded numbers."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["run", "metric", "group", "users", "value", "half_interval", "difference", "p", "p_holm"])
    for row in rows:
        name = _spreadsheet_cell(row.name)
        for metric, (mean, half) in row.metrics.items():
            tested = row.difference if metric == TESTED else None
            more = [tested.mean, tested.p, tested.p_holm] if tested else ["", "", ""]
            writer.writerow([name, metric, "all", _users(row), mean, half, *more])
        for kind, groups in row.segments.items():
            for group in groups:
                half = Z_95 * group["standard_error"]
                writer.writerow(
                    [name, TESTED, f"{kind}: {group['group']}", group["users"], group[TESTED], half, "", "", ""]
                )
        of_lists = {"coverage@10": row.coverage, "novelty@10": row.novelty, "diversity@10": row.diversity}
        for metric, value in of_lists.items():
            if value is not None:
                writer.writerow([name, metric, "all", _users(row), value, "", "", "", ""])
    return output.getvalue()


FORMATS = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def _user_metrics(ranks: Ints) -> dict[str, Floats]:
    return {name: values.numpy() for name, values in user_metrics(torch.tensor(ranks)).items()}


def _require_same_targets(first: Path, expected: UserRanks, run: Path, found: UserRanks) -> None:
    for key, what in {"targets_sha256": "targets", "seen": "eval.seen"}.items():
        if found.about.get(key) != expected.about.get(key):
            raise UserError(
                f"{run}: was evaluated with other {what} than {first} ({found.about.get(key)}, expected "
                f"{expected.about.get(key)}): their metrics cannot be compared"
            )
    if not np.array_equal(found.user_row, expected.user_row):
        raise UserError(f"{run}: was evaluated on other users than {first}")


def _row(name: str, about: str, ranks: Ints, of_run: UserRanks, **more: Any) -> Compared:
    by_metric = _user_metrics(ranks)
    groups = {
        "popularity": popularity_groups(of_run.target_place, of_run.target_events, of_run.about["num_items"]),
        "history": history_groups(of_run.history_events),
    }
    segments = {kind: group_means(by_metric[TESTED], of_kind, TESTED) for kind, of_kind in groups.items()}
    metrics = {name: (float(by_metric[name].mean()), Z_95 * standard_error(by_metric[name])) for name in METRICS}
    return Compared(name, about, metrics, segments, **more)


def _names(runs: Sequence[Path]) -> list[str]:
    names = [run.resolve().name for run in runs]
    return names if len({*names, POPULARITY}) > len(names) else [str(run) for run in runs]


def _users(row: Compared) -> int:
    return sum(group["users"] for group in row.segments["history"])


def _results(rows: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    head = [
        "run",
        "model",
        *(metric.upper() for metric in METRICS),
        "ΔNDCG@10",
        "p",
        "p (Holm)",
        "coverage",
        "novelty",
        "diversity",
    ]
    cells = []
    for row in rows:
        tested = row.difference
        cells.append(
            [row.name, row.about or "–"]
            + [f"{mean:.4f} ± {half:.4f}" for mean, half in row.metrics.values()]
            + (
                [f"{tested.mean:+.4f} ± {tested.half_interval:.4f}", _p(tested.p), _p(tested.p_holm)]
                if tested
                else ["–"] * 3
            )
            + [
                "–" if row.coverage is None else f"{row.coverage:.1%}",
                "–" if row.novelty is None else f"{row.novelty:.2f}",
                "–" if row.diversity is None else f"{row.diversity:.4f}",
            ]
        )
    return head, cells


def _segments(rows: Sequence[Compared], kind: str) -> tuple[list[str], list[list[str]]]:
    groups = rows[0].segments[kind]
    head = ["run", *(f"{group['group']} ({group['users']:,} users)" for group in groups)]
    cells = [
        [row.name, *(f"{group[TESTED]:.4f} ± {Z_95 * group['standard_error']:.4f}" for group in row.segments[kind])]
        for row in rows
    ]
    return head, cells


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    escaped = "".join(f"\\{char}" if char in "\\`*_[]<>|" else char for char in one_line(text))
    return escaped


def _latex(head: list[str], rows: list[list[str]]) -> str:
    lines = [" & ".join(map(_latex_text, cells)) + r" \\" for cells in [head, *rows]]
    columns = "l" * 2 + "r" * (len(head) - 2) if head[1] == "model" else "l" + "r" * (len(head) - 1)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end])


def _latex_text(text: str) -> str:
    special = {char: f"\\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "<": "$<$", ">": "$>$"}
    return "".join(special.get(char, char) for char in one_line(text))


def _spreadsheet_cell(text: str) -> str:
    """Escapes a name that a spreadsheet would interpret as a formula."""
    text = one_line(text)
    return f"'{text}" if text[:1] in "=+-@" else text
