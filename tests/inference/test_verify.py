"""`moesys verify`: it says equal where bits are equal, and finds a single wrong expert either way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.small_checkpoints import DEEPSEEK, make_checkpoint
from moesys.checkpoint import load_model, save_model
from moesys.errors import IneffectiveOptionError, ModelFormatError
from moesys.inference import verify as verify_module
from moesys.inference.compare_transformers import TransformersComparison, compare_with_transformers
from moesys.inference.offload import OffloadedModel
from moesys.inference.offload_plan import OffloadRequest
from moesys.inference.verify import CheckedTokens, count_pass_tokens, verify_model
from moesys.models import AttentionConfig, Decoder, DecoderConfig, DenseConfig, RopeConfig, initialize_weights
from moesys.moe import MoEConfig
from moesys.store import SectionCache
from moesys.store.ring import Ring

BUDGET = "99%"
"""Of the small model: three of its four experts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    # Transformers multiplies experts in groups, whose rows must be whole blocks of 16 bytes.
    make_checkpoint(path, DEEPSEEK | {"moe_intermediate_size": 12})
    return path


@pytest.mark.parametrize("by_layer", [False, True])
def test_an_offloaded_model_is_found_equal(folder: Path, by_layer: bool) -> None:
    check = verify_model(folder, BUDGET, by_layer=by_layer)
    assert check.is_equal
    assert check.by_layer is by_layer
    assert len({comparison.num_slots for comparison in check.comparisons}) >= 2
    config = load_model(folder).config
    num_values = check.num_tokens * (config.hidden_size if by_layer else config.vocab_size)
    num_layers = len(config.feed_forwards) - 1 if by_layer else 1
    assert {comparison.num_values for comparison in check.comparisons} == {num_values * num_layers}


def make_config(num_experts: int, top_k: int, max_positions: int = 4096) -> DecoderConfig:
    mixer = AttentionConfig(2, 1, 8, RopeConfig(8))
    layers = (DenseConfig(20), MoEConfig(num_experts, top_k, 4))
    return DecoderConfig(61, 16, (mixer,) * 2, layers, tie_embeddings=False, max_positions=max_positions)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "max_positions", "expected"),
    [
        (256, 8, 4096, 146),
        (64, 8, 4096, 35),
        (4, 4, 4096, 24),
        (512, 1, 4096, 512),
        (256, 8, 120, 52),
        (256, 8, 4, 1),
    ],
)
def test_a_pass_needs_nearly_all_experts(
    num_experts: int, top_k: int, max_positions: int, expected: int
) -> None:
    assert count_pass_tokens(make_config(num_experts, top_k, max_positions)) == expected


def test_the_tokens_are_a_prompt_in_two_passes_and_sixteen_more() -> None:
    tokens = CheckedTokens.draw(make_config(256, 8))
    assert [len(token_ids) for token_ids in tokens.list_passes()] == [146, 146] + [1] * 16
    assert (
        sum(tokens.list_passes(), ()) == tokens.token_ids == CheckedTokens.draw(make_config(256, 8)).token_ids
    )


def test_many_experts_come_in_order_twice_and_on_a_guess_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, moe = AttentionConfig(2, 1, 8, RopeConfig(8)), MoEConfig(64, 4, 8)
    model = Decoder(DecoderConfig(61, 128, (mixer,) * 2, (moe,) * 2, tie_embeddings=False, max_positions=300))
    initialize_weights(model, seed=1, std=0.3)
    save_model(model, tmp_path, torch.float32, {})
    begun: list[int] = []
    begin_group = Ring.begin_group

    def note(ring: Ring, index: int) -> None:
        begun.append(index)
        begin_group(ring, index)

    monkeypatch.setattr(Ring, "begin_group", note)
    guesses: list[int] = []
    load = verify_module.load_offloaded

    @contextmanager
    def watch(*arguments: Any) -> Iterator[OffloadedModel]:
        with load(*arguments) as offloaded:
            yield offloaded
            guesses.append(offloaded.stats.prefetch_issued)

    monkeypatch.setattr(verify_module, "load_offloaded", watch)
    check = verify_model(tmp_path)
    assert check.is_equal
    assert begun == [0, 1, 0, 1] * len(check.comparisons)
    assert [comparison.predicts for comparison in check.comparisons] == [False, False, False, True]
    assert [count > 0 for count in guesses] == [False, False, False, True]
    assert "others guessed" in check.comparisons[-1].describe()


@pytest.mark.parametrize("by_layer", [False, True])
def test_one_expert_in_the_wrong_slot_is_found(
    folder: Path, by_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = SectionCache.use
    uses = []

    def use_wrong_slot(cache: SectionCache, key: object) -> int:
        uses.append(key)
        slot = use(cache, key)
        return (slot + 1) % cache.pool.num_slots if len(uses) == 5 else slot

    monkeypatch.setattr(SectionCache, "use", use_wrong_slot)
    check = verify_model(folder, BUDGET, by_layer=by_layer)
    assert not check.is_equal
    wrong = next(comparison for comparison in check.comparisons if not comparison.is_equal)
    assert wrong.num_different > 0
    assert wrong.largest_difference > 0
    assert "DIFFER" in wrong.describe()
    assert wrong.first is not None
    assert ("layer" if by_layer else "pass") in wrong.first


def test_which_way_is_taken_depends_on_the_free_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not verify_model(folder, BUDGET).by_layer
    monkeypatch.setattr(verify_module, "read_free_ram_bytes", lambda: 2**30)
    assert verify_model(folder, BUDGET).by_layer


def test_a_difference_of_signs_of_zero_is_a_difference() -> None:
    zero, negative = torch.zeros(2, 3), torch.zeros(2, 3)
    negative[1, 2] = -0.0
    comparison = verify_module._compare(OffloadRequest("1GiB", num_slots=4), ["there"], [negative], [zero])
    assert comparison.num_different == 1
    assert comparison.first == "there"


def test_logits_are_held_against_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    found = compare_with_transformers(folder)
    assert found.is_close is True
    assert 0 < found.error < 1e-5
    monkeypatch.setattr(
        "moesys.inference.compare_transformers.load_model", lambda path: _scale_head(load_model(path))
    )
    assert compare_with_transformers(folder).is_close is False


def _scale_head(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        model.get_parameter("head.weight")[0].mul_(1.001)
    return model


def test_asking_for_a_comparison_that_cannot_be_made_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    skipped = compare_with_transformers(folder)
    assert skipped.is_close is None
    assert "not installed" in skipped.describe()
    with pytest.raises(IneffectiveOptionError, match="not installed"):
        compare_with_transformers(folder, is_wanted=True)
    assert compare_with_transformers(folder, is_wanted=False) == TransformersComparison("not asked for")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = DecoderConfig(61, 32, (AttentionConfig(4, 2, 8, RopeConfig(8)),), (DenseConfig(20),))
    save_model(Decoder(dense), tmp_path, torch.float32, {})
    with pytest.raises(ModelFormatError, match="no experts"):
        verify_model(tmp_path)


def test_the_command_prints_and_exits_by_what_it_finds(folder: Path) -> None:
    command = [sys.executable, "-m", "moesys", "verify", str(folder), "--no-transformers", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["is_ok"] is True
    assert found["transformers"]["skipped"] == "not asked for"
    assert all(comparison["num_different"] == 0 for comparison in found["equality"]["comparisons"])
    assert "equal bit for bit" in done.stderr
