"""A model of a rank's peak memory in training, part by part.

It counts the tensors that last from step to step and those that one phase of a step or the evaluation needs in addition. The
CPU's figures are checked against measured runs (`tests/launcher/test_plan_memory.py`). The GPUs' figures follow the same counts with
the Triton kernels' tensors and have not been checked.

Legend: as in `launcher.shape`; R = M·T rows, P = H·(4·dv + 2·dqk) columns of a block's projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.shape import Shape
from mme.config import Config
from mme.devices import Device
from mme.table_placement import FLOAT, Bytes

INT64 = 8
WRITTEN = 3  # copies of the decoder's size in a checkpoint: weights and Adam's two moments
DENSE_STATES = 3  # copies of the weights' size: ZeRO's float32 weights and Adam's two moments
ADAM_TEMPORARIES = 3  # copies of one parameter while PyTorch's Adam updates it
NARROW_EXPERTS = 128  # up to this width the Triton kernels gather and weight rows without making copies
ATTENTION_SCORES = 1 << 18  # query-key pairs of one group in a chunk of the CPU's attention
ATTENTION_ROWS = 64
SCORES = 32_000_000  # elements of a score matrix, as in `mme.evaluation.ranking`, which imports torch
OWN_NEGATIVE_BYTES = 24  # per scored item, while gradients of per-token negatives are sorted by item

ATTENTION, FFN, LOSS = "activations: attention", "activations: FFN, experts", "activations: loss"
ROWS, TABLE_GRADIENT = "rows of the step's items", "tables' gradient"
TABLE_OPTIMIZER, OPTIMIZER = "buffers: tables' optimizer", "buffers: optimizer"
EVALUATION = "evaluation"  # the phase
SCORED, VECTORS, POPULARITY = "scores", "items' vectors or lengths", "items' popularity"


@dataclass(frozen=True)
class Memory:
    """Bytes by part in the ``phase`` of a step that needs most, and in ``host_parts`` those of a GPU job's host memory."""

    parts: dict[str, float]
    phase: str
    host_parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def host_total(self) -> float:
        return sum(self.host_parts.values())

    def fits(self, device: Device) -> bool:
        return self.total <= device.memory and self.host_total <= device.host_memory


def memory_of(shape: Shape, device: Device) -> Memory:
    """The peak memory of the fullest rank on ``device``, in a step or in an evaluation."""
    return max(step_memory(shape, device), evaluation_memory(shape, device), key=lambda memory: memory.total)


def step_memory(shape: Shape, device: Device) -> Memory:
    """The peak memory of the fullest rank in a step."""
    return _fullest(shape, device, _phases(shape, device))


def evaluation_memory(shape: Shape, device: Device) -> Memory:
    """The peak memory of the fullest rank in an evaluation during training."""
    return _fullest(shape, device, {EVALUATION: _evaluation(shape, device)})


def _fullest(shape: Shape, device: Device, passing: dict[str, dict[str, float]]) -> Memory:
    """The phase that needs most, with what lasts; ``passing``: bytes by phase and part."""
    tables = shape.table_bytes(shape.table_placement(device))
    lasting = lasting_parts(shape, tables)
    phases = {name: parts | {"allocator": _in_pieces(parts, device)} for name, parts in passing.items()}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {**lasting, **phases[phase]}
    if not device.is_gpu:  # the original weights' memory, which DeepSpeed's flat copy leaves behind
        parts["allocator"] += lasting["decoder"] + lasting["experts"]
    parts["libraries, driver" if device.is_gpu else "libraries"] = device.runtime
    host_parts = {"item tables": tables.host, "copy for a checkpoint": checkpoint_bytes(shape)} if device.is_gpu else {}
    return Memory(
        {part: size for part, size in parts.items() if size},
        phase,
        {part: size for part, size in host_parts.items() if size},
    )


def lasting_parts(shape: Shape, tables: Bytes) -> dict[str, float]:
    """Weights and optimizer states on the device, which a rank holds between steps; ``tables`` are those of the tables."""
    dense, experts = shape.dense_parameters * FLOAT, shape.expert_parameters * FLOAT
    return {
        "item tables": tables.device_weights,
        "tables' optimizer": tables.device_states,
        "decoder": dense,
        "experts": experts,
        "decoder's optimizer": DENSE_STATES * dense / shape.ranks,
        "experts' optimizer": DENSE_STATES * experts / shape.expert_copies,
    }


