"""The same global batch gives the same loss, gradients and updates on any number of processes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor

from mme.config import Config, load_config
from mme.data.batch import SequenceBatch
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.state import weight_pieces
from mme.distributed.world import World
from mme.errors import UserError
from mme.step import TrainStep
from tests.distributed.processes import run_on

NUM_ITEMS = 40
LENGTHS = [5, 3, 10, 1, 7]
POPULAR = 7  # the only item among negatives by popularity, so that they are the same on any number of processes


def sequences(wanted: list[int], with_features: bool = False) -> SequenceBatch:
    """A batch of the selected ones of five fixed sequences, whose features depend on the items."""
    generator = torch.Generator().manual_seed(7)
    items = [torch.randint(NUM_ITEMS, (length + 1,), generator=generator) for length in LENGTHS]
    times = [torch.randint(100_000, (length + 1,), generator=generator).cumsum(0) for length in LENGTHS]
    none = torch.empty(0, dtype=torch.int64)
    item_ids = torch.cat([none, *[items[b][:-1] for b in wanted]])
    users = torch.tensor(wanted, dtype=torch.int64)
    return SequenceBatch(
        item_ids=item_ids,
        seq_offsets=torch.tensor([0, *[LENGTHS[b] for b in wanted]]).cumsum(0),
        timestamps=torch.cat([none, *[times[b] for b in wanted]]),
        target_ids=torch.cat([none, *[items[b][1:] for b in wanted]]),
        user_rows=users,
        event_features=torch.stack([item_ids % 3, item_ids % 4], 1) if with_features else None,
        user_features=torch.stack([users % 2, users + 1], 1) if with_features else None,
    )


FEATURES = ["model.event_features=[action,rating]", "model.user_features=[segment,user_id]"]
FEATURE_SIZES = {"action": 3, "rating": 5, "segment": 2, "user_id": 6}


def configuration(*overrides: str) -> Config:
    fixed = ["data.path=unused", "data.max_seq_len=12", "model.dropout=0", "loss.kind=full_softmax"]
    model = ["model.num_tables=2", "model.embedding_dim=16", "model.num_heads=2", "model.moe.num_experts=4"]
    # Plain gradient descent on the tables shows the scale of their gradient, which Adam would hide.
    return load_config(None, [*fixed, *model, "train.table_optimizer=sgd", "train.table_lr=10", *overrides])


Parts = list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]


def one_step(
    world: World, split: list[list[int]], overrides: list[str], favoured: int = 0
) -> tuple[float, Parts, Parts]:
    """The loss, this rank's parts of the decoder's gradients before the update, and of all weights after it.

    ``favoured``: the number of experts, the first ones, that receive every token.
    """
    config = configuration(*overrides)
    recommender = Recommender(config, NUM_ITEMS, world, FEATURE_SIZES)
    if favoured:
        for layer in recommender.decoder.moe_layers():
            bonus = 50.0 * (torch.arange(layer.num_experts) < favoured)
            layer.router.register_forward_hook(lambda _, __, logits, bonus=bonus: logits + bonus)
    counts = torch.arange(NUM_ITEMS) == POPULAR
    step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), 2, counts)
    step._set_lr(0)
    result = step.backward(0, sequences(split[world.rank], bool(config.model.feature_columns)))
    parameters = {f"decoder/{name}": p for name, p in recommender.decoder.named_parameters()}
    gradients = [
        (piece.name, piece.shape, piece.offsets, safe_get_full_grad(parameters[piece.name]))
        for piece in weight_pieces(recommender)
        if piece.name in parameters
    ]
    assert step.update(result)
    weights = [(piece.name, piece.shape, piece.offsets, piece.read().clone()) for piece in weight_pieces(recommender)]
    return result.loss, gradients, weights


def whole(parts_by_rank: list[Parts]) -> dict[str, Tensor]:
    """Assembles whole tensors from every rank's parts."""
    tensors: dict[str, Tensor] = {}
    for name, shape, offsets, part in (entry for parts in parts_by_rank for entry in parts):
        target = tensors.setdefault(name, torch.full(shape, torch.nan))
        target[tuple(slice(o, o + size) for o, size in zip(offsets, part.shape, strict=True))] = part
    return tensors


