"""Makes a model repository for NVIDIA Triton Inference Server from an exported encoder.

    mme export --run runs/quickstart --what model --output quickstart.pt2
    python examples/triton/make_repository.py quickstart.pt2 triton_models --name quickstart
    tritonserver --model-repository triton_models

The Python backend fits this program: its batches take histories of any length, while Triton's platform for packages of
AOTInductor (`torch_aoti`) has no batches yet. PyTorch of the version in the manifest must be installed in the server's Python.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

MODEL_FILE = Path(__file__).with_name("model.py")
MAX_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a Triton model repository from an exported encoder.")
    parser.add_argument("export", type=Path, help="file written by mme export --what model or compiled")
    parser.add_argument("repository", type=Path, help="folder of the model repository")
    parser.add_argument("--name", default="fuxi_mme", help="name of the model (default: %(default)s)")
    parser.add_argument("--version", type=int, default=1, help="number of the version (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        make_repository(arguments.export, arguments.repository, arguments.name, arguments.version)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def make_repository(export: Path, repository: Path, name: str, version: int = 1) -> None:
    """Writes NAME/config.pbtxt and NAME/VERSION with the program, its manifest, its items and the Python model.

    Raises:
        OSError: a file is missing or cannot be written.
        ValueError: the export is not an encoder.
    """
    manifest_file = export.with_name(f"{export.name}.manifest.json")
    manifest = json.loads(manifest_file.read_text())
    if "shapes" not in manifest:
        raise ValueError(f"{manifest_file}: of an export of {manifest.get('what')!r}, expected 'model' or 'compiled'")
    folder = repository / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("", ".items.parquet", ".manifest.json"):
        shutil.copyfile(export.with_name(export.name + suffix), folder / f"model.pt2{suffix}")
    shutil.copyfile(MODEL_FILE, folder / "model.py")
    (folder.parent / "config.pbtxt").write_text(config_of(manifest, name))


def config_of(manifest: dict[str, Any], name: str) -> str:
    """The text of config.pbtxt: a tensor per input of the program and its states, without the dimension of the batch."""
    inputs = ",\n".join(_tensor(each, manifest["shapes"][each], "TYPE_INT64") for each in manifest["inputs"])
    states = _tensor("states", manifest["shapes"]["states"], "TYPE_FP32")
    kind = "KIND_GPU" if manifest["device"] == "cuda" else "KIND_CPU"
    return f"""name: "{name}"
backend: "python"
max_batch_size: {MAX_BATCH}
input [
{inputs}
]
output [
{states}
]
instance_group [ {{ count: 1 kind: {kind} }} ]
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
"""


def _tensor(name: str, shape: list[int], kind: str) -> str:
    dims = shape[1:] or [1]  # Triton has no tensors of rank 0
    ragged = " allow_ragged_batch: true" if -1 in dims else ""
    return f'  {{ name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, dims))} ]{ragged} }}'


if __name__ == "__main__":
    main()