def checkpoint_bytes(shape: Shape) -> float:
    """Bytes that rank 0 copies to host memory and writes for a checkpoint: weights and optimizer states.

    Rank 0 writes most, because it also writes the weights that all ranks share. ZeRO's float32 copy of the weights is
    not written.
    """
    parts = lasting_parts(shape, _in_float32(shape).table_bytes("device"))
    return parts["item tables"] + parts["tables' optimizer"] + WRITTEN * (parts["decoder"] + parts["experts"])


def whole_checkpoint_bytes(shape: Shape) -> float:
    """Bytes of the checkpoint files of all ranks together."""
    alone = replace(shape, ranks=1, ranks_per_node=1, config=_on_one_rank(shape))
    parts = lasting_parts(alone, _in_float32(alone).table_bytes("device"))
    return parts["item tables"] + parts["tables' optimizer"] + WRITTEN * (parts["decoder"] + parts["experts"])


def _on_one_rank(shape: Shape) -> Config:
    return replace(shape.config, parallel=replace(shape.config.parallel, expert_parallel_size=1))


def _in_float32(shape: Shape) -> Shape:
    """The shape with tables as checkpoints contain them."""
    parallel = replace(shape.config.parallel, table_dtype="float32")
    return replace(shape, config=replace(shape.config, parallel=parallel))


def has_dense_gradient(shape: Shape) -> bool:
    """Whether the tables' gradient covers all rows, as optimizers of torch.optim need it."""
    optimizer = shape.config.train.table_optimizer
    return optimizer == "dense_adam" or (not shape.is_sharded and optimizer != "adam")


def _in_pieces(passing: dict[str, float], device: Device) -> float:
    """Bytes lost to fragmentation by the parts that a phase allocates and frees."""
    as_long_as_rows = sum(passing.get(part, 0.0) for part in (ROWS, TABLE_GRADIENT, TABLE_OPTIMIZER))
    return device.heap_share * (sum(passing.values()) - as_long_as_rows) + device.heap_share_of_rows * as_long_as_rows


def _phases(shape: Shape, device: Device) -> dict[str, dict[str, float]]:
    """Bytes by phase and part, in addition to what lasts between steps."""
    batch = _kept_for_backward(shape, device)
    gradients = {"buffers: gradients": FLOAT * float(shape.dense_parameters + shape.expert_parameters)}
    after_last_ffn = {FFN: batch[FFN] - _kept_by_experts(shape, device) * (shape.expert_blocks > 0)}

    def plus(more: dict[str, float]) -> dict[str, float]:
        return {**gradients, **batch, **{part: batch[part] + num_bytes for part, num_bytes in more.items()}}

    one_table = FLOAT * float(shape.table_parts.rows * shape.table_parts.columns)
    # On a CPU, the tables of `adam` are allocated once and filled in place.
    in_place = not device.is_gpu and shape.config.train.table_optimizer == "adam"
    is_copied = shape.table_placement(device) == "device" and not in_place
    return {
        "construction": {"buffers: one table": one_table if is_copied else 0.0},
        "backward of the loss": plus(_loss_backward(shape)),
        "backward of an FFN": plus({FFN: _ffn_backward(shape, device)}),
        "backward of an attention": plus({ATTENTION: _attention_backward(shape, device)}) | after_last_ffn,
        "update of the tables": gradients | _table_update(shape),
        "update of the decoder": gradients | _decoder_update(shape),
    }