@pytest.fixture(scope="module")
def alone() -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], [])
    return loss, whole([gradients]), whole([weights])


def check(alone: Any, split: list[list[int]], *overrides: str, atol: float = 1e-7) -> None:
    compare(alone, run_on(len(split), one_step, split, list(overrides)), atol)


def compare(alone: Any, results: list[tuple[float, Parts, Parts]], atol: float = 1e-7) -> None:
    """Compares losses to 1e-6; ``atol`` of gradients allows for sums in another order."""
    loss, gradients, weights = alone
    for rank_loss, _, _ in results:
        assert rank_loss == pytest.approx(loss, rel=1e-6)
    for name, found in whole([gradients for _, gradients, _ in results]).items():
        torch.testing.assert_close(found, gradients[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for name, found in whole([weights for _, _, weights in results]).items():
        if name.startswith("tables/"):
            # Ten times the gradient's rounding, because the tables' learning rate is 10.
            torch.testing.assert_close(found, weights[name], rtol=1e-4, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


def one_step_each(world: World, split: list[list[int]], layouts: list[list[str]]) -> list[tuple[float, Parts, Parts]]:
    return [one_step(world, split, layout) for layout in layouts]


@pytest.mark.parametrize(
    ("split", "expert_parallel_sizes"),
    [
        ([[0, 3], [1, 2, 4]], [1, 2]),
        pytest.param([[0], [1, 2], [], [3, 4]], [1, 2, 4], marks=pytest.mark.slow),
        pytest.param([[3], [0, 1, 2, 4], [], []], [1, 2, 4], marks=pytest.mark.slow),
    ],
    ids=["two", "four", "four, nearly all on one"],
)
def test_every_layout_gives_the_same(alone: Any, split: list[list[int]], expert_parallel_sizes: list[int]) -> None:
    """Every expert-parallel size and every sharding of the tables; the processes are started once."""
    layouts = [
        [f"parallel.expert_parallel_size={size}", f"parallel.table_sharding={sharding}"]
        for size, sharding in itertools.product(
            expert_parallel_sizes, ["row_wise", "column_wise", "table_wise", "data_parallel"]
        )
    ]
    by_rank = run_on(len(split), one_step_each, split, layouts)
    for layout, results in zip(layouts, zip(*by_rank, strict=True), strict=True):
        try:
            compare(alone, list(results))
        except AssertionError as error:
            raise AssertionError(f"{layout}: {error}") from error


@pytest.mark.parametrize(
    "split",
    [[[0, 3], [1, 2, 4]], pytest.param([[0], [1, 2], [], [3, 4]], marks=pytest.mark.slow)],
    ids=["two", "four"],
)
def test_experts_and_processes_without_tokens(split: list[list[int]]) -> None:
    """Two of four experts get all rows: the processes that own the others get none, and their gradient is zero."""
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], [], 2)
    expected = (loss, whole([gradients]), whole([weights]))
    experts = [gradient for name, gradient in expected[1].items() if ".experts." in name]
    assert experts and all(gradient[:2].abs().sum() > 0 and not gradient[2:].any() for gradient in experts)
    compare(expected, run_on(len(split), one_step, split, [f"parallel.expert_parallel_size={len(split)}"], 2))


def test_routers_that_see_all_views() -> None:
    option = ["model.moe.router=all_views"]
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], option)
    check((loss, whole([gradients]), whole([weights])), [[0, 3, 1, 2, 4], []], *option)


def test_a_process_without_sequences(alone: Any) -> None:
    check(alone, [[0, 1, 2, 3, 4], []])


