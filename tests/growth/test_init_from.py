"""A run starts from another one: rows are joined by what they stand for."""

from __future__ import annotations

from pathlib import Path

import torch

from mme.data.numbering import read_item_ids
from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import read_index
from tests.distributed.processes import run_on
from tests.distributed.test_step import whole
from tests.growth.days import files_of, first_day, refused, saved, train


def test_a_run_starts_from_another_by_raw_id(tmp_path: Path) -> None:
    """The other set orders its items differently. Their rows and states are joined; the decoder's are, if their shape is equal."""
    earlier, run = first_day(tmp_path), tmp_path / "earlier"
    steps = len(run_on(1, train, str(earlier), str(run))[0]["steps"])
    data = first_day(tmp_path, day=3, first_item=10)
    before = saved(run, steps)
    overrides = [f"train.init_from={run}", "data.max_seq_len=12", "model.new_items=random"]
    results = run_on(2, train, str(data), str(tmp_path / "run"), *overrides)
    begin = whole([result["begin"] for result in results])
    old_ids, new_ids = (read_item_ids(folder).to_pylist() for folder in (earlier, data))
    assert old_ids != new_ids[: len(old_ids)]
    for table in ("item_0", "item_1"):
        for state in ("", "/exp_avg", "/exp_avg_sq"):
            for place, item in enumerate(new_ids):
                row = begin[f"tables/{table}{state}"][place]
                if item in old_ids:
                    assert torch.equal(row, before[f"tables/{table}{state}"][old_ids.index(item)])
                else:
                    assert row.any() == (not state)
    assert begin["decoder/inputs.positions"].shape != before["decoder/inputs.positions"].shape
    assert torch.equal(begin["decoder/blocks.0.uvqk/exp_avg"], before["decoder/blocks.0.uvqk/exp_avg"])
    assert not begin["decoder/blocks.0.pos_weights/exp_avg"].any()
    log = results[0]["log"]
    new = sum(item not in old_ids for item in new_ids)
    assert f"starts from step {steps} of {run}: {new} of {len(new_ids)} items and" in log
    assert (
        "so initialised as in a new model: decoder/inputs.positions, decoder/blocks.0.pos_weights, decoder/blocks.1.pos_weights\n"
        in log
    )
    # Adam's bias correction continues, as in a step that follows `steps` others.
    index = read_index(tmp_path / "run", checkpoint.steps(tmp_path / "run")[-1])
    assert not isinstance(index, str) and index.progress.steps_before == steps


def test_what_does_not_fit_is_refused_in_one_line_and_no_checkpoint_is_lost(tmp_path: Path) -> None:
    data, run = first_day(tmp_path), tmp_path / "run"
    run_on(1, train, str(data), str(run))
    before = files_of(run)
    texts, other = first_day(tmp_path, day=1, text_ids=True), first_day(tmp_path, day=2)
    new, from_run = str(tmp_path / "new"), f"train.init_from={run}"
    narrow = "its views are 8 wide (model.embedding_dim / model.num_tables), expected 16"
    cases = [
        (texts, new, [from_run], f"{from_run}: its item ids are integers, expected texts as in this data set"),
        (other, new, [from_run, "model.embedding_dim=32"], narrow),
        (other, new, [f"train.init_from={tmp_path}"], "config.yaml"),
        (other, new, [f"train.init_from={tmp_path / 'none'}"], "no such folder: expected that of a run"),
        (other, str(run), ["train.resume=false", from_run], f"{from_run}: is output_dir: expected another run"),
    ]
    (lines,) = run_on(1, refused, [(str(path), output, overrides) for path, output, overrides, _ in cases])
    for line, (*_, message) in zip(lines, cases, strict=True):
        assert message in line and "\n" not in line
    assert before == files_of(run)
