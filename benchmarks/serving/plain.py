"""A server as one would write it without this project: FastAPI and PyTorch, one request at a time.

    python -m benchmarks.serving.plain --run model.safetensors [--index model.faiss]

A handler validates the body, turns its history into tensors, runs the model's module in eager mode on a batch of one without
padding, multiplies the state with all item vectors, excludes the items of the history and takes `topk`; with an index it
searches that instead. It answers the same JSON as `mme serve` for a body with one history. Requests wait for each other in
the event loop, which keeps PyTorch's threads free of contention. There is no check of times or units, and no metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import faiss
import torch
import typer
from fastapi import FastAPI
from pydantic import BaseModel
from torch import Tensor

import mme
from mme.serve.server import listen

# ruff: noqa: UP045  (typer on Python 3.10)


class History(BaseModel):
    item_ids: list[int]
    timestamps: list[int]
    request_timestamp: int


class Body(BaseModel):
    histories: list[History]
    k: int = 10


def create_app(run: Path, index: Path | None) -> FastAPI:
    model = mme.load(run, device="cpu")
    encoder, longest = model.padded_encoder(), model.config.history_len
    vectors = torch.from_numpy(model.item_embeddings())
    ids = model.item_ids.to_pylist()
    place = {item: index for index, item in enumerate(ids)}
    searched = faiss.read_index(str(index)) if index else None
    app = FastAPI()

    def search(state: Tensor, seen: list[int], k: int) -> tuple[list[int], list[float]]:
        if searched is None:
            every = state @ vectors.T
            every[0, seen] = -torch.inf
            best = every[0].topk(k)
            return best.indices.tolist(), best.values.tolist()
        scores, items = searched.search(state.numpy(), k + len(seen))
        without = {-1, *seen}  # −1: not found
        kept = [column for column, item in enumerate(items[0].tolist()) if item not in without][:k]
        return items[0, kept].tolist(), scores[0, kept].tolist()

    @app.post("/recommend")
    async def recommend(body: Body) -> dict[str, Any]:
        results = []
        for history in body.histories:
            seen = [place[item] for item in history.item_ids]
            items = torch.tensor([seen[-longest:]])
            times = torch.tensor([[*history.timestamps[-longest:], history.request_timestamp]])
            with torch.inference_mode():
                state = encoder(items, torch.tensor([items.shape[1]]), times)
                found, scores = search(state, seen, body.k)
            results.append({"item_ids": [ids[item] for item in found], "scores": scores})
        return {"results": results}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def main(
    run: Annotated[Path, typer.Option(help="Exported weights.")],
    index: Annotated[Optional[Path], typer.Option(help="Index of their items. Default: score every item.")] = None,
    port: int = 0,
) -> None:
    """Serves until a signal."""
    listen(create_app(run, index), "127.0.0.1", port)


if __name__ == "__main__":
    typer.run(main)
