"""Which sequences a rank sees in a step: a pure function, so a run resumes anywhere on any world size.

The stream is cut into sequences of S inputs; sequence i reads ``tokens[i*S : i*S+S+1]``. Each epoch is a
permutation of them, drawn from a counter-based generator keyed by (seed, epoch). Knows nothing of text, of
process groups (ranks are numbers here) or of how far a run has come.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from moesys.data.batch import IGNORED_TARGET, Batch
from moesys.data.packing import PackedTokens
from moesys.errors import DataError


class SequenceLoader:
    """Serves training batches from a packed corpus by (step, micro-batch)."""

    def __init__(
        self,
        packed: PackedTokens,
        sequence_length: int,
        batch_sequences: int,
        micro_batch_sequences: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        restart_documents: bool = True,
    ) -> None:
        """Describes the order; reads nothing yet.

        Args:
            packed: the training tokens.
            sequence_length: input tokens per sequence, S.
            batch_sequences: sequences per step, over all micro-batches and ranks.
            micro_batch_sequences: sequences per forward pass, over all ranks; rank r gets the r-th contiguous
                share.
            seed: of the shuffle.
            rank: this process.
            world_size: number of processes that share each micro-batch.
            restart_documents: whether document ids rise and positions restart at every document start;
                otherwise ids are 0 and positions run from 0 to S-1.

        Raises:
            DataError: the corpus holds less than one sequence, or a size does not divide the one above it.
        """
        if batch_sequences % micro_batch_sequences:
            raise DataError(
                f"batch_sequences ({batch_sequences}) must be divisible by micro_batch_sequences "
                f"({micro_batch_sequences}); try {_list_divisors(batch_sequences)}"
            )
        if micro_batch_sequences % world_size:
            raise DataError(
                f"micro_batch_sequences ({micro_batch_sequences}) must be divisible by the number of ranks "
                f"({world_size}); try {world_size * max(1, micro_batch_sequences // world_size)}, "
                f"or start {_list_divisors(micro_batch_sequences)} ranks"
            )
        if not 0 <= rank < world_size:
            raise DataError(f"rank ({rank}) must be at least 0 and below world_size ({world_size})")
        self.num_sequences = count_sequences(packed, sequence_length)
        """Sequences in one epoch."""
        self._packed = packed
        self._sequence_length = sequence_length
        self._batch_sequences = batch_sequences
        self._micro_batch_sequences = micro_batch_sequences
        self._seed = seed
        self._rank = rank
        self._rank_sequences = micro_batch_sequences // world_size
        self._restart_documents = restart_documents
        self._permutations: dict[int, np.ndarray] = {}

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step."""
        return self._batch_sequences // self._micro_batch_sequences

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sequence has been seen at least once, rounded up."""
        return math.ceil(self.num_sequences / self._batch_sequences)

    def load(self, step: int, micro_batch: int) -> Batch:
        """Returns this rank's rows of one micro-batch, ``[micro_batch_sequences / world_size, S]``.

        Raises:
            IndexError: `step` is negative or `micro_batch` is not below `num_micro_batches`.
        """
        if step < 0 or not 0 <= micro_batch < self.num_micro_batches:
            raise IndexError(
                f"step ({step}) must be at least 0 and micro_batch ({micro_batch}) "
                f"at least 0 and below {self.num_micro_batches}"
            )
        first = step * self._batch_sequences + micro_batch * self._micro_batch_sequences
        first += self._rank * self._rank_sequences
        sequences = [self._find_sequence(first + i) for i in range(self._rank_sequences)]
        return self._read_rows(np.array(sequences, dtype=np.int64) * self._sequence_length)

    def _find_sequence(self, sample: int) -> int:
        epoch, place = divmod(sample, self.num_sequences)
        if epoch not in self._permutations:
            if len(self._permutations) == 2:
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = _permute(self.num_sequences, self._seed, epoch)
        return int(self._permutations[epoch][place])

    def _read_rows(self, starts_B: np.ndarray) -> Batch:
        length = self._sequence_length
        stream_BS = starts_B[:, None] + np.arange(length + 1)
        rows_BS = torch.from_numpy(self._packed.tokens[stream_BS].astype(np.int64))
        target_ids_BS = rows_BS[:, 1:].contiguous()
        if self._packed.is_target is not None:
            is_target_BS = torch.from_numpy(self._packed.is_target[stream_BS[:, 1:]])
            target_ids_BS.masked_fill_(~is_target_BS, IGNORED_TARGET)
        stream_BS = stream_BS[:, :-1]
        if self._restart_documents:
            document_starts = self._packed.document_starts
            documents_BS = np.searchsorted(document_starts, stream_BS, side="right") - 1
            positions_BS = stream_BS - np.maximum(document_starts[documents_BS], starts_B[:, None])
            documents_BS = documents_BS - documents_BS[:, :1]
        else:
            documents_BS = np.zeros_like(stream_BS)
            positions_BS = stream_BS - starts_B[:, None]
        return Batch(
            token_ids_BS=rows_BS[:, :-1].contiguous(),
            target_ids_BS=target_ids_BS,
            document_ids_BS=torch.from_numpy(documents_BS),
            positions_BS=torch.from_numpy(positions_BS),
        )


def count_sequences(packed: PackedTokens, sequence_length: int) -> int:
    """Returns how many sequences the stream holds; what is left at its end is not used.

    Raises:
        DataError: not even one fits.
    """
    num_sequences = (packed.num_tokens - 1) // sequence_length
    if num_sequences < 1:
        raise DataError(
            f"the corpus is too small: one sequence of sequence_length {sequence_length} needs "
            f"{sequence_length + 1} training tokens, the corpus has {packed.num_tokens}; "
            f"give more text or set data.sequence_length to at most {packed.num_tokens - 1}"
        )
    return num_sequences


def _permute(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw Philox output, because numpy promises a stable raw stream but not a stable `permutation`.
    generator = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    return np.argsort(generator.random_raw(num_sequences), kind="stable")


def _list_divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
