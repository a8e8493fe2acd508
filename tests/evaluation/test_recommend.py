"""Recommendations from a checkpoint equal a brute-force ranking for every kind of history."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mme.config import load_config, save_config
from mme.data.dataset import PreparedDataset
from mme.data.description import file_sum
from mme.distributed.checkpoint_index import Progress
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from mme.errors import NonFiniteError, UserError
from mme.evaluation import recommend as module
from mme.evaluation.recommend import Options, recommend
from mme.model.scoring import normalize_views
from mme.prepare.synthetic import prepare_synthetic
from tests.distributed.processes import run_on

SMALL = ["data.max_seq_len=8", "model.num_tables=2", "model.embedding_dim=8", "model.moe.num_experts=0"]
FIRST_ITEM = 1001  # the raw id of item 0


def save_untrained(world: World, run: str, spoiled: bool) -> Any:
    """Writes a checkpoint of an untrained model and returns its item vectors, (items, D)."""
    config = load_config(None, [f"data.path={run}/data", *SMALL])
    save_config(config, Path(run) / "config.yaml")
    dataset = PreparedDataset.open(Path(run) / "data")
    recommender = Recommender(config, dataset.num_items, world)
    initialize_engine(recommender.decoder, config)
    if spoiled:
        for shard in recommender.tables.weights():
            shard.tensor[3] = 1e30  # finite, but its square is not
    with CheckpointWriter(Path(run), recommender, keep=1) as writer:
        writer.save(Progress(1, 0, 0))
    rows = recommender.lookup(torch.arange(dataset.num_items)).detach()
    return None if spoiled else normalize_views(rows, config.model.score_norm)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    prepare_synthetic("quickstart", folder / "data", users=20, items=30, seed=3)
    run_on(1, save_untrained, str(folder), False)
    return folder


def histories(folder: Path, *item_ids: list[int]) -> Path:
    path = folder / "histories.parquet"
    times = [[1_700_100_000 + 60 * event for event in range(len(items))] for items in item_ids]
    pq.write_table(pa.table({"user_id": range(len(item_ids)), "item_ids": item_ids, "timestamps": times}), path)
    return path


def lists_of(world: World, run: str, users: str, output: str, options: Options) -> Any:
    """Gives the function this process group, where it would make another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "process_group", lambda: _Given(world))
        return recommend(Path(run), Path(users), Path(output), options)


class _Given:
    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> World:
        return self.world

    def __exit__(self, *_: object) -> None:
        return None


def test_seen_items_and_histories_of_unknown_items(run: Path, tmp_path: Path) -> None:
    users = histories(tmp_path, [1003, 1007, 1003], [5, 6], [1001, 77, 1002, 1004], [1009])
    excluded, included, by_two = (tmp_path / name for name in ("excluded", "included", "by_two"))
    (summary,) = run_on(1, lists_of, str(run), str(users), str(excluded), Options(30))
    assert (summary.histories, summary.unknown_events, summary.with_unknown, summary.fallbacks) == (4, 3, 2, 1)
    assert summary.notes() == [
        "events of items that the training data doesn't have: 3 left out, in 2 of 4 histories",
        "1 histories have no known item: they get the most popular items (fallback is true)",
    ]
    run_on(1, lists_of, str(run), str(users), str(included), Options(30, seen="include"))
    run_on(2, lists_of, str(run), str(users), str(by_two), Options(30))
    without, with_all, again = (pq.read_table(path).to_pylist() for path in (excluded, included, by_two))
    everything = set(range(FIRST_ITEM, FIRST_ITEM + 30))
    for row, seen in zip(without, [{1003, 1007}, set(), {1001, 1002, 1004}, {1009}], strict=True):
        assert set(row["item_ids"]) == everything - seen
        assert len(row["item_ids"]) == 30 - len(seen)
        assert row["scores"] == sorted(row["scores"], reverse=True)
    for row, complete in zip(without, with_all, strict=True):
        assert set(complete["item_ids"]) == everything
        assert [item for item in complete["item_ids"] if item in row["item_ids"]] == row["item_ids"]
    for row, other in zip(without, again, strict=True):
        assert other["item_ids"] == row["item_ids"]
        torch.testing.assert_close(torch.tensor(other["scores"]), torch.tensor(row["scores"]))

    counts = pq.read_table(run / "data" / "items.parquet").sort_by("item_index").to_pylist()
    popular = sorted(counts, key=lambda row: (-row["count"], row["item_index"]))
    assert [row["fallback"] for row in without] == [False, True, False, False]
    assert without[1]["item_ids"] == [row["item_id"] for row in popular]
    assert without[1]["scores"] == [row["count"] for row in popular]


