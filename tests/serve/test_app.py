"""`mme serve`: the same lists over HTTP, a status for each error, shared batches, and reloads without lost requests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from safetensors import safe_open
from safetensors.torch import load, save

import mme
from mme.cli import main
from mme.inference.exported import NAME, with_sum
from mme.inference.model import TrainedModel
from mme.inference.run import version_of
from mme.serve.app import ServeSettings, create_app
from mme.serve.holder import ModelHolder
from tests.trained import REPOSITORY, Trained, train_small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_small(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def model(trained: Trained) -> TrainedModel:
    return mme.load(trained.run, device="cpu")


def client_of(path: Path, **settings: Any) -> TestClient:
    holder = ModelHolder(path, version_of, lambda found: mme.load(found, device="cpu"))
    return TestClient(create_app(holder, ServeSettings(**{"reload_every_s": 0.0, **settings})))


@pytest.fixture
def client(trained: Trained) -> Iterator[TestClient]:
    with client_of(trained.run) as client:
        yield client


def rows_of(trained: Trained, count: int) -> list[dict[str, Any]]:
    return trained.users().slice(0, count).to_pylist()


def test_lists_over_http_equal_those_of_the_model(client: TestClient, trained: Trained, model: TrainedModel) -> None:
    rows = rows_of(trained, 5)
    body = {"histories": rows, "k": 4, "blocked": [model.item_ids[0].as_py()]}
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 200
    results = answer.json()["results"]
    expected = model.recommend(rows, k=4, blocked=body["blocked"]).to_pylist()
    assert [each["item_ids"] for each in results] == [each["item_ids"] for each in expected]
    assert [each["user_id"] for each in results] == [row["user_id"] for row in rows]
    assert answer.json()["model"] == model.name
    assert client.get("/health").json() == {"status": "ok", "model": model.name, "items": 60}
    metrics = client.get("/metrics").text
    assert 'mme_requests_total{status="200"} 1.0' in metrics and "mme_batch_histories_count 1.0" in metrics
    assert "/recommend" in client.get("/openapi.json").json()["paths"]


HISTORY = {"item_ids": [1000], "timestamps": [1_600_000_000]}


def test_the_request_time_is_optional_per_history(client: TestClient, trained: Trained) -> None:
    first, second = ({**row, "request_timestamp": row["timestamps"][-1]} for row in rows_of(trained, 2))
    expected = client.post("/recommend", json={"histories": [first, second]}).json()["results"]
    del first["request_timestamp"]
    answer = client.post("/recommend", json={"histories": [first, second]})
    assert answer.status_code == 200 and answer.json()["results"] == expected
    answer = client.post("/recommend", json={"histories": [{**first, "request_timestamp": None}, second]})
    assert answer.json()["results"] == expected


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "histories"]),
        ({"histories": []}, ["body", "histories"]),
        ({"histories": [HISTORY], "k": 0}, ["body", "k"]),
        ({"histories": [HISTORY], "k": "many"}, ["body", "k"]),
        ({"histories": [HISTORY], "file": "/etc/passwd"}, ["body", "file"]),
        ({"histories": [{"item_ids": [1000]}]}, ["body", "histories", 0, "timestamps"]),
        ({"histories": [{**HISTORY, "timestamps": [1, 2]}]}, ["body", "histories", 0]),
        ({"histories": [{**HISTORY, "timestamps": ["x"]}]}, ["body", "histories", 0, "timestamps", 0]),
        ({"histories": [{**HISTORY, "item_ids": [{"a": 1}]}]}, ["body", "histories", 0, "item_ids", 0]),
        ({"histories": [{**HISTORY, "timestamps": [1_600_000_000_000]}]}, ["body", "histories"]),
        ({"histories": [{**HISTORY, "item_ids": [-1]}], "unknown": "refuse"}, ["body", "histories"]),
        ({"histories": [HISTORY], "candidates": ["x"]}, ["body", "histories"]),
        ({"histories": [{**HISTORY, "item_ids": [10**30]}]}, ["body", "histories"]),
    ],
)
def test_a_wrong_request_gets_422_and_names_the_field(client: TestClient, body: Any, place: list[Any]) -> None:
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 422
    found = answer.json()["detail"][0]["loc"]
    assert found[: len(place)] == place
    assert client.post("/recommend", json={"histories": [HISTORY]}).status_code == 200


def test_malformed_requests_are_rejected(trained: Trained) -> None:
    with client_of(trained.run, max_body_bytes=2_000) as client:
        assert (
            client.post("/recommend", content=b"\xff{", headers={"content-type": "application/json"}).status_code == 422
        )
        large = client.post("/recommend", json={"histories": [HISTORY] * 100})
        assert large.status_code == 413 and "expected at most 2000" in large.json()["detail"]
        chunked = client.post("/recommend", content=iter([b"{}"]))
        assert chunked.status_code == 411
        assert client.get("/recommend").status_code == 405
        assert client.get("/../../etc/passwd").status_code == 404


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ('{"histories": [{"item_ids": [NaN], "timestamps": [1]}]}', ["body", "histories", 0, "item_ids", 0]),
        ('{"histories": [], "\\ud800": 1}', ["body"]),
        ('{"histories": [{"user_id": "\\ud800", "item_ids": [1000], "timestamps": [1]}]}', ["body", "histories"]),
        ("[" * 100_000, ["body"]),
    ],
)
def test_values_that_are_no_json_or_text_get_422(client: TestClient, body: str, place: list[Any]) -> None:
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert any(each["loc"][: len(place)] == place for each in answer.json()["detail"])


def test_an_answer_names_a_few_errors_and_repeats_no_values(client: TestClient) -> None:
    wrong = {"item_ids": [[7]] * 1000, "timestamps": [1] * 1000}
    answer = client.post("/recommend", json={"histories": [wrong]})
    assert answer.status_code == 422 and len(answer.json()["detail"]) == 10
    assert {name for each in answer.json()["detail"] for name in each} == {"loc", "msg", "type"}


def test_a_full_queue_gets_503(trained: Trained) -> None:
    with client_of(trained.run, max_waiting=2) as client:
        full = client.post("/recommend", json={"histories": [HISTORY] * 3})
        assert full.status_code == 503 and full.headers["retry-after"] == "1"
        assert client.post("/recommend", json={"histories": [HISTORY] * 2}).status_code == 200


def test_many_clients_share_batches_and_a_wrong_request_affects_no_other(
    client: TestClient, trained: Trained, model: TrainedModel
) -> None:
    rows = rows_of(trained, 24)
    bodies: list[dict[str, Any]] = [
        {"histories": [row], "k": 3 + n % 4, "exclude_seen": n % 3 > 0} for n, row in enumerate(rows)
    ]
    wrong = {"histories": [{**HISTORY, "timestamps": [1_600_000_000_000]}]}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: client.post("/recommend", json=body), [*bodies, *[wrong] * 4]))
    assert [answer.status_code for answer in answers] == [200] * len(rows) + [422] * 4
    for body, answer in zip(bodies, answers, strict=False):
        expected = model.recommend(body["histories"], k=body["k"], exclude_seen=body["exclude_seen"])
        assert answer.json()["results"][0]["item_ids"] == expected["item_ids"].to_pylist()[0]


def under_another_name(path: Path) -> bytes:
    """The export with another name of its model."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata[NAME] = metadata[NAME].replace("@step_", "@STEP_")
    tensors = load(path.read_bytes())
    return save(tensors, with_sum(tensors, metadata))