def _kept_for_backward(shape: Shape, device: Device) -> dict[str, float]:
    """Bytes that forward keeps for backward in the decoder and the loss.

    A block keeps x, x̂, uvqk before and after SiLU, the attention, u ⊙ its norm, o and z. With recomputation a block
    keeps only its input, and backward holds all of this for one block at a time.
    """
    config, model = shape.config, shape.config.model
    d, v, dropout = model.view_dim, shape.v_width, model.dropout > 0
    rows, number = shape.rows / config.train.micro_batches, shape.number_bytes
    block = rows * number * (4 * d + 2 * shape.uvqk_width + 6 * v)
    inputs = rows * d * (number + dropout)  # x of the last block, and the mask of the first one's
    if not device.is_gpu:
        block += rows * dropout * (3 * v + d)  # the norms' masks
        block += rows * number * (v + 2 * shape.qk_width) * (model.num_heads > 1)  # copies by head
    experts = _kept_by_experts(shape, device)
    if config.train.recompute == "blocks":
        attention = block + (model.num_blocks - 1) * rows * d * number
        ffn = experts * min(1, shape.expert_blocks)
    else:
        attention, ffn = block * model.num_blocks, experts * shape.expert_blocks
    # The rows, their gradient and the normalised rows.
    kept = {ROWS: float(shape.looked_up * (2 * FLOAT + number)), ATTENTION: attention + inputs, FFN: ffn}
    kept[LOSS] = _kept_by_loss(shape, device)
    if shape.expert_blocks and shape.expert_parallel_size > 1:  # the process group keeps the last exchange's buffers
        kept["buffers: exchange"] = 2.0 * shape.rows * shape.top_k * d * number
    return kept


def _kept_by_experts(shape: Shape, device: Device) -> float:
    """Bytes kept by one mixture: the router's logits, probabilities and choices, and the rows sent and returned."""
    model = shape.config.model
    rows = shape.rows / shape.config.train.micro_batches
    router = rows * (2 * FLOAT * model.moe.num_experts + 4 * INT64 * shape.top_k)
    gathers_itself = device.is_gpu and shape.expert_parallel_size == 1 and model.view_dim <= NARROW_EXPERTS
    copies = 0 if gathers_itself else 2 * shape.top_k * model.view_dim * shape.number_bytes
    return router + rows * copies


def _kept_by_loss(shape: Shape, device: Device) -> float:
    """Bytes of two copies of the normalised states, the negatives and, on a CPU, each softmax's rows and slopes."""
    tokens = shape.tokens / shape.config.train.micro_batches
    states = 2 * tokens * shape.config.model.embedding_dim * FLOAT
    loss = shape.config.loss
    if loss.is_full_softmax:
        return states
    softmaxes = loss.num_softmaxes(shape.config.model.num_tables)
    slopes = 0 if device.is_gpu else 2 * FLOAT * tokens * shape.scored * softmaxes
    return states + slopes + shape.negative_sets * (shape.scored - 1) * INT64


def _loss_backward(shape: Shape) -> dict[str, float]:
    """Gradients of the states, and the larger of two consecutive needs: negatives sorted by item (or the logits of a
    chunk), then the norm's backward over all rows."""
    tokens = shape.tokens / shape.config.train.micro_batches
    states = 2 * tokens * shape.config.model.embedding_dim * FLOAT
    one = float(shape.looked_up * FLOAT)
    loss = shape.config.loss
    if loss.is_full_softmax:
        extra = 3 * FLOAT * min(tokens, loss.FULL_SOFTMAX_TOKENS) * shape.items
    else:
        own = loss.negatives == "per_token"
        extra = (OWN_NEGATIVE_BYTES if own else 2 * FLOAT) * tokens * shape.scored
    if extra > 2 * one:
        return {LOSS: states + extra, ROWS: one}
    return {LOSS: states, ROWS: 3 * one}