@pytest.mark.parametrize(
    "split, zero_stage", [([[0, 1, 2, 3, 4]], 1), ([[0, 3], [1, 2, 4]], 1), ([[0, 1, 2, 4], [3]], 2)]
)
def test_a_batch_in_parts(split: list[list[int]], zero_stage: int) -> None:
    """Equals the undivided batch, except for the routers' balance loss, which uses each part's counts; some are empty."""
    no_balance = "model.moe.load_balance_coef=0"
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], [no_balance])
    in_one = (loss, whole([gradients]), whole([weights]))
    check(in_one, split, no_balance, "train.micro_batches=3", f"parallel.zero_stage={zero_stage}")


def test_negatives_by_popularity_with_their_correction() -> None:
    options = ["loss.kind=sampled_softmax", "loss.sampling=popularity", "loss.log_q_correction=true"]
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], options)
    check((loss, whole([gradients]), whole([weights])), [[0, 3], [1, 2, 4]], *options)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("split", [[[0, 3], [1, 2, 4]], [[0, 1, 2, 3, 4], []]])
def test_sampled_negatives_are_the_same_on_any_split(split: list[list[int]], sampling: str) -> None:
    """A token's negatives do not depend on its process or its part of a batch."""
    sampled = ["loss.kind=sampled_softmax", "loss.num_negatives=8", f"loss.sampling={sampling}"]
    sampled += ["model.moe.load_balance_coef=0"]  # which depends on each part's counts
    sampled += ["train.seed=7"]  # with this seed no gradient is so near zero that Adam magnifies its rounding
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], sampled)
    check((loss, whole([gradients]), whole([weights])), split, *sampled, "train.micro_batches=2")


def test_features_of_events_and_users() -> None:
    """Equals one process, and the rows of all values that occur are updated."""
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], FEATURES)
    check((loss, whole([gradients]), whole([weights])), [[0, 3], [1, 2, 4]], *FEATURES)
    ((_, _, start),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], ["train.table_lr=1e-30", *FEATURES])
    moved = (whole([weights])["tables/item_0"] != whole([start])["tables/item_0"]).any(1)
    assert moved.shape == (NUM_ITEMS + 3 + 5 + 2 + 6,)
    assert moved[NUM_ITEMS:].tolist() == [True] * 3 + [True] * 4 + [False] + [True] * 2 + [False] + [True] * 5


DROPOUT = [
    "model.dropout=0.4",
    "model.moe.load_balance_coef=0",
    "loss.num_negatives=8",
]  # the balance loss depends on each part


@pytest.mark.parametrize(
    ("split", "options"),
    [
        ([[0, 3], [1, 2, 4]], [*FEATURES, "loss.kind=sampled_softmax"]),
        ([[0, 1, 2, 3, 4], []], ["loss.kind=sampled_softmax", "loss.sampling=in_batch", "loss.uniform_share=0.5"]),
        ([[4, 3, 2, 1, 0]], ["loss.kind=sampled_softmax", "loss.sampling=in_batch", "train.recompute=blocks"]),
        pytest.param([[4, 3], [1, 2, 0]], ["model.block=sasrec", "model.moe.num_experts=0"], id="sasrec"),
        pytest.param(
            [[4, 3], [1, 2, 0]],
            ["model.block=ligr", "model.moe.num_experts=0", "model.final_norm=true", "model.positions_from=newest"],
            id="ligr",
        ),
        pytest.param([[4, 3], [1, 2, 0]], ["model.block=hstu", "model.moe.num_experts=0"], id="hstu"),
        pytest.param([[0], [1, 2], [], [3, 4]], ["loss.kind=sampled_softmax"], marks=pytest.mark.slow),
        pytest.param(
            [[3], [4, 1], [0], [2]],
            ["loss.kind=sampled_softmax", "loss.sampling=in_batch", *FEATURES],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_dropout_is_the_same_on_any_split(split: list[list[int]], options: list[str]) -> None:
    """A token's dropout does not depend on its process or its part of a batch, and dropout has an effect."""
    options = [*DROPOUT, *options]
    ((loss, gradients, weights),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], options)
    ((without, *_),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], [*options, "model.dropout=0"])
    assert abs(loss - without) > 1e-4
    check((loss, whole([gradients]), whole([weights])), split, *options, "train.micro_batches=2", atol=1e-6)


def test_recomputed_blocks_give_the_same_bits() -> None:
    """Recomputed blocks draw the same dropout in backward."""
    split, dropout = [[0, 3], [1, 2, 4]], "model.dropout=0.3"
    kept = run_on(2, one_step, split, [dropout])
    again = run_on(2, one_step, split, [dropout, "train.recompute=blocks"])
    for (loss, gradients, _), (loss_again, gradients_again, _) in zip(kept, again, strict=True):
        assert loss == loss_again
        for (name, *_, gradient), (_, *_, gradient_again) in zip(gradients, gradients_again, strict=True):
            assert torch.equal(gradient, gradient_again), name


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_bfloat16_is_near_float32(alone: Any, zero_stage: int) -> None:
    """bfloat16 products have 8 bits; the float32 weights and gradients agree within 3% in norm."""
    loss, gradients, _ = alone
    overrides = ["train.precision=bfloat16", "train.recompute=blocks", f"parallel.zero_stage={zero_stage}"]
    results = run_on(2, one_step, [[0, 3], [1, 2, 4]], overrides)
    assert results[0][0] == pytest.approx(loss, rel=5e-3)
    found = whole([parts for _, parts, _ in results])
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - gradients[name]).norm() <= 0.03 * gradients[name].norm() + 1e-6, name


