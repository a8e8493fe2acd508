"""Installs the packages mme, kernels and launcher and their commands.

Dependencies are pinned in requirements/ and installed by scripts/setup_environment.sh (`make setup`), which chooses the
CPU or the CUDA build; a dependency list here could not.
"""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    name="mme",
    version="0.1.0",
    description="Trains Fuxi-MME, a sequential recommender with multiple embeddings and a mixture of experts",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["mme", "mme.*", "kernels", "kernels.*", "launcher", "launcher.*"]),
    entry_points={
        "console_scripts": [
            "mme = mme.cli:main",
            "mme-launch = launcher.__main__:main",
        ]
    },
)