def replace(path: Path, content: bytes) -> None:
    """Replaces a file at once, as a deployment does."""
    newer = path.with_name("newer")
    newer.write_bytes(content)
    newer.replace(path)


def test_a_newer_export_is_loaded_and_a_damaged_one_is_not(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert main(["export", "--run", str(trained.run), "--what", "weights", "--output", str(path)]) == 0
    holder = ModelHolder(path, version_of, lambda found: mme.load(found, device="cpu"))
    before = holder.name
    assert holder.reload() is None
    renamed = under_another_name(path)
    replace(path, renamed)
    assert holder.reload() == "loaded" and holder.name == before.replace("@step_", "@STEP_")
    replace(path, renamed[:1000])
    assert holder.reload() == "failed" and holder.reload() is None
    assert holder.name.endswith(before.rpartition("_")[2]) and holder.num_items == 60


@pytest.mark.slow
def test_the_server_reloads_during_requests_and_stops_on_request(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert main(["export", "--run", str(trained.run), "--what", "weights", "--output", str(path)]) == 0
    command = [sys.executable, "-m", "mme", "serve", "--run", str(path), "--port", "0", "--reload-every-s", "0.2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert server.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert found
        address = found[0]

        def ask(number: int) -> tuple[int, str]:
            if number == 20:
                replace(path, under_another_name(path))
            answer = httpx.post(f"{address}/recommend", json={"histories": [HISTORY]}, timeout=60)
            return answer.status_code, answer.json().get("model", "")

        models = set()
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, 2_000, 40):
                answers = list(pool.map(ask, range(start, start + 40)))
                assert {status for status, _ in answers} == {200}
                models |= {name for _, name in answers}
                if len(models) == 2:
                    break
        assert len(models) == 2
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM, 143)


def test_an_address_in_use_is_refused_in_one_line(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--run", str(trained.run), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--port {port}: Address already in use" in error
