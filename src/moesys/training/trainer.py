"""The training loop: load, step, log, evaluate, save. Reads top to bottom; everything it calls has one file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint import RunState, Selection, list_checkpoints, load_newest_checkpoint, save_checkpoint
from moesys.config import Config
from moesys.data import (
    Batch,
    HeldoutSet,
    PreparedData,
    SequenceLoader,
    heldout_windows,
    prepare_data,
)
from moesys.env import read_cache_dir, read_world_size
from moesys.errors import ConfigError, DataError, ModelFormatError, NonFiniteError
from moesys.kernels import Kernel, use_kernel
from moesys.models import Decoder, DecoderConfig, choose_family
from moesys.moe import Capacity, LoadMeter, MoEConfig
from moesys.training.allocator import keep_freed_memory
from moesys.training.build import (
    build_model,
    build_objective,
    compute_dtype,
    require_trainable,
    resolve_date,
    resolve_dtype,
    resolve_paths,
    select_device,
)
from moesys.training.compatibility import Backend, require_same_config
from moesys.training.console import Console
from moesys.training.diagnose import find_first_nonfinite
from moesys.training.evaluate import Evaluation, evaluate
from moesys.training.interrupt import Interrupted, Interruption
from moesys.training.keys import name_misfits
from moesys.training.log import TrainingLog, Yardstick, open_sinks
from moesys.training.metrics import drop_after, read_metrics
from moesys.training.optimizer import MasterAdamW
from moesys.training.origin import Origin, find_origin
from moesys.training.position import Position
from moesys.training.run_directory import RunDirectory
from moesys.training.schedule import compute_learning_rate
from moesys.training.step import StepResult, TrainingStep
from moesys.units import format_count


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.train` ended."""

    step: int
    interrupted_by: int | None
    """The signal that ended it, everything saved; None when the run is finished."""
    evaluation: Evaluation | None
    """On the whole held-out set, after the last step; None when interrupted."""

    @property
    def is_finished(self) -> bool:
        return self.interrupted_by is None