def test_an_unknown_item_changes_nothing_else(run: Path, tmp_path: Path) -> None:
    """An unknown item's event is left out of the history, with its time."""
    tops = []
    for name, items in (("with", [1001, 77, 1002]), ("without", [1001, 1002])):
        users = tmp_path / f"{name}.parquet"
        times = [1_700_100_000, 1_700_100_060, 1_700_200_000][:: 1 if len(items) == 3 else 2]
        pq.write_table(pa.table({"user_id": [1], "item_ids": [items], "timestamps": [times]}), users)
        run_on(1, lists_of, str(run), str(users), str(tmp_path / name), Options(5))
        tops.append(pq.read_table(tmp_path / name).to_pylist())
    assert tops[0] == tops[1]


def test_titles_stand_beside_the_items(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    data = tmp_path / "run" / "data"
    items = pq.read_table(data / "items.parquet")
    titles = [f"title {item}" if item % 2 else None for item in items["item_id"].to_pylist()]
    pq.write_table(items.append_column("title", pa.array(titles)), data / "items.parquet")
    info = json.loads((data / "dataset.json").read_text())
    info["files"]["items.parquet"] = file_sum(data / "items.parquet")
    (data / "dataset.json").write_text(json.dumps(info))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(tmp_path / "run")))
    users = histories(tmp_path, [1003, 1007], [5, 6])
    run_on(1, lists_of, str(tmp_path / "run"), str(users), str(tmp_path / "top"), Options(7))
    for row in pq.read_table(tmp_path / "top").to_pylist():
        assert row["titles"] == [f"title {item}" if item % 2 else None for item in row["item_ids"]]
        assert len(row["titles"]) == 7


def refused_before_the_model_is_loaded(world: World, run: str, users: str, output: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Recommender", lambda *_: pytest.fail("the model was made"))
        with pytest.raises(UserError) as refused:
            lists_of(world, run, users, output, Options())
    return str(refused.value)


def test_an_output_that_can_not_be_written_is_refused_at_once(run: Path, tmp_path: Path) -> None:
    users = histories(tmp_path, [1003])
    (tmp_path / "file").touch()
    for output, reason in [
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "top.parquet", "Not a directory"),
        (Path("/proc/top.parquet"), "No such file or directory"),
    ]:
        for message in run_on(2, refused_before_the_model_is_loaded, str(run), str(users), str(output)):
            assert message.startswith(f"--output {output}: ")
            assert reason in message or "File exists" in message


def refused_by_its_weights(world: World, run: str, users: str, output: str) -> str:
    with pytest.raises(NonFiniteError) as refused:
        lists_of(world, run, users, output, Options())
    return str(refused.value)


def test_a_model_without_valid_scores_recommends_nothing(tmp_path: Path) -> None:
    prepare_synthetic("quickstart", tmp_path / "data", users=20, items=30, seed=3)
    run_on(1, save_untrained, str(tmp_path), True)
    users, output = histories(tmp_path, [1003]), tmp_path / "top.parquet"
    (message,) = run_on(1, refused_by_its_weights, str(tmp_path), str(users), str(output))
    assert "the item vectors are not finite for 1 of 30 items, the first that of item 3 in table item_0" in message
    assert not output.exists()
