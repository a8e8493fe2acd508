"""One optimizer step of Fuxi-MME, in the order of the paper's algorithm.

Look up the rows of the batch's distinct items in the sharded tables once, pass all views through the shared decoder,
score every next item against its negatives, add the routers' losses, and step tables and decoder if all gradients are
finite. Every random number of a step depends on (seed, step), the user and the position in the sequence. The losses are
therefore equal up to rounding on any number of processes and after any resume, and bitwise equal on the same number. Only
shared negatives (`loss.negatives=shared`) depend on which tokens are neighbours in a rank's batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mme.config import Config, MoEConfig
from mme.data.batch import SequenceBatch
from mme.distributed.clipping import OwnedGradients, sum_over_ranks
from mme.distributed.engine import reduced_gradients, set_lr, skip_step
from mme.distributed.recommender import Recommender
from mme.distributed.tables import mix_seed
from mme.distributed.world import World
from mme.model.batch_items import BatchItems, BatchItemSampler
from mme.model.loss import NextItemLoss
from mme.model.moe import Routing, load_balance_loss, router_z_loss
from mme.model.negatives import sequence_keys, token_places
from mme.profiling.regions import region
from mme.run.non_finite import is_spoiled


@dataclass(frozen=True)
class StepResult:
    """The result of a step over all ranks.

    Attributes:
        loss: mean over the tokens of −log softmax at the target, weighted by `loss.weight_column`, without the routers' losses.
        skipped: the loss or a gradient was not finite; the step changed nothing.
        votes: for each vote, whether any rank voted yes.
        tokens: target tokens.
        lr: the decoder's learning rate.
        counts: (blocks with experts, M, E) int64, how many choices each expert received from each view.
        routing: of this rank's rows, by block.
    """

    loss: float
    skipped: bool
    votes: tuple[bool, ...]
    tokens: int
    lr: float
    counts: Tensor
    routing: list[Routing]

    def expert_load(self, moe: MoEConfig, world: World) -> dict[str, Any]:
        """How the routers distributed the tokens of all ranks, as arguments of `Monitor.experts`; a collective."""
        return {
            "load": (self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)).tolist(),
            "entropy": self.router_entropy(world).tolist(),
            "blocks": sorted(set(moe.placement)) or None,
            "dropped": self.dropped_shares(world),
            "top_k": moe.top_k,
        }

    def router_entropy(self, world: World) -> Tensor:
        """(blocks, M) entropy in nats of the routers' probabilities, averaged over the tokens of all ranks; a collective."""
        num_views, top_k = self.counts.shape[1], self.routing[0].experts.shape[1]
        sums = [
            torch.special.entr(routing.probabilities.detach()).sum(-1).view(num_views, -1).sum(-1)
            for routing in self.routing
        ]
        rows = self.counts.sum(-1) / top_k
        return world.sum(torch.stack(sums)) / rows.clamp(min=1)

    def dropped_shares(self, world: World) -> list[list[float]] | None:
        """[block][view] share of all ranks' choices that were dropped because their expert was full; a collective.

        None: no capacity is set.
        """
        dropped = [routing.dropped.sum(-1) for routing in self.routing if routing.dropped is not None]
        if not dropped:
            return None
        return (world.sum(torch.stack(dropped)) / self.counts.sum(-1).clamp(min=1)).tolist()


@dataclass(frozen=True)
class Gradients:
    """The gradients of one batch, not applied yet, and further results of its forward pass (see `StepResult`).

    Attributes:
        finite: whether the loss and every gradient are finite on all ranks.
        norm: of the gradients of decoder and tables together; None: no limit is set.
        looked_up: (U, M, d) the rows that this rank fetched from the tables, attached to the autograd graph.
        item_rows: (U, M, d) the gradient of ``looked_up``.
    """

    loss: float
    finite: bool
    norm: float | None
    votes: tuple[bool, ...]
    tokens: int
    counts: Tensor
    routing: list[Routing]
    looked_up: Tensor
    item_rows: Tensor


class _Part(NamedTuple):
    """One part of a rank's batch after its backward: the sum of its losses, the choices of all ranks as in
    `StepResult.counts`, number and weight of the targets of the whole global batch, and this rank's routing."""

    losses: Tensor
    counts: Tensor
    targets: Tensor
    weight: Tensor
    routing: list[Routing]


