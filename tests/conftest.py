"""What holds for every test, set before anything imports torch."""

from __future__ import annotations

import multiprocessing
import os

from launcher.job import gpus

# Tests start several processes on few cores: one thread each, or they wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
# Processes started by a test write to a pipe: no colours, whatever terminal pytest has.
os.environ["NO_COLOR"] = "1"
# Without a GPU, Triton's kernels run in its interpreter. It looks here when triton is first imported, as torchrec and
# deepspeed do too: a conftest deeper down would come too late.
if not gpus():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The server of all tests' processes starts once, with the imports done. (With GPUs it must not: CUDA may not be asked
    # for in a process that forks.)
    multiprocessing.set_forkserver_preload(["mme.train"])
