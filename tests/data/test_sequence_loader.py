"""The order of sequences over epochs and ranks, and the four tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.data import Batch, PackedTokens, SequenceLoader
from moesys.data.loader import _permute
from moesys.errors import DataError

FIELDS = ("token_ids_BS", "target_ids_BS", "document_ids_BS", "positions_BS")


def stack(batches: list[Batch]) -> list[torch.Tensor]:
    return [torch.cat([getattr(batch, field) for batch in batches]) for field in FIELDS]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for x, y in zip(left, right, strict=True):
        assert torch.equal(x, y)


@given(sequence_length=st.integers(2, 40), batch=st.integers(1, 7), seed=st.integers(-5, 2**40))
def test_every_sequence_once_per_epoch(
    packed: PackedTokens, sequence_length: int, batch: int, seed: int
) -> None:
    loader = SequenceLoader(packed, sequence_length, batch, batch, seed)
    stream = torch.from_numpy(packed.tokens.astype("int64"))
    num = loader.num_sequences
    steps = 2 * num // batch + 1
    tokens_NS, targets_NS, _, _ = stack([loader.load(step, 0) for step in range(steps)])
    expected = sorted(stream[: num * sequence_length].view(num, sequence_length).tolist())
    expected_targets = sorted(stream[1 : num * sequence_length + 1].view(num, sequence_length).tolist())
    for epoch in range(2):
        assert sorted(tokens_NS[epoch * num : (epoch + 1) * num].tolist()) == expected
        assert sorted(targets_NS[epoch * num : (epoch + 1) * num].tolist()) == expected_targets
    assert torch.equal(tokens_NS[:, 1:], targets_NS[:, :-1])
    assert loader.steps_per_epoch == -(-num // batch)


def test_epochs_and_seeds_differ(packed: PackedTokens) -> None:
    def order(seed: int) -> list[int]:
        loader = SequenceLoader(packed, 64, 1, 1, seed)
        return [loader._find_sequence(sample) for sample in range(2 * loader.num_sequences)]

    num = len(order(0)) // 2
    assert order(0)[:num] != order(0)[num:]
    assert order(0) != order(1)


def test_order_is_pinned() -> None:
    # The order is part of every saved run: a change here breaks resuming.
    assert _permute(32, seed=0, epoch=0).tolist()[:8] == [0, 21, 2, 11, 20, 17, 9, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_together_are_one_rank_in_order(packed: PackedTokens, world_size: int) -> None:
    whole = SequenceLoader(packed, 16, 12, 6, seed=3)
    ranks = [SequenceLoader(packed, 16, 12, 6, 3, rank, world_size) for rank in range(world_size)]
    assert whole.num_micro_batches == 2
    for step in (0, 1, 7, 1000):
        for micro_batch in range(2):
            parts = stack([rank.load(step, micro_batch) for rank in ranks])
            assert_same(parts, stack([whole.load(step, micro_batch)]))


def test_micro_batches_cut_the_step_in_order(packed: PackedTokens) -> None:
    whole, cut = SequenceLoader(packed, 16, 12, 12, 0), SequenceLoader(packed, 16, 12, 4, 0)
    assert_same(stack([whole.load(5, 0)]), stack([cut.load(5, m) for m in range(3)]))


def test_load_depends_on_nothing_before_it(packed: PackedTokens) -> None:
    used = SequenceLoader(packed, 16, 4, 4, 0)
    for step in (0, 900, 3, 40, 0, 7):
        fresh = SequenceLoader(packed, 16, 4, 4, 0)
        assert_same(stack([used.load(step, 0)]), stack([fresh.load(step, 0)]))


@given(texts=st.lists(st.text("ab \n", min_size=1, max_size=12), min_size=4, max_size=9))
def test_document_ids_and_positions(pack: Callable[[list[str]], PackedTokens], texts: list[str]) -> None:
    loader = SequenceLoader(pack(texts), 5, 1, 1, 0)
    for step in range(loader.num_sequences):
        batch = loader.load(step, 0)
        document, position = 0, 0
        for column, token in enumerate(batch.token_ids_BS[0].tolist()):
            if token == 0:
                document, position = document + (column > 0), 0
            assert batch.document_ids_BS[0, column] == document
            assert batch.positions_BS[0, column] == position
            position += 1


def test_documents_can_be_joined(packed: PackedTokens) -> None:
    batch = SequenceLoader(packed, 64, 2, 2, 0, restart_documents=False).load(0, 0)
    assert batch.document_ids_BS.eq(0).all()
    assert torch.equal(batch.positions_BS, torch.arange(64).repeat(2, 1))
    assert all(getattr(batch, field).dtype == torch.int64 for field in FIELDS)


def test_corpus_smaller_than_a_sequence(pack: Callable[[list[str]], PackedTokens]) -> None:
    packed = pack(["ab"])
    assert SequenceLoader(packed, packed.num_tokens - 1, 1, 1, 0).num_sequences == 1
    message = (
        rf"sequence_length {packed.num_tokens} needs {packed.num_tokens + 1} training tokens, the corpus has "
        rf"{packed.num_tokens}; give more text or set data.sequence_length to at most {packed.num_tokens - 1}"
    )
    with pytest.raises(DataError, match=message):
        SequenceLoader(packed, packed.num_tokens, 1, 1, 0)


def test_sizes_that_do_not_divide(packed: PackedTokens) -> None:
    with pytest.raises(
        DataError, match=r"batch_sequences \(6\) must be divisible by .* \(4\); try 1, 2, 3, 6"
    ):
        SequenceLoader(packed, 16, 6, 4, 0)
    with pytest.raises(DataError, match=r"micro_batch_sequences \(6\) must .* ranks \(4\).*1, 2, 3, 6 ranks"):
        SequenceLoader(packed, 16, 6, 6, 0, rank=0, world_size=4)
    with pytest.raises(DataError, match=r"rank \(2\) must be at least 0 and below world_size \(2\)"):
        SequenceLoader(packed, 16, 6, 6, 0, rank=2, world_size=2)
    with pytest.raises(IndexError, match=r"micro_batch \(1\)"):
        SequenceLoader(packed, 16, 6, 6, 0).load(0, 1)
