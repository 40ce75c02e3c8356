"""moesys: resident, or within a budget of memory with its experts in the slots of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from decode_peers import UnavailableError
from decode_peers.replay import ReplayTape
from decode_peers.traffic import Traffic, count_best_loads, count_replayed_loads
from decode_peers.workload import Feed, Format, Phase, Task
from moesys.checkpoint import load_model
from moesys.inference import Engine, OffloadedModel, SequenceStep, Watch, load_offloaded
from moesys.inference.generate import PREFILL_TOKENS
from moesys.inference.offload_plan import OffloadRequest
from moesys.models import Decoder
from moesys.moe import Execution
from moesys.moe.routing_log import RoutingLog


@contextmanager
def open_system(variant: str, task: Task) -> Iterator[OurDecoding]:
    """``resident`` holds everything, and so does ``budget`` where the task has no cap."""
    path = task.files.folder if task.form is Format.BF16 else task.files.packed(task.form)
    if not path.exists():
        raise UnavailableError(f"{path.name} is not there; moesys pack writes it")
    log = None if task.files.routing is None else RoutingLog.read(task.files.routing)
    if variant == "resident" or task.cap_bytes is None:
        model = load_model(path)
        yield OurDecoding(model, model.make_resident_execution(), PREFILL_TOKENS, None, log)
        return
    request = OffloadRequest(
        f"{task.cap_bytes}B",
        num_positions=max(phase.num_positions for phase in task.phases),
        batch_size=max(phase.batch for phase in task.phases),
    )
    with load_offloaded(path, request, watch=Watch(records=True)) as offloaded:
        yield OurDecoding(offloaded.model, offloaded.execution, offloaded.plan.prefill_tokens, offloaded, log)


class OurDecoding:
    """An engine over the sequences of a phase."""

    def __init__(
        self,
        model: Decoder,
        execution: Execution,
        prefill_tokens: int,
        offloaded: OffloadedModel | None,
        log: RoutingLog | None,
    ) -> None:
        """prefill_tokens: of all sequences, in one pass. offloaded: None for a model that is held as a whole."""
        self._model = model
        self._execution = execution
        self._prefill_tokens = prefill_tokens
        self._num_pages = None if offloaded is None else offloaded.num_pages
        self._meter = None if offloaded is None else _Meter(offloaded)
        self._log = log
        self._engine: Engine | None = None
        self._sequence_ids: list[int] = []
        self._length = 0
        self._num_counted = 0
        self._tape: ReplayTape | None = None

    def begin(self, phase: Phase, prompts: Sequence[Sequence[int]]) -> list[int]:
        """See `Decoding`."""
        execution, self._tape = self._execution, None
        if phase.feed is Feed.REPLAY:
            if self._log is None:
                raise UnavailableError("there is no recorded routing; record_routing.py makes it")
            self._tape = ReplayTape(self._log, len(self._model.blocks), phase.batch)
            execution = replace(execution, tape=self._tape)
        self._engine = Engine(self._model, execution, num_pages=self._num_pages)
        self._sequence_ids = [self._engine.open_sequence(phase.num_positions) for _ in prompts]
        self._length = 0
        chunk = max(1, self._prefill_tokens // len(prompts))
        favourites = [0] * len(prompts)
        for start in range(0, phase.prompt_tokens, chunk):
            favourites = self._run([prompt[start : start + chunk] for prompt in prompts])
        return favourites

    def step(self, tokens: Sequence[int]) -> list[int]:
        """See `Decoding`."""
        return self._run([[token] for token in tokens])

    def mark(self) -> None:
        """See `Decoding`."""
        self._num_counted = 0
        if self._meter is not None:
            self._meter.mark()

    def count_traffic(self) -> Traffic | None:
        """See `Decoding`."""
        return None if self._meter is None else self._meter.count(self._num_counted)

    def _run(self, tokens: Sequence[Sequence[int]]) -> list[int]:
        """Adds equally many tokens to each sequence."""
        assert self._engine is not None
        steps = [
            SequenceStep(sequence_id, self._length, new, num_logits=1)
            for sequence_id, new in zip(self._sequence_ids, tokens, strict=True)
        ]
        if self._tape is not None:
            self._tape.plan(len(tokens[0]))
        self._length += len(tokens[0])
        self._num_counted += 1
        return [int(logits[-1].argmax()) for logits in self._engine.step(steps)]


class _Meter:
    """Compares what the cache read since a mark with what the recorded demands would have cost at best.

    OLMoE's experts are all of one shape, so that there is one cache.
    """

    def __init__(self, offloaded: OffloadedModel) -> None:
        (self._cache,) = offloaded.caches.values()
        assert offloaded.recorder is not None
        self._recorder = offloaded.recorder
        self._keys = list(offloaded.experts.sections)
        self.mark()

    def mark(self) -> None:
        self._start = [key for key in self._keys if self._cache.is_ready(key)]
        self._stats = replace(self._cache.stats)

    def count(self, num_steps: int) -> Traffic:
        """num_steps: since the mark."""
        log = self._recorder.make_log()
        demands = list(log.demands())[-num_steps * len(log.layer_ids) :]
        num_slots = self._cache.pool.num_slots
        now, then = self._cache.stats, self._stats
        return Traffic(
            num_demands=sum(map(len, demands)),
            num_loads=now.num_loads - then.num_loads,
            loaded_bytes=now.loaded_bytes - then.loaded_bytes,
            used_bytes=now.used_bytes - then.used_bytes,
            num_best=count_best_loads(demands, num_slots, self._start),
            num_replayed=count_replayed_loads(demands, num_slots, self._start),
        )
