"""The record of a run: one JSON object per line, three kinds of line, a writer and a reader.

Knows the fields of each line and how a crash can damage the file; does not know how the numbers came about
or who draws them. The idea: the file is append-only and each line is flushed, so a crash can cost at most the
last line. Readers and writers forgive that one line and no other.

Lines are strict JSON (RFC 8259), which has no NaN: floats that are not finite are written as the strings
``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` and become floats again when read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, get_type_hints

from moesys.checkpoint import FileSystem, replace_file
from moesys.errors import DataError, MissingExtraError

METRICS_FILE = "metrics.jsonl"
"""Name of the metrics file in a run's folder."""


@dataclass(frozen=True)
class TrainMetrics:
    """What training did since the previous line of this kind. Skipped steps count in ``tokens_per_s`` and in
    ``skipped_steps`` alone; where no step was applied, counts are 0 and means NaN."""

    step: int
    """Optimizer steps done since the run began."""
    tokens: int
    """Target tokens trained on since the run began; those of skipped steps do not count."""
    elapsed_s: float
    """Seconds of training since the run began, over all resumes."""
    loss: float
    """Cross-entropy in nats per target token, without the balance and z-losses."""
    bits_per_byte: float
    """The same cross-entropy in bits per byte of text."""
    learning_rate: float
    """Learning rate of the step."""
    gradient_norm: float
    """Global gradient norm before clipping."""
    tokens_per_s: float
    """Target tokens computed per second since the previous line, those of skipped steps included."""
    gemm_share: float | None
    """Arithmetic rate as a share (0 to 1) of the measured GEMM rate; None where it was not measured."""
    balance_loss: float
    """Load-balance loss, averaged over MoE layers, before its coefficient."""
    router_z_loss: float
    """Router z-loss, averaged over MoE layers, before its coefficient."""
    moe_layers: list[int]
    """Indices of the MoE layers in the decoder; empty for a dense model."""
    expert_tokens: list[list[int]]
    """Per MoE layer, the tokens given to each expert since the previous line."""
    imbalance: float
    """Tokens of the busiest expert divided by the mean, averaged over MoE layers; NaN for a dense model."""
    routing_entropy: float
    """Entropy of the router's probabilities divided by ln(num_experts), averaged over layers; 0 to 1."""
    router_confidence: float
    """Mean probability of a token's first choice."""
    dropped: int
    """Assignments dropped since the previous line; 0 in a dropless run."""
    skipped_steps: int = 0
    """Steps since the previous line that were not applied, for NaN or Inf in loss or gradients."""


@dataclass(frozen=True)
class EvaluationMetrics:
    """One evaluation on held-out text."""

    step: int
    """Optimizer steps done when it was made."""
    tokens: int
    """Target tokens trained on by then."""
    elapsed_s: float
    """Seconds of training since the run began."""
    heldout_loss: float
    """Cross-entropy in nats per held-out token."""
    heldout_bits_per_byte: float
    """The same cross-entropy in bits per byte of held-out text."""
    heldout_tokens: int
    """Held-out target tokens that were scored."""


@dataclass(frozen=True)
class EventMetrics:
    """Something that happened once and that a reader of the run should know."""

    step: int
    """Optimizer steps done when it happened."""
    elapsed_s: float
    """Seconds of training since the run began."""
    event: str
    """A short name, such as ``skipped_step``, ``checkpoint``, ``resumed``, ``damaged_checkpoint``."""
    message: str
    """A sentence for people."""


Record = TrainMetrics | EvaluationMetrics | EventMetrics

_RECORD_TYPES: dict[str, type[Record]] = {
    "train": TrainMetrics,
    "evaluate": EvaluationMetrics,
    "event": EventMetrics,
}
_NON_FINITE = ("NaN", "Infinity", "-Infinity")
_KINDS = {record_type: kind for kind, record_type in _RECORD_TYPES.items()}
_FIELD_TYPES = {record_type: get_type_hints(record_type) for record_type in _KINDS}
_REQUIRED = {
    record_type: {f.name for f in fields(record_type) if f.default is MISSING} for record_type in _KINDS
}
"""Fields with a default came later: files written before them stay readable."""


@dataclass(frozen=True)
class RunMetrics:
    """Everything a metrics file holds, each kind in the order of its lines."""

    train: list[TrainMetrics] = field(default_factory=list)
    evaluations: list[EvaluationMetrics] = field(default_factory=list)
    events: list[EventMetrics] = field(default_factory=list)


class MetricsSink(Protocol):
    """Where a run's records go."""

    def write(self, record: Record) -> None:
        """Takes one record; it is on its way to the reader when this returns."""

    def close(self) -> None:
        """Ends writing; the sink is not used again."""


