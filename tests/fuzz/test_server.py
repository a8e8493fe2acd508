"""Requests to `mme serve` that are changed at random get the model's lists or a status that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import mme
from mme.inference.run import version_of
from mme.serve.app import RecommendBody, ServeSettings, create_app
from mme.serve.holder import ModelHolder
from tests.fuzz.bench import Bench, in_time
from tests.fuzz.mutations import TEXTS, change_bytes, change_value

BODY: dict[str, Any] = {
    "histories": [
        {"user_id": 5, "item_ids": [3, 17, 4], "timestamps": [1_600_000_000, 1_600_000_600, 1_600_086_400]},
        {"item_ids": [2, 2], "timestamps": [1_600_000_000, 1_600_000_000]},
    ],
    "k": 5,
    "exclude_seen": True,
    "candidates": [1, 2, 3, 5, 8, 13, 21],
    "blocked": [8],
    "unknown": "skip",
}
PLACES = [*["/recommend"] * 20, "/health", "/metrics", "/openapi.json", "/docs", "/../config.yaml", "/recommend/"]

pytestmark = pytest.mark.slow


def test_requests(bench: Bench, trained: Path) -> None:
    holder = ModelHolder(trained / "run", version_of, lambda found: mme.load(found, device="cpu"))
    model = mme.load(trained / "run", device="cpu")
    with TestClient(create_app(holder, ServeSettings(reload_every_s=0.0, max_body_bytes=20_000))) as client:
        for rng, _ in bench.cases():
            body = BODY
            for _ in range(rng.choice([1, 1, 2, 3])):
                body = change_value(rng, body)
            content = json.dumps(body).encode()
            if rng.randrange(3) == 0:
                content = change_bytes(rng, content)
            headers = {
                "content-type": rng.choice(["application/json"] * 8 + ["text/plain", "application/json; charset=x"])
            }
            if rng.randrange(10) == 0:
                headers["content-length"] = rng.choice(["0", "-1", "1e9", "9" * 30, "x", "\u00b2"])
            if rng.randrange(10) == 0:
                headers["x-name"] = rng.choice(TEXTS).decode("latin-1").replace("\n", "").replace("\r", "")
            path, method = rng.choice(PLACES), rng.choice(["POST"] * 12 + ["GET", "PUT", "DELETE"])
            with in_time():
                sent = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
                answer = client.request(method, path, content=content, headers=sent)
            bench.succeeded += answer.status_code == 200
            bench.refused += answer.status_code != 200
            assert answer.status_code in (200, 307, 404, 405, 411, 413, 422), (answer.status_code, answer.text)
            if answer.status_code == 422:
                assert all(each["loc"] and each["msg"] for each in answer.json()["detail"]), answer.text
            if answer.status_code == 200 and path == "/recommend" and "content-length" not in headers:
                check_lists(model, content, answer.json())
        answer = client.post("/recommend", json=BODY)
        assert answer.status_code == 200, answer.text


def check_lists(model: Any, content: bytes, answer: dict[str, Any]) -> None:
    body = RecommendBody.model_validate(json.loads(content))
    expected = model.recommend(
        [history.model_dump(exclude_none=True) for history in body.histories],
        body.k,
        body.exclude_seen,
        body.candidates,
        body.unknown,
        body.blocked,
    )
    assert [each["item_ids"] for each in answer["results"]] == expected["item_ids"].to_pylist()
    assert [each["scores"] for each in answer["results"]] == expected["scores"].to_pylist()
    assert answer["model"] == model.name
