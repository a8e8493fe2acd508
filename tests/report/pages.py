"""Writes runs as `mme train` does, and parses the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mme.config import load_config, save_config

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A report: its text, its charts' specifications, and everything that a browser would load or run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.loads: list[str] = []
        self.attributes: list[str] = []
        self.counts: dict[str, int] = {}
        self.text = self.policy = self.style = ""
        self.scripts: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self._script_type: str | None = None
        self.feed(self.source)
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += found
        self.loads += [str(value) for name, value in attributes if name in {"src", "href", "data", "srcset"}]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag == "script":
            self._script_type = found.get("type")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script" and self._script_type == "application/json":
            self.charts = json.loads(data)
        elif inside == "script":
            self.scripts.append(data)
        elif inside == "style":
            self.style += data
        else:
            self.text += data

    def series(self) -> set[str]:
        """The names of all lines in all charts."""
        return {row["series"] for spec in self.charts for row in spec["data"]["values"] if "series" in row}


def write_run(folder: Path, records: list[dict[str, Any]], *overrides: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    save_config(load_config(None, [f"data.path={data}", *overrides]), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def train_records() -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "epoch": 0,
            "loss": 7 - step / 100,
            "tokens_per_s": 1e4,
            "lr": 1e-3,
            "step_ms": 50.0,
            "wait_ms": 8.0,
            "straggler_ms": 3.0,
            "slowest_rank": 1,
        }
        for step in range(10, 210, 10)
    ]


def evaluation(model: str, split: str, step: int, ndcg: float, **more: Any) -> dict[str, Any]:
    figures = {"hr@10": 2 * ndcg, "hr@50": 3 * ndcg, "ndcg@10": ndcg, "ndcg@50": 1.5 * ndcg, "mrr": ndcg / 2}
    about = {"protocol": "leave_two_out", "sort_rule": "stable by time", "targets_sha256": "0123abcd", "users": 1234}
    return {"kind": "eval", "model": model, "split": split, "step": step, **about, **figures, **more}


RUN = {
    "kind": "run",
    "step": 0,
    "time": "2025-01-02T03:04:05+0000",
    "device": "cpu",
    "world_size": 2,
    "parameters": {"tables": 3000, "decoder": 1000},
    "versions": {"torch": "2.13.0"},
}
EVALUATIONS = [
    evaluation("fuxi-mme", "valid", 100, 0.1),
    evaluation("popularity", "valid", 100, 0.03),
    evaluation("fuxi-mme", "valid", 200, 0.12),
    evaluation("popularity", "valid", 200, 0.03),
    evaluation("fuxi-mme", "test", 200, 0.11),
    evaluation("popularity", "test", 200, 0.022),
]
EXPERTS = {
    "kind": "experts",
    "step": 200,
    "blocks": [1],
    "load": [[[0.7, 0.299, 0.001]] * 4],
    "entropy": [[0.9, 0.8, 0.7, 0.6]],
}


def learned() -> dict[str, Any]:
    """The field ``insight`` of a test record."""
    groups = {"groups": ["a", "b", "<c>"], "share": [[[0.25, 0.75]] * 3]}
    return {
        "singular_values": [[4.0, 2.0], [3.0, 0.0]],
        "effective_rank": [1.89, 1.0],
        "similarity": [[1.0, 0.125], [0.125, 1.0]],
        "neighbours": [
            {
                "item": "<i>50",
                "events": 4321,
                "nearest": [{"item": "7", "similarity": 0.914}, {"item": "9", "similarity": 0.5}],
            }
        ],
        "ranking": {"users": 3000, "all_views": 0.19, "ndcg@10": [0.18, 0.175]},
        "routing": {"blocks": [1], "view": groups, "popularity": groups, "position": groups},
        "time_weights": [[0.01 * place for place in range(129)]],
        "position_weights": [[0.5, 0.25]],
    }
