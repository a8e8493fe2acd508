"""The command ``mme serve``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from mme.errors import UserError
from mme.run.exit_status import job_status

SERVING_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of a run, or an export of its weights.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one and prints it.")
    ] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum histories per batch.")] = 64,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds that the first request of a batch waits for others.")
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

    Example:

        mme serve --run runs/quickstart --port 8000
    """
    with job_status():
        missing = [name for name in SERVING_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"mme serve needs {', '.join(missing)}, which is not installed: `pip install 'mme[serve]'`")
        import mme
        from mme.inference.run import version_of
        from mme.serve.app import ServeSettings, create_app
        from mme.serve.holder import ModelHolder
        from mme.serve.server import listen

        holder = ModelHolder(run, version_of, mme.load)
        listen(create_app(holder, ServeSettings(max_batch, max_wait_ms, max_waiting, reload_every_s)), host, port)
