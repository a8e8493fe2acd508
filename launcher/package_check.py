"""Compares installed packages with the pins and finds packages that overwrite each other's modules."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, packages_distributions, version

from launcher.findings import Finding
from mme.shipped import shipped

MODULES = ("torch", "triton", "fbgemm_gpu", "torchrec", "deepspeed")


def check_packages(stack: str) -> list[Finding]:
    """Checks the packages against the pins of ``stack``: cpu or cuda."""
    pins = (line.partition("==") for line in shipped(f"requirements/{stack}.txt").read_text().splitlines())
    findings = [_version(name, pinned, f"requirements/{stack}.txt") for name, _, pinned in pins if pinned]
    return [*findings, *_overwritten(), _foreign_kernels()]


def _version(name: str, pinned: str, source: str) -> Finding:
    """Another release of the same series is a warning. Another series fails: it is untested and linked differently."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "failed", "not installed", f"run `make setup` ({source})")
    release = found.partition("+")[0]
    if release == pinned:
        return Finding(name, "ok", found)
    same_series = release.split(".")[:2] == pinned.split(".")[:2]
    advice = f"`make setup` installs the tested version, which the other packages are built for ({source})"
    return Finding(name, "warning" if same_series else "failed", f"{found}, expected {pinned}", advice)


def _overwritten() -> list[Finding]:
    """Modules that several installed packages provide, such as fbgemm-gpu and fbgemm-gpu-cpu, whose files then mix."""
    owners = {module: sorted(set(names)) for module, names in packages_distributions().items() if module in MODULES}
    return [
        Finding(
            module,
            "failed",
            f"{' and '.join(f'{name} {version(name)}' for name in names)} both install the module {module}",
            f"their files are mixed: `python -m pip uninstall {' '.join(names)}`, then `make setup`",
        )
        for module, names in owners.items()
        if len(names) > 1
    ]


def _foreign_kernels() -> Finding:
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return Finding("kernels", "ok", "no foreign package of that name")
    advice = "it shadows this project's package kernels: `python -m pip uninstall kernels`"
    return Finding("kernels", "failed", f"foreign package kernels {found}", advice)
