"""The hash of a data set's numbering."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mme.data import numbering
from mme.data.dataset import PreparedDataset
from mme.prepare.pipeline import prepare


@pytest.mark.parametrize("item", ["{}", "é {}"])
def test_the_hash_covers_items_values_and_users_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    monkeypatch.setattr(numbering, "TEXTS_AT_ONCE", 3)  # several chunks, the last one not full
    rows = [f"{user},{item.format(number)},{number},action {number % 2}" for user in range(8) for number in range(10)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp,action", *rows]))
    prepare([tmp_path / "events.csv"], "csv", tmp_path / "set", feature_columns=["action"])
    lines = [*(item.format(number) for number in range(10)), "action", "action 0", "action 1", *range(8)]
    expected = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert PreparedDataset.open(tmp_path / "set").numbering_sha256(["user_id", "action"]) == expected