@pytest.mark.parametrize(
    "split, overrides",
    [
        ([[0, 1, 2, 3, 4]], []),
        ([[0, 3], [1, 2, 4]], ["parallel.zero_stage=2"]),
        ([[0, 1, 2, 3, 4], []], ["parallel.expert_parallel_size=1", "parallel.table_sharding=data_parallel"]),
    ],
    ids=["alone", "two", "one without sequences"],
)
def test_clipping_scales_by_the_norm_of_decoder_and_tables_together(
    alone: Any, split: list[list[int]], overrides: list[str]
) -> None:
    _, decoder_gradients, moved = alone  # the tables use plain gradient descent with learning rate 10
    ((_, _, parts),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], ["train.table_lr=1e-30"])
    start = {name: weight for name, weight in whole([parts]).items() if name.startswith("tables/")}
    table_gradients = {name: (weight - moved[name]) / 10 for name, weight in start.items()}
    gradients = [*decoder_gradients.values(), *table_gradients.values()]
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
    results = run_on(len(split), one_step, split, [f"train.grad_clip={norm / 4}", *overrides])
    weights = whole([parts for _, _, parts in results])
    for name, weight in start.items():
        torch.testing.assert_close(weights[name], weight - 10 * table_gradients[name] / 4, rtol=1e-4, atol=1e-6)


def test_all_options_together_are_near_plain_float32(alone: Any) -> None:
    """With bfloat16, recomputed blocks, ZeRO-2, micro-batches, an active gradient limit and column-wise tables, the update
    of the tables agrees within 5% in norm with the update without."""
    limit, no_balance = ["train.grad_clip=0.5"], ["model.moe.load_balance_coef=0"]
    ((_, _, parts),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], [*limit, *no_balance])
    plain = whole([parts])
    ((_, _, parts),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], ["train.table_lr=1e-30"])
    start = whole([parts])
    together = ["train.precision=bfloat16", "train.recompute=blocks", "parallel.zero_stage=2", "train.micro_batches=2"]
    results = run_on(
        2, one_step, [[0, 3], [1, 2, 4]], [*together, *limit, *no_balance, "parallel.table_sharding=column_wise"]
    )
    weights = whole([parts for _, _, parts in results])
    unlimited = alone[2]
    for name in (name for name in weights if name.startswith("tables/")):
        learned = plain[name] - start[name]
        assert learned.norm() < 0.9 * (unlimited[name] - start[name]).norm()  # the limit had an effect
        assert (weights[name] - plain[name]).norm() <= 0.05 * learned.norm(), name


