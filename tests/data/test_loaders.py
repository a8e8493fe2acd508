"""Splits, batches and distribution over ranks, compared with loops that read user by user."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mme.config import DataConfig
from mme.data.batch import SequenceBatch
from mme.data.dataset import PreparedDataset
from mme.data.loaders import EvaluationLoader, TrainLoader, Worker
from mme.data.split import Split
from mme.prepare.writer import DatasetWriter
from tests.data.small_set import NUM_ITEMS, Histories, make_histories, write_set

PROTOCOLS = ["leave_one_out", "leave_two_out", "global_time"]
FRACTION = 0.3


@pytest.fixture(scope="module")
def histories() -> Histories:
    return make_histories()


@pytest.fixture
def folder(tmp_path: Path, histories: Histories) -> Path:
    return write_set(tmp_path / "set", histories)


def worker(rank: int = 0, size: int = 1) -> Worker:
    return Worker(rank, size, torch.device("cpu"))


def first_epoch(loader: TrainLoader) -> list[SequenceBatch]:
    batches = []
    with closing(loader.stream()) as stream:
        for batch in stream:
            batches.append(batch.sequences)
            if batch.is_last:
                break
    return batches


def cut(histories: Histories, protocol: str) -> list[tuple[int, dict[str, int]]]:
    """(number of training events, position of the target of each split) of each user."""
    times = sorted(time for _, stamps in histories for time in stamps)
    cut_off = times[int(len(times) * (1 - FRACTION))]
    cuts: list[tuple[int, dict[str, int]]] = []
    for items, stamps in histories:
        n = len(items)
        if protocol == "leave_one_out":
            cuts.append((n - 1, {"test": n - 1} if n >= 2 else {}))
        elif protocol == "leave_two_out":
            cuts.append((max(0, n - 2), {"valid": n - 2, "test": n - 1} if n >= 3 else {}))
        else:
            older = sum(time < cut_off for time in stamps)
            targets = {"valid": older - 1} if older >= 2 else {}
            if older >= 1 and older < n:
                targets["test"] = older
            cuts.append((older - 1 if older >= 2 else older, targets))
    return cuts


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("tokens_per_batch", "stride"), [(None, None), (20, None), (None, 10), (20, 4)])
def test_every_target_is_trained_on_once_per_epoch(
    folder: Path, histories: Histories, protocol: str, world_size: int, tokens_per_batch: int | None, stride: int | None
) -> None:
    """Covers the targets of each user's newest window or, with a stride, of the whole history, with their context."""
    dataset, max_seq_len = PreparedDataset.open(folder), 10
    data = DataConfig(
        protocol=protocol,
        global_time_test_fraction=FRACTION,
        max_seq_len=max_seq_len,
        batch_size=3,
        tokens_per_batch=tokens_per_batch,
        windows="sliding" if stride else "newest",
        window_stride=stride,
    )
    expected = {}
    for user, ((items, times), (n, _)) in enumerate(zip(histories, cut(histories, protocol), strict=True)):
        for target in range(1, n) if stride else range(max(1, n - max_seq_len), n):
            expected[user, target] = (items[target - 1], items[target], times[target - 1], times[target])
    found = {}
    numbers = set()
    for rank in range(world_size):
        loader = TrainLoader(dataset, data, worker(rank, world_size), seed=1)
        batches = first_epoch(loader)
        assert len(batches) == loader.num_batches(0)
        numbers.add(len(batches))
        for batch in batches:
            assert batch.seq_offsets.dtype == batch.item_ids.dtype == batch.timestamps.dtype == torch.int64
            trained = torch.ones_like(batch.item_ids).bool() if batch.trained is None else batch.trained
            assert batch.num_targets == trained.sum()
            offsets = batch.seq_offsets.tolist()
            for place, user in enumerate(batch.user_rows.tolist()):
                begin, end = offsets[place], offsets[place + 1]
                assert 1 <= end - begin <= max_seq_len
                times = batch.timestamps[begin + place : end + place + 1].tolist()
                token_items, targets = batch.item_ids[begin:end].tolist(), batch.target_ids[begin:end].tolist()
                assert token_items[1:] == targets[:-1]
                last = place_of(histories[user], token_items, targets[-1], times)
                for token in range(end - begin):
                    target = last - (end - begin - 1 - token)
                    history = min(target, max_seq_len)
                    # With stride S each target has N - S tokens of history, if there are as many.
                    assert (
                        token + 1 >= (min(history, max_seq_len - stride + 1) if stride else 1)
                        or not trained[begin + token]
                    )
                    if trained[begin + token]:
                        assert (user, target) not in found
                        found[user, target] = (token_items[token], targets[token], times[token], times[token + 1])
    assert found == expected
    assert len(numbers) == 1


