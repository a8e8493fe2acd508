"""The keys of the section `parallel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mme.config.key import key


@dataclass
class ParallelConfig:
    """How model and tables are distributed over the ranks."""

    expert_parallel_size: int = key(
        0,
        "Ranks that share one set of experts; must divide `moe.num_experts` and the number of processes. 0: the largest "
        "number that divides both.",
        at_least=0,
    )
    table_sharding: Literal["auto", "row_wise", "column_wise", "table_wise", "data_parallel"] = key(
        "row_wise",
        "Sharding of the item tables over the ranks; with `auto`, TorchRec's planner chooses. `column_wise` excludes "
        "`rowwise_adagrad`, which has one state per row.",
    )
    table_placement: Literal["auto", "device", "uvm", "uvm_caching"] = key(
        "auto",
        "Where the item tables live. `device`: in the memory of the GPU, or of the process on a CPU. `uvm`: in host memory, "
        "which the GPU reads over its link. `uvm_caching`: in host memory, with a cache of rows in GPU memory. `auto`: `device` "
        "if the tables with their optimizer states fill at most 80% of it, otherwise `uvm_caching`, or `uvm` for `bfloat16` tables. "
        "Host memory excludes `data_parallel` and `dense_adam` ([large-tables.md](large-tables.md)).",
    )
    table_cache_load_factor: float = key(
        0.2, "`uvm_caching` only: the share of a table's rows that fit into the cache.", above=0, below=1
    )
    table_dtype: Literal["float32", "float16", "bfloat16"] = key(
        "float32",
        "Data type of the item tables; optimizer states stay float32. 16 bits need an optimizer that FBGEMM applies in its tables "
        "(on a CPU: `adagrad`, `rowwise_adagrad` or `sgd`, and float16 only) and exclude `data_parallel`. On GPUs FBGEMM rounds "
        "updates stochastically. Checkpoints contain float32.",
    )
    exchange_dtype: Literal["float32", "bfloat16", "float16"] = key(
        "float32",
        "Data type in which ranks exchange rows of the item tables and the rows' gradients. `bfloat16` and `float16` halve the "
        "bytes; with `float16` the gradients are bfloat16, because they may be smaller than any float16. Tables, gradients and "
        "states stay float32. Excludes `data_parallel`, which exchanges no rows.",
    )
    zero_stage: int = key(1, "DeepSpeed ZeRO stage of the decoder.", at_least=1, at_most=2)
