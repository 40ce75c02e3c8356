"""The layer benchmark's arithmetic: bytes, shares, best peers, medians, claims and the exit code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_layer
from harness import Measured, Outcome, Timing
from layer_parts import many_tokens, streams
from layer_parts.decode import Decode
from layer_parts.linear import Linear
from layer_parts.many_tokens import Limits, ManyTokens
from layer_peers.workload import Format, LayerShape, choose_experts, draw_weights

TINY = LayerShape(hidden_size=32, inner_size=16, num_experts=8, top_k=2)
ONCE = Timing(min_calls=2, min_seconds=0.0, max_seconds=1.0)


@pytest.fixture
def read_rate(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(streams, "measure_memory_read_rate", lambda: 1e9)
    return 1e9


def _decode(form: Format = Format.BF16, token_counts: tuple[int, ...] = (1, 4)) -> Decode:
    return Decode(
        TINY, form, token_counts, ("moesys",), "torch", ONCE, 0.75, 0.9, seed=0, distinct_bytes=100_000
    )


def _many(
    form: Format = Format.FP32, shape: LayerShape = TINY, token_counts: tuple[int, ...] = (4, 8)
) -> ManyTokens:
    return ManyTokens(shape, form, token_counts, ("moesys", "loop"), "torch", Limits(ONCE), 0.95, seed=0)


def _measured(**passes: list[dict[str, list[float]]]) -> Measured:
    """Seconds of each call by number of tokens, pass by pass; underscores in names stand for hyphens."""
    records = {
        name.replace("_", "-"): [{"calls": calls, "errors": {}, "absent": {}} for calls in per_pass]
        for name, per_pass in passes.items()
    }
    return Measured(records)


def test_one_token_visits_every_expert_of_a_layer_once() -> None:
    weights = draw_weights(TINY, Format.FP32, seed=0)
    xs = _decode().draw_inputs(1, weights)
    ids = torch.cat(
        [choose_experts(x_TD, weights.router_ED, TINY.top_k).expert_ids_TK.flatten() for x_TD in xs]
    )
    assert sorted(ids.tolist()) == list(range(TINY.num_experts))


def test_an_expert_that_several_tokens_chose_is_read_once() -> None:
    weights = draw_weights(TINY, Format.BF16, seed=0)
    ids_TK = torch.tensor([[0, 5], [5, 0], [5, 2]])
    assert weights.count_read_bytes(ids_TK) == 8 * 32 * 4 + 3 * (3 * 32 * 16 * 2)


@pytest.mark.parametrize("form", [Format.BF16, Format.W8])
def test_a_decode_sweep_reads_enough_distinct_weights(read_rate: float, form: Format) -> None:
    case = _decode(form)
    record = case.measure("moesys")
    expert_bytes = {Format.BF16: 3 * 32 * 16 * 2, Format.W8: (32 + 32) * (64 + 4)}[form]
    router_bytes = 8 * 32 * 4
    one_layer = 8 * expert_bytes + 4 * router_bytes
    sweeps = record["sweeps"]
    assert sweeps["1 token"]["bytes"] == record["num_layers"] * one_layer
    assert all(sweep["bytes"] >= case.distinct_bytes for sweep in sweeps.values())
    assert len(sweeps["4 tokens"]["seconds"]) == 2
    assert sweeps["1 token"]["read_rate"] == read_rate


@pytest.mark.parametrize("system", ["moesys", "torch"])
def test_a_linear_sweep_reads_enough_distinct_weights(read_rate: float, system: str) -> None:
    case = Linear(
        ((32, 48),), Format.BF16, (system,), "torch", ONCE, 0.75, 0.9, seed=0, distinct_bytes=10_000
    )
    sweep = case.measure(system)["sweeps"]["32->48"]
    assert sweep["bytes"] == 4 * 32 * 48 * 2


def _stream(seconds: float) -> Measured:
    sweep = {"bytes": 10**9, "seconds": [seconds] * 3, "read_rate": 2e9}
    return Measured({"moesys": [{"sweeps": {"1 token": sweep}}] * 2})


@pytest.mark.parametrize(("seconds", "verdict"), [(0.55, "ok"), (0.70, "short")])
def test_a_decode_claim_is_the_share_of_the_read_rate(seconds: float, verdict: str) -> None:
    (claim,) = _decode().make_claims(_stream(seconds))
    assert claim.verdict == verdict
    assert claim.spread.median == pytest.approx(0.5 / seconds)


def test_float32_decode_is_reported_without_a_claim_and_an_absent_system_is_skipped() -> None:
    assert _decode(Format.FP32).make_claims(_stream(0.5)) == []
    (claim,) = _decode(Format.W8A8).make_claims(Measured(failed={"moesys": "broke"}))
    assert claim.line.endswith("skipped moesys")


def test_many_tokens_are_checked_then_timed() -> None:
    case = _many()
    for system in case.systems:
        record = case.measure(system)
        assert [len(record["calls"][count]) for count in ("4", "8")] == [2, 2]
        assert max(record["errors"].values()) < 1e-5


def test_a_slow_system_is_left_out_from_there_on() -> None:
    case = ManyTokens(TINY, Format.FP32, (4, 8), ("loop",), "torch", Limits(ONCE, 0.0), 0.95, seed=0)
    record = case.measure("loop")
    assert record["calls"] == {}
    assert list(record["absent"]) == ["4"]
    assert (
        case.format(Measured({"loop": [record]}), {Format.FP32: 1e9})
        .splitlines()[-1]
        .startswith("skipped loop from 4 tokens on (a call takes")
    )


def test_the_best_peer_is_the_fastest_that_is_not_ours_and_pairs_are_passes() -> None:
    case = _many(token_counts=(4,))
    measured = _measured(
        moesys=[{"4": [1.0, 1.0, 9.0]}, {"4": [2.0]}],
        moesys_torch=[{"4": [0.1]}, {"4": [0.1]}],
        loop=[{"4": [3.0]}, {"4": [3.0]}],
        deepspeed=[{"4": [2.0]}, {"4": [1.0]}],
        once=[{"4": [0.5]}],
    )
    assert case.find_best_peer(measured, 4) == "deepspeed"
    (claim,) = case.make_claims(measured)
    assert claim.pairs == (2.0, 0.5)
    assert claim.verdict == "ok"


def test_a_cell_without_peers_or_without_us_is_skipped() -> None:
    case = _many(token_counts=(4,))
    assert case.make_claims(_measured(moesys=[{"4": [1.0]}]))[0].missing == "peers"
    assert case.make_claims(_measured(loop=[{"4": [1.0]}]))[0].missing == "moesys"
    assert case.make_claims(_measured(moesys=[{"4": [1.0]}], loop=[{}]))[0].missing == "peers"


def test_only_peers_near_the_fastest_are_measured_again() -> None:
    case = _many()
    measured = _measured(
        moesys=[{"4": [9.0], "8": [9.0]}],
        moesys_torch=[{"4": [9.0], "8": [9.0]}],
        fast=[{"4": [1.0], "8": [2.0]}],
        near_at_eight=[{"4": [5.0], "8": [2.5]}],
        slow=[{"4": [1.4], "8": [2.7]}],
    )
    again = {name: case.deserves_pass(name, measured) for name in measured.records}
    assert again == {
        "moesys": True,
        "moesys-torch": False,
        "fast": True,
        "near-at-eight": True,
        "slow": False,
    }


def test_the_median_over_cells_is_taken_pass_by_pass_and_per_format() -> None:
    cells = _measured(
        moesys=[{"4": [1.0], "8": [1.0]}, {"4": [1.0], "8": [1.0]}],
        loop=[{"4": [1.0], "8": [3.0]}, {"4": [2.0], "8": [4.0]}],
    )
    results = [(_many(), cells)]
    claim = many_tokens.claim_median_over_cells(results, Format.FP32, 1.0)
    assert claim.pairs == (2.0, 3.0)
    assert many_tokens.claim_median_over_cells(results, Format.BF16, 1.0).verdict == "skipped"


def test_bf16_is_compared_with_fp32_of_the_same_shape() -> None:
    other = LayerShape(64, 16, 8, 2)
    results = [
        (_many(Format.FP32), _measured(moesys=[{"4": [1.0], "8": [3.0]}])),
        (_many(Format.FP32, other), _measured(moesys=[{"4": [7.0], "8": [7.0]}])),
        (_many(Format.BF16), _measured(moesys=[{"4": [2.0], "8": [2.0]}])),
    ]
    claims = many_tokens.claim_bf16_over_fp32(results, 0.85)
    assert [claim.pairs for claim in claims] == [(0.5,), (1.5,), (1.0,)]
    assert [claim.verdict for claim in claims] == ["short", "ok", "ok"]
    assert claims[-1].name == "moe_layer/median_bf16_over_fp32"


def test_plans_give_each_system_only_the_formats_it_takes() -> None:
    cases = {case.name: case for case in moe_layer.FULL.make_cases()}
    assert len(cases) == 4 + 4 + 4 * 2
    assert cases["decode/w8"].systems == ("moesys",)
    assert cases["linear/bf16"].systems == ("moesys", "torch")
    assert cases["linear/w8a8"].systems == ("moesys",)
    assert "loop-widened" in cases["1024x512-e64-k8/bf16"].systems
    assert "loop-widened" not in cases["1024x512-e64-k8/fp32"].systems
    assert len([case for case in moe_layer.QUICK.make_cases() if isinstance(case, ManyTokens)]) == 2


def test_options_narrow_the_plan_and_reach_the_worker() -> None:
    words = [
        "--quick",
        "--parts",
        "many",
        "--tokens",
        "64",
        "8",
        "--kernel",
        "torch",
        "--worker",
        "loop",
        "x/fp32",
    ]
    options = moe_layer.parse_arguments(words)
    plan = moe_layer.make_plan(options)
    assert options.worker == ["loop", "x/fp32"]
    assert (plan.parts, plan.tokens, plan.kernel) == (("many",), (8, 64), "torch")
    assert plan.systems == moe_layer.QUICK.systems


@pytest.mark.parametrize(
    ("our_seconds", "broken", "code"), [(1.0, False, 0), (2.0, False, 1), (1.0, True, 1)]
)
def test_exit_code_and_output(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    our_seconds: float,
    broken: bool,
    code: int,
) -> None:
    def start(runner: moe_layer.Runner, system: str, case_name: str) -> Outcome:
        record: dict[str, Any] = {"flops": 1e12}
        if system == "transformers-grouped_mm":
            return (
                Outcome(failed="exit code 1: oops")
                if broken
                else Outcome(skipped="transformers is not installed")
            )
        if system != moe_layer.GEMM:
            seconds = our_seconds if system == "moesys" else 1.0
            record = {"calls": {"512": [seconds]}, "errors": {}, "absent": {}}
        return Outcome(record=record)

    monkeypatch.setattr(moe_layer.Runner, "start", start)
    assert moe_layer.main(["--quick", "--parts", "many", "--formats", "fp32"]) == code
    out = capsys.readouterr().out
    word = "failed" if broken else "skipped"
    assert f"{word} transformers-grouped_mm" in out
    verdict = "short" if our_seconds > 1 else "ok"
    assert f"512_tokens_over_best_peer value={1 / our_seconds:.3f} floor=0.900 goal=- {verdict}" in out
    assert "fp32 GEMM 1000 GFLOP/s" in out
