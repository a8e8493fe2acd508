"""The command ``mme serve``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Optional

import typer

from mme.errors import UserError
from mme.run.exit_status import job_status

# typer reads these annotations at run time; on Python 3.10 it needs Optional[X] for a value that may be missing.
# ruff: noqa: UP045

SERVING_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of a run, or an export of its weights.")],
    index: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE", help="Index of this model, by mme export --what index. Default: score every item."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one and prints it.")
    ] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum histories per batch.")] = 64,
    max_wait_ms: Annotated[
        float,
        typer.Option(min=0, help="Milliseconds that a batch waits for more requests if the last one had several."),
    ] = 2.0,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum waiting histories; further requests get 503.")
    ] = 2_048,
    reload_every_s: Annotated[
        float, typer.Option(min=0, help="Seconds between checks for a newer model; 0: never.")
    ] = 5.0,
) -> None:
    """Serve recommendations over HTTP: POST /recommend, GET /health, /metrics and /docs.

    Requests of all clients are collected into batches. A better checkpoint, or a newer export with the same name, is loaded
    without interrupting the service. The server has no authentication: put it behind a proxy that has.

    Examples:

        mme serve --run runs/quickstart --port 8000

        mme serve --run model.safetensors --index model.faiss
    """
    with job_status():
        missing = [name for name in SERVING_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"mme serve needs {', '.join(missing)}, which is not installed: `pip install 'mme[serve]'`")
        import mme
        from mme.distributed.world import keep_freed_memory
        from mme.inference.run import version_of
        from mme.serve.app import ServeSettings, create_app
        from mme.serve.holder import ModelHolder
        from mme.serve.server import listen

        def version(path: Path) -> tuple[int, ...]:
            return version_of(path) + (version_of(index) if index else ())

        keep_freed_memory()
        holder = ModelHolder(run, version, lambda path: mme.load(path, index=index))
        listen(create_app(holder, ServeSettings(max_batch, max_wait_ms, max_waiting, reload_every_s)), host, port)