class TrainStep:
    """Computes the global loss and its gradients from each rank's part of a global batch, and applies them.

    ``training_counts``: see `mme.model.negatives.NegativeSampler`.
    """

    def __init__(
        self,
        config: Config,
        recommender: Recommender,
        engine: Any,
        total_steps: int,
        training_counts: Tensor | None = None,
    ) -> None:
        self.config, self.recommender, self.engine = config, recommender, engine
        self.total_steps = total_steps
        self.sample_items = BatchItemSampler(config.loss, recommender.rows, training_counts)
        self.loss = NextItemLoss(config, recommender.num_items)
        self.owned: OwnedGradients | None = None
        if config.train.grad_clip and OwnedGradients.needed_by(recommender.tables, recommender.world):
            self.owned = OwnedGradients(recommender.tables)

    def __call__(
        self, step: int, batch: SequenceBatch, applied: int | None = None, votes: Sequence[bool] = ()
    ) -> StepResult:
        """Runs step number ``step`` (from 0) on this rank's part of the batch, which may be empty.

        Args:
            applied: number of optimizer steps that produced the weights, on which Adam's bias correction depends; None:
                ``step``.
            votes: this rank's votes; the result says for each whether any rank voted yes.
        """
        lr = self._set_lr(step)
        # FBGEMM's Adam counts every lookup as a step, even in an evaluation or without an update.
        self.recommender.tables.set_optimizer_step(step if applied is None else applied)
        gradients = self.backward(step, batch, votes)
        return StepResult(
            loss=gradients.loss,
            skipped=not self.update(gradients),
            votes=gradients.votes,
            tokens=gradients.tokens,
            lr=lr,
            counts=gradients.counts,
            routing=gradients.routing,
        )

    def backward(self, step: int, batch: SequenceBatch, votes: Sequence[bool] = ()) -> Gradients:
        """Computes the gradients of the global mean loss: the decoder's stay in the engine, the rows' are returned."""
        world, train = self.recommender.world, self.config.train
        with region("data"):
            parts = [part.to(world.device) for part in batch.split(train.micro_batches)]
        seed = mix_seed(train.seed, step)
        with region("lookup"):
            items = self.sample_items(parts, seed, self._targets_of_all_ranks(parts))
            looked_up = self.recommender.tables.lookup(items[0].ids)
        self.engine.train()
        # Backward stops here. The tables' backward may update them immediately, so it waits until all gradients are finite.
        item_rows = looked_up.detach().requires_grad_()
        done = []
        for number, (part, part_items) in enumerate(zip(parts, items, strict=True), 1):
            if len(parts) > 1:
                self.engine.set_gradient_accumulation_boundary(number == len(parts))
            done.append(self._part(part, part_items, item_rows, batch, seed))
        assert item_rows.grad is not None
        losses, counts = torch.stack([part.losses for part in done]), torch.stack([part.counts for part in done]).sum(0)
        with region("optimizer"):
            spoiled = is_spoiled([item_rows.grad, *reduced_gradients(self.engine)], world.size)
            squares = self._squared_norm(items[0].ids, looked_up, item_rows.grad)
        own = [losses.sum(), spoiled.double(), squares, *(losses.new_full((), vote) for vote in votes)]
        targets = torch.stack([done[0].targets.double(), done[0].weight.double()])  # of all ranks already
        # One exchange, and one read, for all that the host wants to know of a step.
        loss, spoiled, squares, *given, tokens, weight = torch.cat([world.sum(torch.stack(own)), targets]).tolist()
        loss, tokens = loss / weight, int(tokens)
        return Gradients(
            loss=loss,
            finite=math.isfinite(loss) and not spoiled,
            norm=math.sqrt(squares) if self.config.train.grad_clip else None,
            votes=tuple(vote > 0 for vote in given),
            tokens=tokens,
            counts=counts,
            routing=[Routing.of_parts(list(blocks)) for blocks in zip(*(part.routing for part in done), strict=True)],
            looked_up=looked_up,
            item_rows=item_rows.grad,
        )

    def _squared_norm(self, ids: Tensor, looked_up: Tensor, rows: Tensor) -> Tensor:
        """() float64 this rank's share of the sum of squares of all gradients; 0 if no limit is set."""
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        if not self.config.train.grad_clip:
            return total
        for part in reduced_gradients(self.engine):
            total = total + part.double().square().sum()
        if self.owned is not None:
            looked_up.backward(rows)  # as far as the owners of the rows
            return total + self.owned.squared_norm()
        world = self.recommender.world
        sums = sum_over_ranks(world, ids, rows, self.recommender.rows.num_rows)
        return total + sums.double().div_(world.size).square_().sum()

    def _targets_of_all_ranks(self, parts: list[SequenceBatch]) -> Tensor | None:
        """(n,) int64 the trained targets of the global batch in the order of users and places; None: they are not needed."""
        if self.config.loss.sampling != "in_batch":
            return None
        rows = []
        for part in parts:
            tokens = torch.arange(part.num_tokens, device=part.item_ids.device)
            places = token_places(part, tokens if part.trained is None else tokens[part.trained])
            rows.append(torch.stack([places, part.trained_targets], dim=1))
        places, targets = torch.cat(self.recommender.world.gather(torch.cat(rows))).unbind(1)
        targets, order = targets.sort()  # windows of one user may have the same places
        return targets[places[order].argsort(stable=True)]

    def _part(
        self, part: SequenceBatch, items: BatchItems, item_rows: Tensor, batch: SequenceBatch, seed: int
    ) -> _Part:
        """Forward and backward of one part of this rank's batch."""
        world = self.recommender.world
        rows = items.inputs
        keys = sequence_keys(part, seed) if self.config.model.dropout else None
        output = self.engine(item_rows, rows.items, part.seq_offsets, part.timestamps, rows.events, rows.users, keys)
        counts = torch.stack([r.counts for r in output.routing]) if output.routing else part.seq_offsets.new_zeros(0)
        # Users' tokens have no target, but are routed to experts too.
        routed = part.num_tokens + (part.num_sequences if rows.users.shape[1] else 0)
        # Filled on the device: a copy of host memory would wait for it.
        numbers = (routed, part.num_tokens, batch.num_tokens, batch.num_targets)
        sizes = torch.stack([counts.new_full((), number) for number in numbers])
        summing = world.start_sum(torch.cat([counts.flatten(), sizes]))
        with region("loss"):
            losses = self.loss(output.hidden, item_rows, items)
            if part.trained is not None:
                losses = losses.masked_fill(~part.trained, 0.0)
            if part.target_weights is not None:
                losses = losses * part.target_weights
        summed, sizes = summing().split([counts.numel(), 4])
        counts, (routed, part_tokens, tokens, targets) = summed.view(counts.shape), sizes.clamp(min=1)
        weight = targets
        if batch.target_weights is not None:  # a batch without any target has the loss 0
            (weight,) = world.sum(batch.target_weights.double().sum()[None].to(losses.device))
            weight = torch.where(weight > 0, weight, 1.0)
        with region("loss"):
            balance = self._balance(output.routing, counts, routed) * (part_tokens / tokens)
            total = losses.sum() / weight + balance
        with region("backward"):
            self.engine.backward(total * world.size)  # DeepSpeed and TorchRec average gradients over the ranks
        return _Part(losses.detach().double().sum(), counts, targets, weight, output.routing)

    @region("optimizer")
    def update(self, gradients: Gradients) -> bool:
        """Steps decoder and tables; if a gradient is not finite, drops all gradients and changes no bit."""
        limit, tables = self.config.train.grad_clip, self.recommender.tables
        if not gradients.finite:
            skip_step(self.engine)
            if self.owned is not None:
                self.owned.drop()
            return False
        if gradients.norm is not None and (factor := limit / (gradients.norm + 1e-6)) < 1:
            for part in reduced_gradients(self.engine):
                part.mul_(factor)
            if self.owned is None:
                gradients.item_rows.mul_(factor)
            else:
                self.owned.scale(factor)
        self.engine.step()
        if self.owned is None:
            gradients.looked_up.backward(gradients.item_rows)
        else:
            self.owned.apply()
        tables.step()
        return True

    def _balance(self, routing: list[Routing], counts: Tensor, tokens: Tensor) -> Tensor:
        """This rank's share of the routers' losses, summed over the blocks; ``tokens`` were routed on all ranks."""
        moe = self.config.model.moe
        rows = tokens * self.config.model.num_tables
        total = torch.zeros((), device=tokens.device)
        for block, block_counts in zip(routing, counts, strict=True):
            total = total + moe.load_balance_coef * load_balance_loss(block, block_counts.sum(0), rows)
            if moe.z_loss_coef:
                total = total + moe.z_loss_coef * router_z_loss(block, rows)
        return total

    def _set_lr(self, step: int) -> float:
        train = self.config.train
        factor = lr_factor(train.lr_schedule, train.warmup_steps, step, self.total_steps)
        set_lr(self.engine, train.lr * factor)
        self.recommender.tables.set_lr((train.table_lr or train.lr) * factor)
        return train.lr * factor


def lr_factor(schedule: str, warmup_steps: int, step: int, total_steps: int) -> float:
    """The factor of the learning rates at ``step``, from 0: linear warm-up, then constant or half a cosine period."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
