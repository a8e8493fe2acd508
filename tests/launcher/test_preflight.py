"""`launcher preflight` on this node with two processes, and its findings when the test breaks something."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher import node_check, package_check, preflight
from launcher.findings import Finding, read_lines
from launcher.job import Job
from mme.distributed.world import World
from mme.shipped import shipped
from tests.distributed.processes import run_on
from tests.launcher.command_line import CONFIG, REPOSITORY, launch, the_error
from tests.ports import free_port


@pytest.mark.slow
def test_this_node_and_a_group_of_two_pass(tmp_path: Path) -> None:
    arguments = ["--nproc-per-node", "2", "--output-dir", tmp_path / "runs"]
    done = launch("preflight", *arguments, timeout=300, COLUMNS="160")
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    rows = {row[1].strip(): row[2].strip() for row in cells}
    for check in ["load fbgemm_gpu", "table lookup on cpu", "matrix product on cpu", "all-reduce", "all-to-all"]:
        assert rows[check] == "ok"
    assert rows["clocks"] == rows["shared folder"] == "ok"
    assert rows["links"] in ("ok", "warning")  # depends on the machine's load
    assert done.stdout.splitlines()[-1].endswith(" 0 failed")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_two_nodes_without_a_shared_folder_fail(tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    arguments = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", endpoint, "--output-dir"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "launcher", "preflight", *arguments, tmp_path / f"node{node}"],
            cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], outputs
    for output in outputs:
        assert "shared folder" in output and "does not see in" in output, output
        assert "checkpoints need a folder that all nodes share" in output
        assert output.splitlines()[-1].endswith(" 1 failed")


def test_dry_run_prints_the_processes_it_would_start() -> None:
    done = launch("preflight", "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29412", "--dry-run")
    node, group = map(shlex.split, done.stdout.splitlines())
    assert node[1:] == ["-m", "launcher.node_check"]
    assert group[-3:] == ["-m", "launcher.group_check", "runs"]
    assert group[group.index("--nnodes") + 1] == "2"


def test_wrong_arguments_are_rejected() -> None:
    assert "needs --rdzv-endpoint HOST:PORT" in the_error(launch("preflight", "--nnodes", "2"))
    assert "expected --config FILE" in the_error(launch("preflight", "train.steps=3"))
    missing = launch("preflight", "--config", CONFIG, "data.path=nowhere")
    assert "nowhere/dataset.json: num_items cannot be read" in the_error(missing)


# Packages and libraries.


def pretend_installed(folder: Path, name: str, version: str, modules: str = "") -> None:
    """Writes the metadata of an installed package, as pip would."""
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "top_level.txt").write_text(modules)


@pytest.mark.parametrize("name", ["torch", "triton", "fbgemm-gpu-cpu", "torchrec", "deepspeed"])
def test_a_version_of_another_series_fails_and_of_the_same_warns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = dict(line.split("==") for line in shipped("requirements/cpu.txt").read_text().split() if "==" in line)
    monkeypatch.syspath_prepend(str(tmp_path / "patch"))
    pretend_installed(tmp_path / "patch", name, f"{pins[name].rpartition('.')[0]}.99")
    (finding,) = [finding for finding in package_check.check_packages("cpu") if finding.check == name]
    assert (finding.status, finding.found) == ("warning", f"{pins[name].rpartition('.')[0]}.99, expected {pins[name]}")
    monkeypatch.syspath_prepend(str(tmp_path / "series"))
    pretend_installed(tmp_path / "series", name, "0.1.0")
    (finding,) = [finding for finding in package_check.check_packages("cpu") if finding.check == name]
    assert finding.status == "failed"
    assert "`make setup` installs the tested version" in finding.advice


def test_two_packages_that_install_one_module_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(tmp_path, "fbgemm-gpu", "1.8.0", modules="fbgemm_gpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = [finding for finding in package_check.check_packages("cpu") if finding.check == "fbgemm_gpu"]
    assert finding.status == "failed"
    assert finding.found.startswith("fbgemm-gpu 1.8.0 and fbgemm_gpu-cpu ")
    assert "uninstall fbgemm-gpu fbgemm_gpu-cpu" in finding.advice


def test_a_foreign_package_named_kernels_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(tmp_path, "kernels", "0.11.5")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = [finding for finding in package_check.check_packages("cpu") if finding.check == "kernels"]
    assert finding.status == "failed"
    assert "0.11.5" in finding.found
    assert "uninstall kernels" in finding.advice


def check_this_node(folder: Path, *, path: str = "") -> dict[str, Finding]:
    """Runs `launcher.node_check` with the modules of ``folder`` first in the path, and the programs of ``path``."""
    done = subprocess.run(
        # `-m` would put the project first in the path.
        [sys.executable, "-c", "from launcher.node_check import main; main()"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}", "PATH": f"{path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return {finding.check: finding for finding in read_lines(done.stdout)}


@pytest.mark.slow
def test_a_foreign_kernels_that_is_imported_and_a_torch_without_the_gpus_fail(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    (tmp_path / "bin").mkdir()
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    driver.chmod(0o755)
    findings = check_this_node(tmp_path, path=str(tmp_path / "bin"))
    assert findings["load kernels"].status == "failed"
    assert f"imported, from {tmp_path}/kernels" in findings["load kernels"].found
    assert findings["GPUs of PyTorch"].status == "failed"
    assert "sees 0 of the 1 GPUs" in findings["GPUs of PyTorch"].found
    assert findings["table lookup on cpu"].status == findings["matrix product on cpu"].status == "ok"


def test_a_library_built_against_another_torch_fails(tmp_path: Path) -> None:
    (tmp_path / "fbgemm_gpu.py").write_text("raise ImportError('fbgemm_gpu.so: undefined symbol: _ZN3c105ErrorE')")
    findings = check_this_node(tmp_path)
    assert findings["load fbgemm_gpu"].status == "failed"
    assert "undefined symbol" in findings["load fbgemm_gpu"].found
    assert "built for each other" in findings["load fbgemm_gpu"].advice


def test_a_process_that_crashes_without_a_message_is_a_failed_check() -> None:
    code = "import os; print('loading fbgemm_gpu', flush=True); os.kill(os.getpid(), 11)"
    job = Job(Path("x"), (), 1, 2, 0)
    (finding,) = preflight._checks_of([sys.executable, "-c", code], "training stack", job)
    assert finding.status == "failed"
    assert finding.found == "ended with status -11 while loading fbgemm_gpu"


# Device.


def test_a_device_with_wrong_or_unrepeatable_results_fails() -> None:
    cpu = torch.device("cpu")
    assert node_check.matrix_product(cpu).status == "ok"

    def one_number_wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[3, 5] += 1  # entries are as large as 150
        return product

    finding = node_check.matrix_product(cpu, one_number_wrong)
    assert finding.status == "failed"
    assert finding.found.startswith("float64 is off by more than 1e-13")
    assert "exclude this node from the job" in finding.advice

    flips = iter(range(1000))

    def last_bit_flips(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[3, 5] *= 1 + next(flips) % 2 * torch.finfo(product.dtype).eps
        return product

    finding = node_check.matrix_product(cpu, last_bit_flips)
    assert finding.status == "failed"
    assert "products of the same matrices differ" in finding.found


# Memory, disk, folder.


def test_memory_and_disk_are_checked_for_the_configured_job() -> None:
    small = preflight.needs_of(Job(Path(CONFIG), (), 1, 2, 0), items=1000)
    assert preflight._memory(2, small).status == preflight._disk(Path("runs"), small).status == "ok"
    large = preflight.needs_of(Job(Path(CONFIG), ("model.embedding_dim=64",), 1, 2, 0), items=2_000_000_000)
    memory, disk = preflight._memory(2, large), preflight._disk(Path("runs"), large)
    assert memory.status == disk.status == "failed"
    # Tables of 2·10⁹ × 64 floats with Adam's two moments take 1.4 TiB, both in training and in the checkpoint copy.
    assert "checkpoint copy 1430" in memory.found
    assert "GiB too little: use more nodes" in memory.advice
    assert "train.keep_checkpoints" in disk.advice


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_predicted(tmp_path: Path) -> None:
    from launcher.memory import whole_checkpoint_bytes
    from launcher.shape import Shape
    from mme.config import load_config

    for optimizer in ("adam", "rowwise_adagrad"):
        config = load_config(REPOSITORY / CONFIG, [f"train.table_optimizer={optimizer}"])
        (written,) = run_on(1, bytes_of_state, config, 3000)
        assert whole_checkpoint_bytes(Shape(config, 4, 4, 3000)) == pytest.approx(written, rel=0.001)


def bytes_of_state(world: World, config: object, num_items: int) -> int:
    from mme.distributed.engine import initialize_engine
    from mme.distributed.recommender import Recommender
    from mme.distributed.state import optimizer_pieces, weight_pieces

    recommender = Recommender(config, num_items, world)  # type: ignore[arg-type]
    initialize_engine(recommender.decoder, config)  # type: ignore[arg-type]
    return sum(piece.read().nbytes for piece in [*weight_pieces(recommender), *optimizer_pieces(recommender)])


def test_available_memory_respects_a_containers_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**28}\n")
    files = [(str(tmp_path / "memory.max"), str(tmp_path / "memory.current"))]
    monkeypatch.setattr(preflight, "CONTROL_GROUP_FILES", files)
    assert preflight._memory(2, None).found == "768 MiB available"
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight._available_memory() > 2**30


def test_a_folder_that_cannot_be_made_fails_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = preflight._writable(tmp_path / "file" / "runs")
    assert finding.status == "failed"
    assert "Not a directory" in finding.found
    assert "--output-dir" in finding.advice