def place_of(history: tuple[list[int], list[int]], items: list[int], target: int, times: list[int]) -> int:
    """The end, in the history, of the window with these items, last target and times."""
    wanted = list(zip([*items, target], times, strict=True))
    events = list(zip(*history, strict=True))
    (end,) = (n for n in range(len(events) + 1) if events[max(0, n - len(wanted)) : n] == wanted)
    return end - 1


@pytest.mark.parametrize("tokens_per_batch", [None, 20])
def test_the_stream_resumes_anywhere_with_any_number_of_readers(folder: Path, tokens_per_batch: int | None) -> None:
    dataset = PreparedDataset.open(folder)

    def taken(readers: int, epoch: int, first: int, number: int) -> list[tuple[int, int, bool, list[int]]]:
        data = DataConfig(
            protocol="leave_one_out", max_seq_len=10, batch_size=4, tokens_per_batch=tokens_per_batch, readers=readers
        )
        loader = TrainLoader(dataset, data, worker(), seed=2)
        with closing(loader.stream(epoch, first)) as stream:
            some = itertools.islice(stream, number)
            return [(batch.epoch, batch.end, batch.is_last, batch.sequences.user_rows.tolist()) for batch in some]

    whole = taken(1, 0, 0, 12)
    assert {epoch for epoch, *_ in whole} >= {0, 1, 2}
    assert taken(3, 0, 0, 12) == whole
    for place in (3, 5, 8):
        epoch, end, is_last, _ = whole[place - 1]
        assert taken(2, epoch + is_last, 0 if is_last else end, 12 - place) == whole[place:]
    first = [user for epoch, _, _, users in whole if epoch == 0 for user in users]
    second = [user for epoch, _, _, users in whole if epoch == 1 for user in users]
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("tokens_per_batch", [None, 10])
def test_the_rest_of_an_epoch_is_the_same_on_any_number_of_processes(
    folder: Path, tokens_per_batch: int | None
) -> None:
    """Trained on by 2, then 3, then 1 process, every sequence is used once, in the order of one process."""
    dataset = PreparedDataset.open(folder)
    data = DataConfig(protocol="leave_one_out", max_seq_len=10, batch_size=1, tokens_per_batch=tokens_per_batch)

    def taken(world_size: int, epoch: int, first: int, number: int) -> tuple[list[set[int]], int, bool]:
        """Users of each global batch, and the progress of the epoch after it."""
        loaders = [TrainLoader(dataset, data, worker(rank, world_size), seed=7) for rank in range(world_size)]
        batches, end, is_last = [], first, False
        streams = [loader.stream(epoch, first) for loader in loaders]
        for row in itertools.islice(zip(*streams, strict=True), number):
            assert len({(batch.epoch, batch.end, batch.is_last) for batch in row}) == 1
            users = [user for batch in row for user in batch.sequences.user_rows.tolist()]
            assert len(set(users)) == len(users)
            if row[0].epoch > epoch:
                break
            batches.append(set(users))
            end, is_last = row[0].end, row[0].is_last
        for stream in streams:
            stream.close()
        return batches, end, is_last

    for epoch in (0, 3):
        whole, end, is_last = taken(1, epoch, 0, 1000)
        assert is_last and end == 12
        first, end, is_last = taken(2, epoch, 0, 2)
        assert not is_last
        second, end, is_last = taken(3, epoch, end, 1)
        assert not is_last
        rest, end, is_last = taken(1, epoch, end, 1000)
        assert is_last and end == 12
        order = [user for batch in whole for user in batch]
        assert sorted(user for batch in first + second + rest for user in batch) == sorted(order)
        if tokens_per_batch is None:  # one sequence per process shows the order itself
            assert first == [set(order[:2]), set(order[2:4])] and second == [set(order[4:7])]
            assert rest == [{user} for user in order[7:]]
    assert taken(1, 0, 0, 1000)[0] != taken(1, 3, 0, 1000)[0]