def _ffn_backward(shape: Shape, device: Device) -> float:
    """Bytes for the last block: gradients of its rows and, on a CPU, six times the hidden rows of one expert."""
    model = shape.config.model
    rows, number = shape.rows / shape.config.train.micro_batches, shape.number_bytes
    gradients = 2 * rows * model.view_dim * number
    choices = 1.0
    if shape.expert_blocks:
        choices = shape.top_k
        gradients += 2 * rows * shape.top_k * model.view_dim * number
    if device.is_gpu:
        hidden = 0.0 if model.view_dim <= NARROW_EXPERTS else 3.0
    else:
        # Experts run one after another. A rank receives as many rows as it sends, divided among its experts.
        hidden = 6.0 / (model.moe.num_experts // shape.expert_parallel_size if shape.expert_blocks else 1)
    return gradients + hidden * rows * choices * shape.hidden * number


def _attention_backward(shape: Shape, device: Device) -> float:
    """Gradients of u, v, q, k and the three channels, and on a CPU padded copies and one chunk's scores. Subtracts what
    the block kept for its later part and has freed by then: o, z, the attention and u ⊙ its norm."""
    rows, number = shape.rows / shape.config.train.micro_batches, shape.number_bytes
    v, qk, d = shape.v_width, shape.qk_width, shape.config.model.view_dim
    if device.is_gpu:
        return rows * number * (v + 2 * qk - d)
    data, model = shape.config.data, shape.config.model
    sequences = shape.tokens / data.max_seq_len
    pairs = min(ATTENTION_SCORES, sequences * min(ATTENTION_ROWS, data.max_seq_len) * data.max_seq_len)
    pairs = max(pairs, min(ATTENTION_ROWS, data.max_seq_len) * data.max_seq_len)
    return rows * FLOAT * (6 * v + 4 * qk - d) + 3 * FLOAT * pairs * model.num_tables * model.num_heads


def _table_update(shape: Shape) -> dict[str, float]:
    """Gradients of the rows, or of whole tables if a torch.optim optimizer updates them."""
    rows = {ROWS: 3.0 * shape.looked_up * FLOAT}
    table = float(shape.table_elements * FLOAT)
    if not has_dense_gradient(shape):
        return rows
    if not shape.is_sharded:
        return rows | {TABLE_GRADIENT: 2 * table}  # DDP adds buffers of the same size
    return rows | {TABLE_GRADIENT: table, TABLE_OPTIMIZER: ADAM_TEMPORARIES * table / shape.tables_held}


def _decoder_update(shape: Shape) -> dict[str, float]:
    """DeepSpeed's flat gradient of a partition and Adam's temporaries for it."""
    dense, experts = shape.dense_parameters / shape.ranks, shape.expert_parameters / shape.expert_copies
    return {ROWS: 2.0 * shape.looked_up * FLOAT, OPTIMIZER: FLOAT * (dense + experts + 2 * max(dense, experts))}


def _evaluation(shape: Shape, device: Device) -> dict[str, float]:
    """The scores of a part of the histories and two masks of their size, or the activations of a batch, whichever is larger.

    Tables split by rows and replicated ones are scored in place, by the lengths of their rows; vectors of others are copied.
    A block keeps its input, x̂, uvqk before and after SiLU, and in the attention padded copies of q, k and v, copies of v by
    channel and the result twice.
    """
    data, model = shape.config.data, shape.config.model
    share = math.ceil(shape.items / shape.ranks)
    histories = min(max(1, SCORES // share), data.eval_batch_size * shape.ranks)
    scored = (FLOAT + 2) * histories * share + INT64 * share
    per_item = model.num_tables if model.score_norm == "per_view" else 1
    if shape.config.parallel.table_sharding not in ("row_wise", "data_parallel"):
        per_item = model.embedding_dim
    tokens = data.eval_batch_size * data.max_seq_len
    rows, number = tokens * model.num_tables, shape.number_bytes
    kept = rows * number * (4 * model.view_dim + 2 * shape.uvqk_width)
    in_attention = 0.0 if device.is_gpu else rows * number * (2 * shape.qk_width + 9 * shape.v_width)
    hidden, in_ffn = 0.0 if device.is_gpu else 2.0 * shape.hidden, 6.0 * shape.v_width + 2 * model.view_dim
    if shape.expert_blocks:  # sorted rows of all choices, their results, these by row, and a copy for the weighted sum
        hidden *= shape.top_k / model.moe.num_experts
        in_ffn += 4 * shape.top_k * model.view_dim
        kept += shape.expert_blocks * rows * (2 * FLOAT * model.moe.num_experts + 4 * INT64 * shape.top_k)
    in_ffn = rows * number * (in_ffn + hidden)
    looked_up = -shape.items * math.expm1(-tokens / shape.items) * model.embedding_dim * FLOAT
    activations = kept + max(in_attention, in_ffn) + 2 * looked_up
    return {
        VECTORS: float(FLOAT * per_item * share),
        POPULARITY: 3.0 * INT64 * share,
        SCORED: float(scored),
        "activations: evaluation": max(0.0, activations - scored),
    }
