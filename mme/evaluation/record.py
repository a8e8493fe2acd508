"""Names of metrics and models in evaluation records, and the warning about repeated targets. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

CUTOFFS = (10, 50)
METRICS = [*(f"{metric}@{cutoff}" for metric in ("hr", "ndcg") for cutoff in CUTOFFS), "mrr"]
SELECTED_BY = "ndcg@10"  # the metric that selects the best checkpoint
POPULARITY = "popularity"  # the baseline's name
MANY_REPEATS = 0.01  # share of repeated targets above which `eval.seen` affects the metrics visibly


def repeats_warning(record: dict[str, Any]) -> str | None:
    """A sentence about many repeated targets that count as misses; None if there are few, or if they are ranked."""
    share = record.get("repeated_targets")
    if record.get("seen") != "exclude" or share is None or share <= MANY_REPEATS:
        return None
    split = {"valid": "validation"}.get(record["split"], record["split"])
    return (
        f"{share:.1%} of the {split} targets are items of the user's history. eval.seen=exclude counts them as misses; "
        "eval.seen=include ranks them."
    )