@pytest.mark.parametrize(
    ("stride", "sequences", "targets"), [(None, 2, 1003), (1000, 201, 200_001), (300, 666, 200_001)]
)
def test_a_history_of_200_thousand_events(tmp_path: Path, stride: int | None, sequences: int, targets: int) -> None:
    lengths = np.array([200_000, 5])
    items = np.arange(lengths.sum()) % NUM_ITEMS
    with DatasetWriter(tmp_path / "set") as writer:
        writer.add(pa.array([1, 2]), np.array([0, *np.cumsum(lengths)]), items, np.arange(items.size))
        writer.finish({"name": "t", "sort_rule": "stable"}, pa.array(range(NUM_ITEMS)), np.bincount(items))
    dataset = PreparedDataset.open(tmp_path / "set")
    data = DataConfig(
        protocol="leave_one_out",
        max_seq_len=1000,
        batch_size=16,
        eval_batch_size=2,
        windows="sliding" if stride else "newest",
        window_stride=stride,
    )
    loader = TrainLoader(dataset, data, worker())
    batches = first_epoch(loader)
    assert sum(batch.num_sequences for batch in batches) == sequences
    assert sum(batch.num_targets for batch in batches) == targets
    assert max(int(batch.seq_offsets.diff().max()) for batch in batches) == 1000
    (batch,) = EvaluationLoader(dataset, data, "test", worker()).batches()
    assert batch.seen_offsets.tolist() == [0, 199_999, 200_003]
    assert batch.sequences.seq_offsets.tolist() == [0, 1000, 1004]
    assert batch.targets.tolist() == [items[199_999], items[-1]]
    assert batch.sequences.timestamps[1000] == 199_999


def test_token_budget_is_kept_and_used(folder: Path) -> None:
    data = DataConfig(protocol="leave_one_out", max_seq_len=10, batch_size=1, tokens_per_batch=20)
    loader = TrainLoader(PreparedDataset.open(folder), data, worker(), seed=3)
    tokens = [batch.num_tokens for batch in first_epoch(loader)]
    assert max(tokens) <= 20
    assert all(first + 10 > 20 for first in tokens[:-1])  # a further sequence of at most 10 tokens did not fit


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_ranks_each_target_once_after_its_whole_history(
    folder: Path, histories: Histories, protocol: str, world_size: int
) -> None:
    dataset, max_seq_len = PreparedDataset.open(folder), 8
    data = DataConfig(
        protocol=protocol,
        global_time_test_fraction=FRACTION,
        max_seq_len=max_seq_len,
        eval_batch_size=4,
    )
    for part in Split.of(data).held_out:
        expected = {
            user: (items[max(0, place - max_seq_len) : place], items[:place], items[place], times[place])
            for user, ((items, times), (_, targets)) in enumerate(zip(histories, cut(histories, protocol), strict=True))
            if (place := targets.get(part)) is not None
        }
        assert expected
        found = {}
        for rank in range(world_size):
            loader = EvaluationLoader(dataset, data, part, worker(rank, world_size))
            batches = list(loader.batches())
            assert len(batches) == -(-len(expected) // (4 * world_size))
            for batch in batches:
                offsets, seen = batch.sequences.seq_offsets.tolist(), batch.seen_offsets.tolist()
                for place, user in enumerate(batch.sequences.user_rows.tolist()):
                    assert user not in found
                    found[user] = (
                        batch.sequences.item_ids[offsets[place] : offsets[place + 1]].tolist(),
                        batch.seen_ids[seen[place] : seen[place + 1]].tolist(),
                        batch.targets[place].item(),
                        batch.sequences.timestamps[offsets[place + 1] + place].item(),
                    )
        assert found == expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_training_counts_exclude_held_out_events(folder: Path, histories: Histories, protocol: str) -> None:
    dataset, split = PreparedDataset.open(folder), Split(protocol, FRACTION)
    kept = [item for (items, _), (n, _) in zip(histories, cut(histories, protocol), strict=True) for item in items[:n]]
    expected = np.bincount(kept, minlength=NUM_ITEMS).tolist()
    assert dataset.training_counts(split).tolist() == expected
    assert dataset.training_counts(split, range(2, 5)).tolist() == expected[2:5]
    assert dataset.training_counts(split, range(NUM_ITEMS, NUM_ITEMS)).tolist() == []


def test_hash_distinguishes_targets(folder: Path) -> None:
    import hashlib

    dataset = PreparedDataset.open(folder)
    rows, positions = dataset.targets(Split("leave_two_out"), "test")
    items = dataset.read(positions, np.ones_like(positions))["item"]
    text = "".join(f"{row + 100}\ti{item}\n" for row, item in zip(rows, items, strict=True))
    assert dataset.targets_sha256(Split("leave_two_out"), "test") == hashlib.sha256(text.encode()).hexdigest()
    splits = [Split(protocol, FRACTION) for protocol in PROTOCOLS]
    hashes = {dataset.targets_sha256(split, part) for split in splits for part in split.held_out}
    assert len(hashes) == 5
