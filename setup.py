"""Installs the packages mme, kernels and launcher and their commands.

`make setup` installs the pinned environment of requirements/. `pip install .` uses this file instead: it lists version ranges
for each extra, and puts configurations and pins into the wheel, so that the commands work outside a checkout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

TRAINING = [  # torchrec's dependencies except FBGEMM; the CPU build installs torchrec without its dependencies
    "deepspeed>=0.19.8",
    "iopath>=0.1.10",
    "pyre-extensions>=0.0.32",
    "tensordict>=0.10",
    "torchmetrics>=1.0.3",
    "tqdm>=4.60",
]


class BuildWithShippedFiles(build_py):
    """Copies configurations and pins to `mme/shipped_files`, where `mme.shipped` looks for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout contains the files
            return
        for folder, pattern in (("configs", "*.yaml"), ("requirements", "*.txt")):
            target = Path(self.build_lib) / "mme" / "shipped_files" / folder
            target.mkdir(parents=True, exist_ok=True)
            for file in (ROOT / folder).glob(pattern):
                shutil.copy(file, target)


setup(
    name="mme",
    version="0.1.0",
    description="Trains Fuxi-MME, a sequential recommender with multiple embeddings and a mixture of experts",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Paper (Fuxi-MME)": "https://arxiv.org/abs/2510.25285",
        "Paper (FuXi-α)": "https://arxiv.org/abs/2502.03036",
    },
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["mme", "mme.*", "kernels", "kernels.*", "launcher", "launcher.*"]),
    package_data={
        "mme": ["py.typed"],
        "kernels": ["py.typed"],
        "launcher": ["py.typed"],
        "mme.report": ["assets/*", "templates/*"],
    },
    cmdclass={"build_py": BuildWithShippedFiles},
    install_requires=[
        "altair>=5.5",
        "duckdb>=1.5",
        "Jinja2>=3.1",
        "numpy>=2.0,<2.4",  # Triton 3.6's interpreter fails with 2.4
        "omegaconf>=2.3",
        "psutil>=5.9",
        "pyarrow>=20",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.11",
        "tensorboard>=2.18",
        "torch>=2.11,<2.14",
        "typer>=0.16",
    ],
    extras_require={
        "cpu": ["fbgemm-gpu-cpu==1.8.0", "torch==2.13.0", "triton==3.7.1", *TRAINING],
        "cuda": ["fbgemm-gpu==1.6.0", "torch==2.11.0", "torchrec==1.6.1", "triton==3.6.0", *TRAINING],
        "serve": ["faiss-cpu>=1.9", "fastapi>=0.110", "prometheus-client>=0.20", "uvicorn>=0.30"],
        "tune": ["optuna>=4"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["alembic>=1.10", "mlflow-skinny>=3", "SQLAlchemy>=2"],
        "dev": [
            "flask-cors>=4",  # and Flask, with which moto runs as a server
            "hypothesis>=6",
            "mypy>=2",
            "mkdocs>=1.6",
            "mkdocstrings[python]>=1",
            "moto[s3]>=5",
            "pytest>=8",
            "pytest-timeout>=2",
            "ruff>=0.17",
            "vl-convert-python>=1.9",
        ],
    },
    entry_points={
        "console_scripts": [
            "mme = mme.cli:main",
            "mme-launch = launcher.__main__:main",
        ]
    },
)
