"""The optional packages that commands need, and how to install a missing one."""

from __future__ import annotations

import importlib.util

from mme.errors import UserError

TRAINING_PACKAGES = ("fbgemm_gpu", "torchrec", "deepspeed")
HOW = (
    "`pip install 'mme[cuda]'` on a machine with NVIDIA GPUs; without one `pip install 'mme[cpu]'`, then "
    "`pip install --no-deps torchrec==1.8.0`; in a checkout `make setup`"
)


def require_training_packages() -> None:
    """Raises UserError if TorchRec, FBGEMM or DeepSpeed is not installed."""
    missing = [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training and evaluation need {', '.join(missing)}, not installed: {HOW}")
