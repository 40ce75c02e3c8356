"""Recorded routing: which experts each token of a run went to, step by step, as a file and as demands to replay.

Knows nothing of what routed or of where experts lie. A file is one safetensors file: for each layer a table of expert
ids, beside it where each step's tokens begin. Weights and texts are not in it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moesys.errors import DataError
from moesys.kernels import BankView, ModuleView
from moesys.moe.choice import Choice
from moesys.moe.expert_key import ExpertKey
from moesys.moe.routing import Routing
from moesys.moe.source import ExpertSource

_FORMAT = "moesys-routing"
_VERSION = "1"
_STEPS = "step_offsets"
_LARGEST_OF_BYTE = 255
"""Expert ids below it are stored in a byte each; itself it stands for no expert there."""


@dataclass(frozen=True)
class RoutingLog:
    """The experts of every token, in the order in which tokens came.

    expert_ids:    by layer, (tokens, k) int16, best first; -1 where a token has fewer, or one was dropped.
    num_experts:   by layer, of how many they were chosen.
    step_offsets:  (steps + 1,) int64: step i routed the tokens [step_offsets[i], step_offsets[i + 1]).
    origin:        what was recorded, for people.

    Raises `DataError` for tables that do not fit together.
    """

    expert_ids: Mapping[int, Tensor]
    num_experts: Mapping[int, int]
    step_offsets: Tensor
    origin: str = ""

    def __post_init__(self) -> None:
        reason = self._find_misfit()
        if reason is not None:
            raise DataError(f"a routing log {reason}; record it anew")

    @property
    def layer_ids(self) -> list[int]:
        """In the order in which a token passes them."""
        return sorted(self.expert_ids)

    @property
    def num_tokens(self) -> int:
        return int(self.step_offsets[-1])

    @property
    def num_steps(self) -> int:
        return self.step_offsets.shape[0] - 1

    @property
    def keys(self) -> list[ExpertKey]:
        """Every expert that could have been chosen, layer by layer."""
        return [(layer_id, e) for layer_id in self.layer_ids for e in range(self.num_experts[layer_id])]

    def demands(self) -> Iterator[tuple[ExpertKey, ...]]:
        """Yields for each step, and in it for each layer, the experts that it needs, by number."""
        tables = {layer_id: self.expert_ids[layer_id].numpy() for layer_id in self.layer_ids}
        offsets = self.step_offsets.tolist()
        for start, end in pairwise(offsets):
            for layer_id, table in tables.items():
                chosen = set(table[start:end].ravel().tolist())
                yield tuple((layer_id, expert) for expert in sorted(chosen) if expert >= 0)

    def get_choice(self, step: int, layer_id: int) -> Choice:
        """Returns the experts of a step's tokens, to be given to a layer instead of its router's choice."""
        start, end = self.step_offsets[step : step + 2].tolist()
        table = self.expert_ids[layer_id][start:end].long()
        is_chosen = table >= 0
        if bool(is_chosen.all()):
            return Choice.from_table(table)
        counts = is_chosen.sum(dim=1)
        return Choice(table[is_chosen], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def get_routing(self, step: int, layer_id: int) -> Routing:
        """Returns a step's routing; its weights, which are not recorded, are equal."""
        choice = self.get_choice(step, layer_id)
        ids = choice.expert_ids
        weights = torch.full(ids.shape, 1 / max(1, self.expert_ids[layer_id].shape[1]))
        return Routing(ids, weights, choice.token_offsets, self.num_experts[layer_id], choice.fixed_k)

    def regroup(self, num_sequences: int) -> RoutingLog:
        """Returns the same tokens as if ``num_sequences`` sequences had been decoded together, a token of each per
        step: the log is cut into as many runs of equal length, and what is left over falls away.

        Raises `DataError` for more sequences than tokens.
        """
        if not 1 <= num_sequences <= self.num_tokens:
            raise DataError(
                f"the number of sequences ({num_sequences}) must be between 1 and the tokens of the log "
                f"({self.num_tokens})"
            )
        num_steps = self.num_tokens // num_sequences
        order = torch.arange(num_sequences * num_steps).view(num_sequences, num_steps).T.flatten()
        return RoutingLog(
            {layer_id: table[order] for layer_id, table in self.expert_ids.items()},
            self.num_experts,
            torch.arange(num_steps + 1) * num_sequences,
            self.origin,
        )

    def write(self, path: Path) -> None:
        """Writes the log; a file of that name is replaced when the new one is complete. Raises `OSError`; nothing is
        left of the new one then."""
        fits_bytes = max(self.num_experts.values()) <= _LARGEST_OF_BYTE
        tensors = {
            str(layer_id): _to_bytes(table) if fits_bytes else table.contiguous()
            for layer_id, table in self.expert_ids.items()
        }
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "num_experts": json.dumps({str(layer_id): n for layer_id, n in self.num_experts.items()}),
            "origin": self.origin,
        }
        draft = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            draft.write_bytes(save(tensors | {_STEPS: self.step_offsets.to(torch.int32)}, metadata))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> RoutingLog:
        """Reads what `write` wrote. Raises `DataError` for any other file, and `OSError` where there is none."""
        if path.is_dir():
            raise DataError(f"{path} is a folder, and a file of recorded routing is needed")
        path.stat()
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise DataError(f"{path} is not a safetensors file ({error}); record the routing anew") from None
        if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION) or _STEPS not in tensors:
            raise DataError(
                f"{path} is not recorded routing of version {_VERSION}: its format is {metadata.get('format')!r}, its "
                f"version {metadata.get('version')!r}; record the routing anew"
            )
        offsets = tensors.pop(_STEPS).long()
        try:
            num_experts = {
                int(layer_id): int(n) for layer_id, n in json.loads(metadata["num_experts"]).items()
            }
            tables = {int(name): _from_bytes(table) for name, table in tensors.items()}
            return cls(tables, num_experts, offsets, metadata.get("origin", ""))
        except (KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: {error}") from None

    def _find_misfit(self) -> str | None:
        offsets = self.step_offsets
        if offsets.ndim != 1 or not offsets.shape[0] or offsets[0] != 0 or bool((offsets.diff() < 0).any()):
            return "has step offsets that do not count up from 0"
        if not self.expert_ids or set(self.expert_ids) != set(self.num_experts):
            return f"has tables of layers {sorted(self.expert_ids)} and sizes of {sorted(self.num_experts)}"
        for layer_id, table in self.expert_ids.items():
            if table.ndim != 2 or table.shape[0] != self.num_tokens or table.dtype != torch.int16:
                return (
                    f"needs int16 tables of {self.num_tokens} tokens, and that of layer {layer_id} is {table.dtype} of "
                    f"shape {tuple(table.shape)}"
                )
            if table.numel() and not -1 <= int(table.min()) <= int(table.max()) < self.num_experts[layer_id]:
                return (
                    f"holds experts {int(table.min())} to {int(table.max())} for layer {layer_id}, which has "
                    f"{self.num_experts[layer_id]}"
                )
        return None


class RoutingRecorder:
    """An expert source that writes down what is hinted to the one behind it, which does the work.

    A step begins where a layer comes again. One that ended early, as after an error, is left out of the log.
    """

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        self._steps: list[dict[int, Tensor]] = []
        self._num_experts: dict[int, int] = {}

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`."""
        if not self._steps or layer_id in self._steps[-1]:
            self._steps.append({})
        self._steps[-1][layer_id] = _tabulate(routing)
        self._num_experts[layer_id] = routing.num_experts
        self._source.hint(layer_id, routing)

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
        """See `ExpertSource`."""
        return self._source.acquire(layer_id, demand)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`."""
        self._source.release(layer_id, view)

    def make_log(self, origin: str = "") -> RoutingLog:
        """Returns what was recorded so far. Raises `DataError` where that is no complete step."""
        steps = [step for step in self._steps if step.keys() == self._num_experts.keys()]
        if not steps:
            raise DataError(
                "nothing was recorded; run the model with the recorder as its expert source first"
            )
        counts = torch.tensor([0] + [next(iter(step.values())).shape[0] for step in steps])
        tables = {
            layer_id: _join([step[layer_id] for step in steps]) for layer_id in sorted(self._num_experts)
        }
        return RoutingLog(tables, dict(self._num_experts), counts.cumsum(0), origin)


def _tabulate(routing: Routing) -> Tensor:
    """Returns (tokens, k) int16, -1 for no expert."""
    ids = routing.expert_ids.to("cpu", torch.int16)
    if routing.dropped is not None:
        ids.masked_fill_(routing.dropped.cpu(), -1)
    if routing.fixed_k is not None:
        return ids.view(-1, routing.fixed_k)
    ranks = routing.choice.compute_ranks().cpu()
    width = int(ranks.max()) + 1 if ranks.numel() else 1
    table = ids.new_full((routing.num_tokens, width), -1)
    table[routing.compute_token_ids().cpu(), ranks] = ids
    return table


def _join(tables: list[Tensor]) -> Tensor:
    width = max(table.shape[1] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, width - table.shape[1]), value=-1) for table in tables]
    return torch.cat(padded)


def _to_bytes(table: Tensor) -> Tensor:
    return table.where(table >= 0, _LARGEST_OF_BYTE).to(torch.uint8).contiguous()


def _from_bytes(table: Tensor) -> Tensor:
    if table.dtype != torch.uint8:
        return table
    return table.to(torch.int16).masked_fill(table == _LARGEST_OF_BYTE, -1)