class Trainer:
    """One run: a model, its optimizer and its data, at some step."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        data: PreparedData,
        console: Console,
        make_model: Callable[[], Decoder],
    ) -> None:
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        keep_freed_memory()
        self.run = run
        self.config = config
        self.data = data
        self.position = Position()
        self.console = console
        self._device = select_device(config.runtime.device)
        self._dtype = compute_dtype(config)
        self.model = make_model().to(self._device)
        self._kernel = Kernel(config.runtime.kernel)
        self.execution = self.model.make_resident_execution(recompute=config.memory.activation_checkpointing)
        self.optimizer = MasterAdamW(self.model, config.training, self._dtype)
        self._training_step = TrainingStep(
            self.model,
            self.optimizer,
            self.execution,
            build_objective(config),
            config.training.gradient_clip,
            LoadMeter(),
        )
        self._loader = SequenceLoader(
            data.train,
            config.data.sequence_length,
            config.training.batch_sequences,
            config.training.resolved_micro_batch,
            config.data.seed,
            restart_documents=not config.data.attend_across_documents,
        )
        self._skipped_in_a_row = 0

    @property
    def step(self) -> int:
        """Optimizer steps done; skipped ones count."""
        return self.position.step

    @classmethod
    def start(cls, config: Config, path: Path, console: Console) -> Trainer:
        """Prepares data and model of a new run in the folder ``path``, which is written when both are there."""
        run = RunDirectory(path)
        run.require_unused()
        _require_one_process()
        select_device(config.runtime.device)
        require_trainable(config)
        config, origin = find_origin(resolve_date(resolve_paths(resolve_dtype(config))), console.message)
        tokenizer = None if origin is None else origin.load_tokenizer(config)
        data = prepare_data(config.data, read_cache_dir(), tokenizer)
        trainer = cls(run, config, data, console, partial(_start_model, config, data, origin))
        if origin is None:
            _warn_if_not_exportable(trainer.model.config, console)
            run.create(config, data.tokenizer)
        else:
            run.create(config, data.tokenizer, partial(origin.keep, model=trainer.model))
        return trainer

    @classmethod
    def resume(cls, path: Path, console: Console) -> Trainer:
        """Opens a run at its newest intact checkpoint; it goes on bit for bit on the same machine and threads."""
        _require_one_process()
        run = RunDirectory.open(path)
        config = run.load_config()
        data = prepare_data(config.data, read_cache_dir(), run.load_tokenizer())
        has_checkpoint = bool(list_checkpoints(run.checkpoints_folder))
        if config.model.init is not None and has_checkpoint:
            make_model = partial(Origin.open(run.origin_folder).make_model, config.model.balance_bias_rate)
        else:
            _, origin = find_origin(config, console.message)
            make_model = partial(_start_model, config, data, origin)
        trainer = cls(run, config, data, console, make_model)
        if has_checkpoint:
            trainer._restore()
        else:
            console.warning(f"no checkpoint was written yet in {run.path}: going on from step 0")
            drop_after(run.metrics_file, 0)
        return trainer

    def describe(self) -> list[str]:
        """Returns lines for people: data, model, arithmetic, and where the run lies."""
        config = self.model.config
        return [
            self.data.description,
            f"{format_count(self.model.count_parameters())} parameters, "
            f"{format_count(config.num_matmul_parameters_per_token)} multiply each token: {config.num_layers} layers, "
            f"hidden {config.hidden_size}, {_describe_experts(config)}",
            f"{self.config.training.steps} steps of {self.tokens_per_step} tokens, {self.config.training.dtype}, "
            f"{self._device}, {torch.get_num_threads()} threads; run in {self.run.path}",
        ]

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step."""
        return self.config.training.batch_sequences * self.config.data.sequence_length

    def train(self) -> Outcome:
        """Runs to the last step, or until interrupted. Saves at the end and when interrupted."""
        with (
            use_kernel(self._kernel),
            self._open_log() as log,
            Interruption(self.console.warning, self.console.abandon) as interruption,
        ):
            try:
                while self.step < self.config.training.steps:
                    interruption.raise_if_requested()
                    self._take_logged_step(log)
                evaluation = self._evaluate_at_the_end(log, interruption)
            except Interrupted:
                self._save_interrupted(log)
                return Outcome(self.step, interruption.signal_number, evaluation=None)
        return Outcome(self.step, None, evaluation)

    def take_step(self) -> StepResult:
        """Carries out one optimizer step on the next batch and returns its figures; writes nothing."""
        started = time.perf_counter()
        batches = self._load_batches(self.step)
        with use_kernel(self._kernel):
            result = self._training_step.run(batches, compute_learning_rate(self.config.training, self.step))
        self.position = self.position.advance(result, time.perf_counter() - started)
        return result

    def evaluate(
        self,
        max_tokens: int | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation:
        """Scores held-out documents, each alone; ``max_tokens`` bounds how many, None takes all. ``on_progress`` gets
        (batches done, batches). Nothing is dropped: with a capacity, a document would depend on its neighbours."""
        with use_kernel(self._kernel):
            return evaluate(
                self.model,
                self.make_heldout_set(max_tokens),
                replace(self.execution, capacity=Capacity.unbounded()),
                self.config.memory.loss_chunk_tokens,
                on_progress,
            )

    def make_heldout_set(self, max_tokens: int | None = None) -> HeldoutSet:
        """Returns the held-out documents in windows that overlap by half, so that tokens are judged with context."""
        length = self.config.data.sequence_length
        return heldout_windows(self.data.heldout, length, length // 2, max_tokens)

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder."""
        state = RunState(
            step=self.step,
            tokens=self.position.tokens,
            tensors=self.optimizer.export_state(),
            metadata={
                "config": self.config.model_dump(mode="json"),
                "data_fingerprint": self.data.fingerprint,
                "elapsed_s": self.position.elapsed_s,
                "skipped_in_a_row": self._skipped_in_a_row,
                **self._find_backend().to_metadata(),
            },
        )
        return save_checkpoint(self.run.checkpoints_folder, state, keep=self.config.training.keep_checkpoints)

    def _restore(self) -> None:
        """Goes to the newest intact checkpoint, whose weights are read into the memory that the model has."""
        damages: list[str] = []
        state = load_newest_checkpoint(
            self.run.checkpoints_folder,
            on_damage=damages.append,
            selection=Selection(destinations=self.optimizer.export_state()),
        )
        metadata: Any = state.metadata
        require_same_config(metadata["config"], self.config)
        if metadata["data_fingerprint"] != self.data.fingerprint:
            raise DataError(
                f"the corpus of {self.config.data.source!r} or the run's tokenizer has changed since the checkpoint "
                f"(fingerprint {metadata['data_fingerprint'][:12]}, now {self.data.fingerprint[:12]}); "
                "restore the files, or start a new run"
            )
        change = self._find_backend().describe_change(metadata)
        if change is not None:
            self.console.warning(change)
        self.optimizer.import_state(state.tensors)
        self.position = Position(state.step, state.tokens, metadata["elapsed_s"])
        self._skipped_in_a_row = metadata["skipped_in_a_row"]
        drop_after(self.run.metrics_file, state.step)
        with self._open_log() as log:
            for damage in damages:
                log.write_event("damaged_checkpoint", damage)
            log.write_event("resumed", f"resumed at step {self.step}")

    def _find_backend(self) -> Backend:
        with use_kernel(self._kernel):
            return Backend.find(self._device)

    def _take_logged_step(self, log: TrainingLog) -> None:
        config = self.config.training
        result = self.take_step()
        log.add(result, self.position)
        self._guard(result, log)
        self.console.advance(self.step)
        is_last = self.step == config.steps
        if is_last or self.step % config.log_every == 0:
            log.write(self._last_learning_rate)
        if _is_due(config.evaluate_every, self.step) and not is_last:
            log.write_evaluation(self.evaluate(config.evaluate_tokens))
        if _is_due(config.checkpoint_every, self.step) or is_last:
            log.write_event("checkpoint", f"saved {self.save()}")

    def _evaluate_at_the_end(self, log: TrainingLog, interruption: Interruption) -> Evaluation:
        """Scores the whole held-out set, unless a resumed run has done so before it was resumed."""
        for line in reversed(read_metrics(self.run.metrics_file).evaluations):
            if line.step == self.step:
                self.console.message(
                    f"this run was finished before: held out {line.heldout_bits_per_byte:.4f} bits/byte"
                )
                num_bytes = self.make_heldout_set().num_bytes
                return Evaluation(
                    line.heldout_loss, line.heldout_bits_per_byte, line.heldout_tokens, num_bytes
                )
        evaluation = self.evaluate(on_progress=lambda done, total: interruption.raise_if_requested())
        log.write_evaluation(evaluation)
        return evaluation

    def _save_interrupted(self, log: TrainingLog) -> None:
        if log.has_unwritten_steps:
            log.write(self._last_learning_rate)
        log.write_event("interrupted", f"saved {self.save()}; go on with: moesys resume {self.run.path}")

    @property
    def _last_learning_rate(self) -> float:
        return compute_learning_rate(self.config.training, self.step - 1)

    def _load_batches(self, step: int) -> list[Batch]:
        return [self._loader.load(step, i).to(self._device) for i in range(self._loader.num_micro_batches)]

    def _guard(self, result: StepResult, log: TrainingLog) -> None:
        """Counts steps that were skipped for NaN or Inf, and stops the run after too many in a row."""
        if result.is_finite:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        log.write_event(
            "skipped_step",
            f"step {self.step} was skipped, parameters unchanged and its routing not counted: loss {result.loss}, "
            f"gradient norm {result.gradient_norm}",
        )
        limit = self.config.training.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            place = find_first_nonfinite(self.model, self._load_batches(self.step - 1), self._training_step)
            # Skipped steps have changed nothing, so what is in memory is the last good state.
            saved = "" if place.startswith("the parameter") else f"; the last good state is in {self.save()}"
            raise NonFiniteError(
                f"loss or gradients were NaN or Inf in {limit} steps in a row (training.max_skipped_steps), up to "
                f"step {self.step}; it began in {place}{saved}; start a new run with a lower training.learning_rate "
                f"({self.config.training.learning_rate}) than this one's"
            )

    @contextmanager
    def _open_log(self) -> Iterator[TrainingLog]:
        train = self.data.train
        yardstick = Yardstick(
            train.num_targets / train.num_bytes,
            self.model.config.compute_training_flops_per_token(self.config.data.sequence_length),
            self._dtype,
            self._device,
        )
        with open_sinks(self.run, tensorboard=self.config.runtime.tensorboard) as sinks:
            yield TrainingLog(sinks, self.console, yardstick, self.position)


def _start_model(config: Config, data: PreparedData, origin: Origin | None) -> Decoder:
    if origin is not None:
        return origin.load_model(config.model.balance_bias_rate)
    return build_model(config, data.tokenizer.vocab_size)


def _require_one_process() -> None:
    world_size = read_world_size()
    if world_size > 1:
        raise ConfigError(
            f"training runs in one process, torchrun has started {world_size} (WORLD_SIZE); start `moesys train` alone"
        )


def _warn_if_not_exportable(config: DecoderConfig, console: Console) -> None:
    try:
        choose_family(config)
    except ModelFormatError as error:
        console.warning(f"this model trains, but `moesys export` will refuse it: {name_misfits(str(error))}")


def _describe_experts(config: DecoderConfig) -> str:
    layers = [layer for layer in config.feed_forwards if isinstance(layer, MoEConfig)]
    if not layers:
        return "dense"
    numbers = [layer.num_experts if isinstance(layer, MoEConfig) else 0 for layer in config.feed_forwards]
    return f"experts {_shorten(numbers)} top-{layers[0].top_k}"


def _shorten(numbers: list[int]) -> int | list[int]:
    """Returns the pattern of which a list is made, as a number where it has one entry."""
    length = next(
        n for n in range(1, len(numbers) + 1) if numbers == (numbers[:n] * len(numbers))[: len(numbers)]
    )
    return numbers[0] if length == 1 else numbers[:length]


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
