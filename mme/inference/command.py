"""The command ``mme export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from mme.run.exit_status import job_status

# typer reads the annotations and Python 3.10 shows Optional[X] and X | None to it alike.
# ruff: noqa: UP045


def export(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of a run, or an export of its weights.")],
    what: Annotated[
        Literal["weights", "items", "users", "index"],
        typer.Option(help="weights: one safetensors file; items, users: vectors by raw id in Parquet; index: faiss."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="File to write; a manifest is written beside it.")],
    checkpoint: Annotated[
        Optional[int], typer.Option(metavar="STEP", help="Default: the best on the validation split.")
    ] = None,
    exact: Annotated[
        Optional[bool],
        typer.Option(help="Of an index: search every item, or by HNSW. Default: exact up to 50,000 items."),
    ] = None,
) -> None:
    """Export a trained model for other programs and print the manifest as JSON.

    What was written is read back and compared with the checkpoint before it takes its name.

    Examples:

        mme export --run runs/quickstart --what weights --output quickstart.safetensors

        mme export --run runs/quickstart --what items --output items.parquet
    """
    with job_status():
        import mme
        from mme.inference.export import export as write_export

        model = mme.load(run, checkpoint=checkpoint)
        print(json.dumps(write_export(model, what, output, exact), indent=2))
