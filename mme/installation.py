"""The optional packages that commands need, and how to install a missing one."""

from __future__ import annotations

import importlib.util
import os

from mme.errors import UserError

TRAINING_PACKAGES = ("fbgemm_gpu", "torchrec", "deepspeed")
HOW = (
    "`pip install 'mme[cuda]'` on a machine with NVIDIA GPUs; without one `pip install 'mme[cpu]'`, then "
    "`pip install --no-deps torchrec==1.8.0`; in a checkout `make setup`"
)


def prepare_training() -> None:
    """Checks that TorchRec, FBGEMM and DeepSpeed are installed, and names the accelerator for DeepSpeed.

    Raises:
        UserError: a package is missing.
    """
    missing = [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training and evaluation need {', '.join(missing)}, not installed: {HOW}")
    import torch

    # DeepSpeed looks for an accelerator when it is imported and warns if it finds none.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
