"""`mme.train`: the job of `mme train` from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.trained import REPOSITORY
from tests.trained import mme as command

SCRIPT = """
import json, sys
import mme
import mme.errors

data, folder = sys.argv[1:]
small = ["model.embedding_dim=16", "model.num_blocks=1", "model.moe.num_experts=4", "model.moe.placement=[0]"]
small += ["train.epochs=1", f"data.path={data}"]
first = mme.train("configs/quickstart.yaml", [*small, f"output_dir={folder}/first"])
second = mme.train({"data": {"path": data, "max_seq_len": 16}, "output_dir": f"{folder}/second"}, small)
try:
    mme.train({"data": {"pth": data}})
except mme.errors.UserError as error:
    refused = str(error)
lists = first.load("cpu").recommend([{"item_ids": [1000], "timestamps": [1_600_000_000]}], k=3)
print(json.dumps([first.metrics, first.popularity["model"], str(second.folder), lists.num_rows, refused]))
"""


def test_a_process_trains_one_model_after_another(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command("prepare", "--synthetic", "quickstart", "--users", "60", "--items", "30", "--output", data)
    script = [sys.executable, "-c", SCRIPT, data, tmp_path]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics, baseline, second, lists, refused = json.loads(done.stdout.splitlines()[-1])
    evaluated = json.loads(command("evaluate", "--run", tmp_path / "first").stdout)
    assert {key: evaluated[key] for key in ("ndcg@10", "hr@10", "targets_sha256")} == {
        key: metrics[key] for key in ("ndcg@10", "hr@10", "targets_sha256")
    }
    assert baseline == "popularity"
    assert lists == 1
    assert refused == "configuration: data.pth: unknown key (did you mean data.path?)"
    for run in (tmp_path / "first", Path(second)):
        assert (run / "report.html").is_file() and (run / "config.yaml").is_file()
