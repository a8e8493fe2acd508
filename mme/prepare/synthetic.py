"""Generates the embedded data set by a seeded process of items with facets, drifting interests, sessions and gaps in time.

An item has one value of each of several independent facets and a popularity that falls as a power of its rank. An
interest is a conjunction, "value a of one facet and value b of another", and matches a few dozen items. A user has a
few interests; how strongly each draws follows a random walk in time that is pulled back to its start (Ornstein and
Uhlenbeck), so that interests fade and return. Events come in sessions: seconds to minutes apart inside one, hours to
days between. A session has one interest: with probability `STAY` that of the last session, otherwise one sampled by its current
strength. An event takes an item that matches the session's interest with probability 1 - `NOISE`, otherwise any item. Items are
sampled by popularity, and a user never gets an item twice.

The oracle knows the process, the user's state and the time of the event to be predicted, but not the random outcome of that
event. It ranks by the exact probability of each item. No model can do better on average.

Legend: U users, I items, K interests of a user.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mme.data.remote_set import set_to_write
from mme.errors import UserError
from mme.prepare.writer import DatasetWriter

Array = NDArray[Any]

GENERATOR_VERSION = 1
FACET_SIZES = (8, 10, 12, 14)  # at 2,000 items; grows with the square root of the number of items
ITEMS_OF_SIZES = 2000
MIN_MATCHING = 12  # least number of items that an interest matches, if the catalogue allows it
POPULARITY_EXPONENT = 0.6
INTERESTS_PER_USER = 4
STRENGTH_SPREAD = 1.2  # standard deviation of an interest's log strength
STRENGTH_MEMORY_S = 10 * 86_400  # after this time the log strength has kept 1/e of its distance
STAY = 0.3
NOISE = 0.1
NEW_SESSION = 1 / 7
MEAN_EVENTS, MIN_EVENTS, MAX_EVENTS = 50, 10, 160
FIRST_DAY_S = 1_700_000_000
FIRST_DAYS_S = 60 * 86_400  # users arrive over this time
USERS_AT_ONCE = 1024


def prepare_synthetic(
    name: str, output: str | Path, users: int = 3000, items: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Generates a data set, writes it as a training set and returns the content of dataset.json.

    ``name`` is `quickstart`, the only process so far. dataset.json has, besides the counts, `oracle`: for `valid` and
    `test` of the protocol leave_two_out the hr@10 and ndcg@10 of the oracle. The same arguments give the same files.

    Raises:
        UserError: an unknown name, too few users or items, or the folder can't be written.
    """
    if name != "quickstart":
        raise UserError(f"--synthetic {name}: no such generator: expected quickstart")
    if items < MIN_EVENTS * 2:
        raise UserError(f"--items {items}: expected at least {MIN_EVENTS * 2}, because no user takes an item twice")
    if users < 1:
        raise UserError(f"--users {users}: expected at least 1")
    catalogue = _catalogue(items, np.random.default_rng([seed, 0]))
    counts = np.zeros(items, np.int64)
    ranks: dict[str, list[Array]] = {"valid": [], "test": []}
    with set_to_write(output) as folder, DatasetWriter(folder) as writer:
        for begin in range(0, users, USERS_AT_ONCE):
            size = min(USERS_AT_ONCE, users - begin)
            chosen, times, offsets, ranked = _simulate(catalogue, size, np.random.default_rng([seed, 1, begin]))
            writer.add(pa.array(np.arange(begin, begin + size)), offsets, chosen, times)
            counts += np.bincount(chosen, minlength=items)
            for split, values in ranked.items():
                ranks[split].append(values)
        info = {
            "name": name,
            "sort_rule": "by time, in the order generated",
            "source": {"generator": name, "version": GENERATOR_VERSION, "users": users, "items": items, "seed": seed},
            "oracle": {split: _metrics(np.concatenate(values)) for split, values in ranks.items()},
        }
        # Raw ids as in a real catalogue: no dense count from 0, and no hint of an item's popularity.
        return writer.finish(info, pa.array(np.arange(items) + 1001), counts)


@dataclass(frozen=True)
class _Catalogue:
    """``popularity`` (I,) float64 sums to 1; ``matches`` (interests, I) bool: the items of each possible interest."""

    popularity: Array
    matches: Array


def _catalogue(num_items: int, rng: np.random.Generator) -> _Catalogue:
    popularity = rng.permutation(np.arange(1, num_items + 1) ** -POPULARITY_EXPONENT)
    growth = math.sqrt(num_items / ITEMS_OF_SIZES)
    facets = [rng.integers(max(2, round(size * growth)), size=num_items) for size in FACET_SIZES]
    pairs = [
        (first == value) & (second == other)
        for first, second in combinations(facets, 2)
        for value in np.unique(first)
        for other in np.unique(second)
    ]
    wide_enough = [pair for pair in pairs if pair.sum() >= MIN_MATCHING]
    return _Catalogue(popularity / popularity.sum(), np.array(wide_enough or pairs))


