"""Every held-out target is scored once, with the context that the stride promises."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.data import IGNORED_TARGET, Batch, PackedTokens, heldout_windows
from moesys.data import heldout as heldout_module
from moesys.errors import DataError


@given(
    texts=st.lists(st.text("abcdefgh ", min_size=1, max_size=40), min_size=1, max_size=6),
    sequence_length=st.integers(1, 12),
    data=st.data(),
    batch_sequences=st.integers(1, 5),
)
def test_every_target_is_scored_once(
    pack: Callable[[list[str]], PackedTokens],
    texts: list[str],
    sequence_length: int,
    data: st.DataObject,
    batch_sequences: int,
) -> None:
    packed = pack(texts)
    stride = data.draw(st.integers(1, sequence_length))
    heldout = heldout_windows(packed, sequence_length, stride, batch_sequences=batch_sequences)
    scored: Counter[tuple[int, int]] = Counter()
    for batch in heldout.batches:
        rows, width = batch.token_ids_BS.shape
        assert rows <= batch_sequences
        real = batch.document_ids_BS == 0
        assert real.sum(1).max() == width <= sequence_length
        assert batch.token_ids_BS[~real].eq(0).all()
        assert batch.target_ids_BS[~real].eq(IGNORED_TARGET).all()
        assert torch.equal(batch.positions_BS[real], torch.arange(width).expand(rows, width)[real])
        is_scored = batch.target_ids_BS != IGNORED_TARGET
        scored.update(
            zip(batch.token_ids_BS[is_scored].tolist(), batch.target_ids_BS[is_scored].tolist(), strict=True)
        )
        inputs, targets = batch.token_ids_BS[:, 1:], batch.target_ids_BS[:, :-1]
        both = is_scored[:, :-1] & real[:, 1:]
        assert torch.equal(inputs[both], targets[both])
    tokens = packed.tokens.tolist()
    assert scored == Counter(itertools.pairwise(tokens))
    assert heldout.num_targets == packed.num_tokens - 1
    assert heldout.num_bytes == packed.num_bytes
    assert heldout.num_documents == len(texts)


def test_batches_are_built_when_asked_for(
    pack: Callable[[list[str]], PackedTokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], heldout_module._build_batch

    def count(packed: PackedTokens, windows: Sequence[object]) -> Batch:
        built.append(len(windows))
        return build(packed, windows)

    monkeypatch.setattr(heldout_module, "_build_batch", count)
    heldout = heldout_windows(pack(["abcabc" * 5] * 3), 4, 4, batch_sequences=5)
    assert built == []
    assert len(heldout.batches) > 2
    first = next(iter(heldout.batches))
    assert built == [5]
    assert torch.equal(heldout.batches[0].token_ids_BS, first.token_ids_BS)
    assert [b.token_ids_BS.shape[0] for b in heldout.batches[-2:]] == built[-2:]


def test_first_window_scores_all_and_later_ones_their_last_stride(
    pack: Callable[[list[str]], PackedTokens],
) -> None:
    packed = pack(["zqzq" * 5])
    length = packed.num_tokens - 1
    heldout = heldout_windows(packed, 8, 3, batch_sequences=100)
    (batch,) = heldout.batches
    num_scored = (batch.target_ids_BS != IGNORED_TARGET).sum(1).tolist()
    assert num_scored[0] == 8
    assert num_scored[1:-1] == [3] * (len(num_scored) - 2)
    assert sum(num_scored) == length
    stream = torch.from_numpy(packed.tokens.astype("int64"))
    assert torch.equal(batch.token_ids_BS[1], stream[3:11])
    assert batch.target_ids_BS[1].tolist() == [IGNORED_TARGET] * 5 + stream[9:12].tolist()


def test_windows_of_like_length_share_a_batch(pack: Callable[[list[str]], PackedTokens]) -> None:
    heldout = heldout_windows(pack(["a", "bcdefg" * 3, "c", "hgfedcb" * 3]), 64, 64, batch_sequences=2)
    assert [batch.token_ids_BS.shape[1] > 4 for batch in heldout.batches] == [True, False]


def test_budget_takes_whole_documents_that_fit(packed: PackedTokens) -> None:
    lengths = packed.document_starts[1:] - packed.document_starts[:-1]
    budget = int(packed.num_tokens // 3)
    heldout = heldout_windows(packed, 16, 8, max_tokens=budget)
    assert budget - lengths.min() < heldout.num_targets <= budget
    assert 0 < heldout.num_bytes < packed.num_bytes
    smallest = heldout_windows(packed, 16, 8, max_tokens=1)
    assert (smallest.num_documents, smallest.num_targets) == (1, lengths.min())


@pytest.mark.parametrize("stride", [0, 17])
def test_stride_outside_the_window(packed: PackedTokens, stride: int) -> None:
    with pytest.raises(DataError, match=rf"stride \({stride}\) must be between 1 and sequence_length \(16\)"):
        heldout_windows(packed, 16, stride)