def first_moments(world: World, overrides: list[str]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, gradient and first moment of each decoder weight after one step."""
    config = configuration(*overrides)
    recommender = Recommender(config, NUM_ITEMS, world)
    step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=2)
    gradients = step.backward(0, sequences([0, 1, 2, 3, 4]))
    given = {name: safe_get_full_grad(p).clone() for name, p in recommender.decoder.named_parameters()}
    step.update(gradients)
    return [
        (name, given[name], safe_get_full_optimizer_state(p, "exp_avg"))
        for name, p in recommender.decoder.named_parameters()
    ]


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_adam_gets_the_whole_gradient_unless_a_limit_is_set(limit: float) -> None:
    ((entries),) = run_on(1, first_moments, [f"train.grad_clip={limit}"])
    scales = {name: (moment.norm() / (0.1 * gradient.norm())).item() for name, gradient, moment in entries}
    smallest, largest = min(scales.values()), max(scales.values())
    assert smallest == pytest.approx(largest, rel=1e-4)
    assert largest < 0.01 if limit else smallest == pytest.approx(1, rel=1e-4)


def masked_steps(world: World, split: list[list[int]], keep: list[str]) -> list[tuple[float, int, Tensor]]:
    """Loss, targets and this rank's gradient of the items, trained on the tokens that ``keep`` selects."""
    config = configuration("model.moe.load_balance_coef=0")
    recommender = Recommender(config, NUM_ITEMS, world)
    step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=2)
    results = []
    for which in keep:
        batch = sequences(split[world.rank])
        late = torch.cat([torch.arange(LENGTHS[b]) >= min(4, b + 1) for b in split[world.rank]])
        if which == "weighted":
            batch = replace(batch, target_weights=torch.where(late, 3.0, 0.5))
        elif which == "none":
            batch = replace(batch, trained=late & ~late, target_weights=torch.zeros(late.numel()))
        else:
            batch = replace(batch, trained={"late": late, "early": ~late, "all": None}[which])
        gradients = step.backward(0, batch)
        results.append((gradients.loss, gradients.tokens, gradients.item_rows.clone()))
    return results


def refused(world: World, overrides: list[str]) -> str:
    with pytest.raises(UserError) as error:
        Recommender(configuration(*overrides), 4, world)
    return str(error.value)


def test_a_process_without_rows_of_a_fused_table_is_rejected() -> None:
    for line in run_on(3, refused, ["train.table_optimizer=adagrad"]):
        assert "a process would have none of the 4 rows of an item table" in line


def test_a_context_token_has_no_loss() -> None:
    """The results for the two halves of the targets add up to the result for all."""
    for late, early, whole_batch in run_on(2, masked_steps, [[0, 3], [1, 2, 4]], ["late", "early", "all"]):
        assert late[1] + early[1] == whole_batch[1] == sum(LENGTHS)
        assert 0 < late[1] < whole_batch[1]
        assert late[0] * late[1] + early[0] * early[1] == pytest.approx(whole_batch[0] * whole_batch[1], rel=1e-6)
        together = late[1] * late[2] + early[1] * early[2]
        torch.testing.assert_close(together, whole_batch[1] * whole_batch[2], rtol=1e-4, atol=1e-5)


def test_weights_of_targets() -> None:
    """The weighted mean over both halves of the targets; a batch without a target changes nothing."""
    kept = ["late", "early", "weighted", "none"]
    for late, early, weighted, none in run_on(2, masked_steps, [[0, 3], [1, 2, 4]], kept):
        parts = [(3.0 * late[1], late), (0.5 * early[1], early)]
        total = sum(weight for weight, _ in parts)
        assert weighted[0] == pytest.approx(sum(weight * part[0] for weight, part in parts) / total, rel=1e-6)
        expected = sum(weight * part[2] for weight, part in parts) / total
        torch.testing.assert_close(weighted[2], expected, rtol=1e-4, atol=1e-7)
        assert weighted[1] == sum(LENGTHS)
        assert none[0] == 0 and not none[2].any()
