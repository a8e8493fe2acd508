"""The names of items in a report."""

from __future__ import annotations

from pathlib import Path

from mme.data.dataset import PreparedDataset
from mme.evaluation.collected import item_names
from mme.prepare.item_table import ItemOptions
from mme.prepare.pipeline import prepare


def test_titles_stand_for_items_that_have_one(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,time\n1,5,1\n1,6,2\n1,7,3\n")
    (tmp_path / "items.csv").write_text("item,title\n6,Six\n")
    prepare([tmp_path / "log.csv"], "auto", tmp_path / "set", items=ItemOptions(str(tmp_path / "items.csv")))
    names = item_names(PreparedDataset.open(tmp_path / "set"))
    assert names is not None
    assert names([2, 1, 0]) == ["7", "Six", "5"]
