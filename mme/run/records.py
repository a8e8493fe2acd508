"""The kinds of lines in metrics.jsonl, which are checked when they are read.

{"kind": "run",     "step": 0, "world_size": 2, "device": …, "parameters": {part: count}, "versions": {…}, …}
{"kind": "train",   "step": 10, "epoch": 0, "loss": 6.91…, "tokens_per_s": …, "lr": …, "step_ms": …, …}
            "peak_mem_gib", on a GPU with a known peak "mfu", and with several processes "wait_ms", "exposed_communication",
            "straggler_ms" and "slowest_rank" (`mme.distributed.pace`)
{"kind": "experts", "step": 10, "blocks": [0, 1], "load": [block][view][expert], "entropy": [block][view], …}
{"kind": "eval",    "step": 100, "model": "fuxi-mme", "split": "valid", "protocol": …, "ndcg@10": …, …}

Every key but the step is optional, so that readers work with runs of earlier versions; unknown keys and kinds are kept.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=0, le=2**53)]  # the largest whole number that a browser reads exactly
Share = Annotated[float, Field(ge=0, le=1)]


class JsonObject(BaseModel):
    """A JSON object: values are not converted, numbers are finite, unknown keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Record(JsonObject):
    kind: str
    step: Count


class TableRecord(JsonObject):
    """See `mme.table_placement.TablePlacement`."""

    table: str
    rows: Count
    columns: Count
    sharding: str
    placement: Literal["device", "uvm", "uvm_caching"]
    holders: Count
    ranks: Count
    on_gpu: bool
    device_bytes: Count
    host_bytes: Count
    cache_load_factor: Share | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class RunRecord(Record):
    step: Count = 0
    time: str | None = None
    device: str | None = None
    world_size: Annotated[int, Field(ge=1, le=2**53)] = 1
    parameters: dict[str, Count] | None = None
    tables: list[TableRecord] = []
    versions: dict[str, str] = {}


class TrainRecord(Record):
    epoch: Count | None = None
    loss: float | None = None  # None where it was not finite
    tokens_per_s: float | None = None
    lr: float | None = None
    step_ms: float | None = None
    wait_ms: float | None = None
    straggler_ms: float | None = None
    exposed_communication: float | None = None
    mfu: float | None = None
    peak_mem_gib: float | None = None


class ExpertsRecord(Record):
    blocks: list[Count]
    load: list[list[list[Share]]]
    entropy: list[list[float]] | None = None
    dropped: list[list[float]] | None = None

    @model_validator(mode="after")
    def _check_shapes(self) -> ExpertsRecord:
        experts = {len(shares) for views in self.load for shares in views}
        if not self.load or not all(self.load) or len(experts) != 1 or 0 in experts:
            raise ValueError("load: expected shares by block, view and expert, as many in each list")
        for name, by_block in {"load": self.load, "entropy": self.entropy, "dropped": self.dropped}.items():
            if by_block is not None and (len(by_block) != len(self.blocks) or not all(by_block)):
                raise ValueError(f"{name}: expected a list for each of the {len(self.blocks)} blocks")
        return self


class Groups(JsonObject):
    """The experts' ``share`` [block][group][expert] of the choices of each of the ``groups``."""

    groups: list[str]
    share: list[list[list[Share]]]


class RoutingShares(JsonObject):
    blocks: list[Count]
    view: Groups
    popularity: Groups
    position: Groups

    @model_validator(mode="after")
    def _check_shapes(self) -> RoutingShares:
        for name in ("view", "popularity", "position"):
            of: Groups = getattr(self, name)
            experts = {len(shares) for by_group in of.share for shares in by_group}
            if (
                len(of.share) != len(self.blocks)
                or any(len(by_group) != len(of.groups) for by_group in of.share)
                or len(experts) != 1
                or 0 in experts
            ):
                raise ValueError(f"{name}.share: expected shares by block, group and expert, as many in each list")
        return self


class ViewRanking(JsonObject):
    users: Count
    all_views: float
    by_view: list[float] = Field(alias="ndcg@10")


class Neighbour(JsonObject):
    item: str
    similarity: float


class Neighbours(JsonObject):
    """An item by name, its events in training, and the items that are nearest to it."""

    item: str
    events: Count
    nearest: list[Neighbour]


class Insight(JsonObject):
    """See `mme.evaluation.insight`."""

    singular_values: list[Annotated[list[float], Field(min_length=1)]] = Field(min_length=1)
    effective_rank: list[float]
    similarity: list[list[float]]
    neighbours: list[Neighbours] = []
    ranking: ViewRanking | None = None
    routing: RoutingShares | None = None
    time_weights: list[list[float]] = []
    position_weights: list[list[float]] = []
    longest_gap_s: Count | None = None

    @model_validator(mode="after")
    def _check_shapes(self) -> Insight:
        if any(len(row) != len(self.similarity) for row in self.similarity):
            raise ValueError("similarity: expected as many rows as columns")
        return self


class Segment(JsonObject):
    """See `mme.evaluation.segments.group_means`."""

    group: str
    users: Count
    ndcg_at_10: Share = Field(alias="ndcg@10")
    standard_error: Annotated[float, Field(ge=0)]


class Example(JsonObject):
    """A user by raw ids: the newest events, oldest first; the first items of the model's list; the target and its rank."""

    user: str
    history: list[str]
    top: list[str]
    target: str
    rank: Count | None = None


class EvalRecord(Record):
    model: str | None = None
    split: str | None = None
    protocol: str | None = None
    sort_rule: str | None = None
    targets_sha256: str | None = None
    users: Count | None = None
    seen: str | None = None
    repeated_targets: Share | None = None
    standard_errors: dict[str, float] = {}
    segments: dict[str, list[Segment]] = {}
    examples: list[Example] = []
    insight: Insight | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_metrics(cls, record: dict[str, Any]) -> dict[str, Any]:
        for name, value in record.items():
            if (name == "mrr" or "@" in name) and value is not None and not 0 <= _number(name, value) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, found {value!r}")
        return record


KINDS: dict[str, type[Record]] = {
    "run": RunRecord,
    "train": TrainRecord,
    "experts": ExpertsRecord,
    "eval": EvalRecord,
}


def flaw(record: dict[str, Any]) -> str | None:
    """The first field of a record that does not fit its kind, and its value; None if the record is valid."""
    try:
        KINDS.get(record["kind"], Record).model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if (
            first["type"] == "value_error"
        ):  # raised by a check above, whose message begins with the field below this location
            return ".".join([*map(str, first["loc"]), str(first["ctx"]["error"])])
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            return f"{field}: missing"
        expected = first["msg"].replace("Input should be", "expected").replace("a valid integer", "a whole number")
        return f"{field}: {expected.replace('a valid', 'a')}, found {_shortened(first['input'])}"
    return None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number, found {_shortened(value)}")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