class MetricsWriter:
    """Appends records to a JSONL file and flushes each line.

    A last line that a crash left unreadable is removed on opening, so that it never ends up inside the file.
    Raises CheckpointError, or DiskSpaceError where the disk is full, each with the path.
    """

    def __init__(self, path: Path, files: FileSystem | None = None) -> None:
        self._path = path
        self._files = files or FileSystem()
        with self._files.explained("open", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _mend_last_line(path)
            # Unbuffered: a line that does not fit on the disk must not be tried again when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        line = encode_record(record).encode() + b"\n"
        with self._files.explained("write", self._path, len(line)):
            while line:
                line = line[self._files.system_call(self._file.write, line) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardWriter:
    """Writes the same records as TensorBoard scalars and texts, one tag per field.

    Raises MissingExtraError where the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "train", "writing metrics for TensorBoard") from error
        self._writer = SummaryWriter(log_dir=str(folder))

    def write(self, record: Record) -> None:
        if isinstance(record, EventMetrics):
            self._writer.add_text(f"event/{record.event}", record.message, record.step)
        else:
            kind = _KINDS[type(record)]
            for name, value in vars(record).items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, record.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def encode_record(record: Record) -> str:
    """Returns the record as one line of strict JSON, without the line break."""
    values = {name: _encode_value(value) for name, value in vars(record).items()}
    return json.dumps({"kind": _KINDS[type(record)], **values}, ensure_ascii=False, allow_nan=False)


def decode_record(line: str) -> Record:
    """Returns the record that a line holds.

    Raises ValueError, saying what is wrong, for anything that `encode_record` does not write.
    """
    values = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError("a line must be a JSON object")
    kind = values.pop("kind", None)
    record_type = _RECORD_TYPES.get(kind) if isinstance(kind, str) else None
    if record_type is None:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(_RECORD_TYPES)}")
    types = _FIELD_TYPES[record_type]
    missing, unknown = sorted(_REQUIRED[record_type] - values.keys()), sorted(values.keys() - types.keys())
    if missing or unknown:
        raise ValueError(f"a line of kind {kind} has missing fields {missing} and unknown fields {unknown}")
    return record_type(**{name: _decode_value(name, value, types[name]) for name, value in values.items()})


def read_metrics(path: Path) -> RunMetrics:
    """Reads a metrics file.

    A last line that cannot be read (a crash while it was written) is left out. Any other raises DataError
    naming the file and the line.
    """
    metrics = RunMetrics()
    for _, record in _read_lines(path):
        match record:
            case TrainMetrics():
                metrics.train.append(record)
            case EvaluationMetrics():
                metrics.evaluations.append(record)
            case EventMetrics():
                metrics.events.append(record)
    return metrics


def drop_after(path: Path, step: int) -> int:
    """Removes the lines of steps after ``step``, for a run that goes on from a checkpoint of that step.

    The file is replaced as a whole or not at all; kept lines stay as they are, byte for byte. An unreadable
    last line goes too. Returns how many records were removed; a file that does not exist has none.
    Raises DataError like `read_metrics`, and CheckpointError where the file cannot be written.
    """
    if not path.exists():
        return 0
    num_dropped = 0

    def keep_lines() -> Iterator[bytes]:
        nonlocal num_dropped
        for line, record in _read_lines(path):
            if record.step <= step:
                yield line.rstrip(b"\n") + b"\n"
            else:
                num_dropped += 1

    replace_file(path, keep_lines(), path.stat().st_size)
    return num_dropped


def _read_lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yields each line with its record; raises for an unreadable line once another line follows it."""
    damage: DataError | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if damage is not None:
                raise damage
            try:
                record = decode_record(line.decode("utf-8"))
            except ValueError as error:
                damage = DataError(f"{path}:{number} is not a line of metrics: {error}; remove the line")
                continue
            yield line, record


def _mend_last_line(path: Path) -> None:
    start, line = 0, b""
    with path.open("r+b") as file:
        for following in file:
            start, line = start + len(line), following
        try:
            decode_record(line.decode("utf-8"))
        except ValueError:
            file.truncate(start)
        else:
            if not line.endswith(b"\n"):
                file.seek(0, os.SEEK_END)
                file.write(b"\n")


def _encode_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode_value(name: str, value: object, field_type: Any) -> Any:
    try:
        return _DECODERS[field_type](value)
    except TypeError as error:
        raise ValueError(f"{name} must be {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; it is written as the string {name!r}")


def _decode_int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"an integer, not {value!r}")
    return value


def _decode_float(value: object) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return float(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"a number, not {value!r}")
    return float(value)


def _decode_str(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string, not {value!r}")
    return value


def _decode_optional_float(value: object) -> float | None:
    return None if value is None else _decode_float(value)


def _decode_ints(value: object) -> list[int]:
    if not isinstance(value, list):
        raise TypeError(f"a list of integers, not {value!r}")
    return [_decode_int(item) for item in value]


def _decode_int_lists(value: object) -> list[list[int]]:
    if not isinstance(value, list):
        raise TypeError(f"a list of lists of integers, not {value!r}")
    return [_decode_ints(item) for item in value]


_DECODERS: dict[Any, Callable[[object], Any]] = {
    int: _decode_int,
    float: _decode_float,
    str: _decode_str,
    float | None: _decode_optional_float,
    list[int]: _decode_ints,
    list[list[int]]: _decode_int_lists,
}