def _simulate(
    catalogue: _Catalogue, num_users: int, rng: np.random.Generator
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Items, times and offsets of some users' events, and the oracle's rank of the last two events of each user."""
    most = min(MAX_EVENTS, catalogue.popularity.size // 2)  # no user takes an item twice
    length = np.clip(rng.gamma(2.5, MEAN_EVENTS / 2.5, num_users).round(), MIN_EVENTS, most).astype(np.int64)
    # The longest histories come first, so that the users with remaining events are always the first rows.
    length = -np.sort(-length)
    steps = int(length[0])
    interests = rng.integers(len(catalogue.matches), size=(num_users, INTERESTS_PER_USER))
    log_strength = rng.normal(0, STRENGTH_SPREAD, (num_users, INTERESTS_PER_USER))
    session = np.zeros(num_users, np.int64)
    now = FIRST_DAY_S + rng.integers(FIRST_DAYS_S, size=num_users)
    seen = np.zeros((num_users, catalogue.popularity.size), bool)
    items, times = np.zeros((num_users, steps), np.int64), np.zeros((num_users, steps), np.int64)
    ranks = {"valid": np.zeros(num_users, np.int64), "test": np.zeros(num_users, np.int64)}
    for step in range(steps):
        active = int(np.count_nonzero(length > step))
        starts = rng.random(active) < NEW_SESSION if step else np.ones(active, bool)
        gap = _gap(starts, rng)
        if step:
            now[:active] += gap
        log_strength[:active] = _walk(log_strength[:active], gap, rng)
        shares = _interest_shares(log_strength[:active], session[:active], starts, stay=STAY if step else 0.0)
        session[:active] = _draw(shares, rng)
        chosen_interest = interests[np.arange(active), session[:active]]
        chosen = _draw(_item_probabilities(catalogue, chosen_interest, seen[:active]), rng)
        for split, from_end in (("valid", 2), ("test", 1)):
            rows = np.flatnonzero(length[:active] - from_end == step)
            ranks[split][rows] = _oracle_ranks(catalogue, interests[rows], shares[rows], seen[rows], chosen[rows])
        seen[np.arange(active), chosen] = True
        items[:active, step], times[:active, step] = chosen, now[:active]
    # Users are put back in random order, so that the row does not depend on the length.
    order = rng.permutation(num_users)
    kept = np.arange(steps) < length[order, None]
    offsets = np.concatenate([[0], np.cumsum(length[order])])
    return items[order][kept], times[order][kept], offsets, {split: rank[order] for split, rank in ranks.items()}


def _gap(starts: Array, rng: np.random.Generator) -> Array:
    """Seconds since the previous event: about a minute inside a session, about a day before a new one."""
    inside = np.clip(rng.lognormal(math.log(60), 1.0, starts.size), 2, 1_800)
    between = np.clip(rng.lognormal(math.log(86_400), 1.0, starts.size), 7_200, 30 * 86_400)
    return np.where(starts, between, inside).round().astype(np.int64)


def _walk(log_strength: Array, gap: Array, rng: np.random.Generator) -> Array:
    """(U, K) log strengths after ``gap`` seconds; their spread does not change."""
    kept = np.exp(-gap / STRENGTH_MEMORY_S)[:, None]
    return kept * log_strength + np.sqrt(1 - kept**2) * rng.normal(0, STRENGTH_SPREAD, log_strength.shape)


def _interest_shares(log_strength: Array, session: Array, starts: Array, stay: float) -> Array:
    """(U, K) probability that the next event's session has each interest."""
    same = np.eye(INTERESTS_PER_USER)[session]
    strength = np.exp(log_strength)
    fresh = stay * same + (1 - stay) * strength / strength.sum(1, keepdims=True)
    return np.where(starts[:, None], fresh, same)


def _item_probabilities(catalogue: _Catalogue, interest: Array, seen: Array) -> Array:
    """(U, I) probability of each item as the next event of a session with this interest."""
    possible = np.where(seen, 0.0, catalogue.popularity)
    matching = possible * catalogue.matches[interest]
    total = matching.sum(1, keepdims=True)
    noise = np.where(total > 0, NOISE, 1.0)  # if the user has had every item that matches
    possible *= noise / possible.sum(1, keepdims=True)
    return possible + matching * ((1 - noise) / np.where(total > 0, total, 1.0))


def _draw(probabilities: Array, rng: np.random.Generator) -> Array:
    """Samples one column of each row by its probability."""
    cumulative = np.cumsum(probabilities, axis=1)
    threshold = rng.random(len(cumulative)) * cumulative[:, -1]
    return (cumulative <= threshold[:, None]).sum(1)


def _oracle_ranks(catalogue: _Catalogue, interests: Array, shares: Array, seen: Array, chosen: Array) -> Array:
    """(U,) rank, from 1, of the chosen item in the order of the items' exact probability."""
    probabilities = np.zeros(seen.shape)
    for place in range(INTERESTS_PER_USER):
        probabilities += shares[:, place, None] * _item_probabilities(catalogue, interests[:, place], seen)
    return 1 + (probabilities > probabilities[np.arange(len(chosen)), chosen, None]).sum(1)


def _metrics(ranks: Array) -> dict[str, float]:
    hit = ranks <= 10
    return {"hr@10": float(hit.mean()), "ndcg@10": float(np.where(hit, 1 / np.log2(ranks + 1), 0.0).mean())}
