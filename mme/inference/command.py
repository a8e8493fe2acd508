"""The command ``mme export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from mme.run.exit_status import job_status

# typer reads these annotations at run time; on Python 3.10 it needs Optional[X] for a value that may be missing.
# ruff: noqa: UP045


def export(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of a run, or an export of its weights.")],
    what: Annotated[
        Literal["weights", "items", "users", "index", "model", "compiled"],
        typer.Option(
            help="weights: a safetensors file; items, users: vectors by raw id in Parquet; index: faiss; model: the encoder by "
            "torch.export; compiled: by AOTInductor."
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="File to write, with a manifest beside it.")],
    checkpoint: Annotated[
        Optional[int],
        typer.Option(metavar="STEP", help="Step of the checkpoint. Default: the best on the validation split."),
    ] = None,
    exact: Annotated[
        Optional[bool],
        typer.Option(help="Index with exact or HNSW search. Default: exact up to 50,000 items."),
    ] = None,
) -> None:
    """Export a trained model for other programs and print the manifest as JSON.

    The written file is read back and compared with the checkpoint before it gets its final name.

    Examples:

        mme export --run runs/quickstart --what weights --output quickstart.safetensors

        mme export --run runs/quickstart --what items --output items.parquet
    """
    with job_status():
        import mme
        from mme.inference.export import export as write_export

        model = mme.load(run, checkpoint=checkpoint)
        print(json.dumps(write_export(model, what, output, exact), indent=2))
