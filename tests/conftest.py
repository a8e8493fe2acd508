"""Settings for all tests, made before anything imports torch."""

from __future__ import annotations

import multiprocessing
import os

from launcher.job import gpus
from tests.object_store import object_store, s3_server  # noqa: F401  fixtures

# Tests start several processes on few cores, so each gets one thread.
os.environ["OMP_NUM_THREADS"] = "1"
# Processes that tests start write to a pipe, without colours in any terminal.
os.environ["NO_COLOR"] = "1"
# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is first imported, as torchrec and
# deepspeed do, so a conftest in a subfolder would be too late.
if not gpus():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The fork server of the tests starts once, with all imports done. (Not with GPUs, because CUDA must not be initialised
    # in a process that forks.)
    multiprocessing.set_forkserver_preload(["mme.training"])
