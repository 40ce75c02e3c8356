"""The benchmark harness's pure parts, and that workers and peak memory are read right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HARNESS = Path(__file__).resolve().parents[2] / "benchmarks" / "harness.py"


def _load_harness() -> ModuleType:
    """Benchmarks are scripts beside the package; they are not importable by name."""
    spec = importlib.util.spec_from_file_location("benchmark_harness", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


harness = _load_harness()


def test_spread_is_the_median_with_interpolated_deciles() -> None:
    assert harness.Spread.of([7.0]) == harness.Spread(7.0, 7.0, 7.0)
    spread = harness.Spread.of([float(n) for n in range(10, -1, -1)])
    assert (spread.median, spread.low, spread.high) == (5.0, 1.0, 9.0)
    with pytest.raises(ValueError, match="at least one"):
        harness.Spread.of([])


def test_pairs_compare_the_same_pass() -> None:
    assert harness.pair_ratios([2.0, 9.0], [1.0, 3.0]) == (2.0, 3.0)
    with pytest.raises(ValueError, match="2 and 1"):
        harness.pair_ratios([2.0, 9.0], [1.0])


def test_passes_go_forwards_and_backwards() -> None:
    forwards, backwards = ("a", "b", "c"), ("c", "b", "a")
    assert harness.alternating_passes(["a", "b", "c"], rounds=2) == [forwards, backwards, forwards, backwards]


@pytest.mark.parametrize(
    ("pairs", "better", "line"),
    [
        ((1.2, 1.3, 1.4), "higher", "claim x value=1.300 floor=1.100 goal=1.500 ok"),
        ((0.9, 1.0, 1.05), "higher", "claim x value=1.000 floor=1.100 goal=1.500 short"),
        ((1.0, 1.2, 1.4), "higher", "claim x value=1.200 floor=1.100 goal=1.500 ok noisy"),
        ((0.5, 1.0, 1.6), "higher", "claim x value=1.000 floor=1.100 goal=1.500 short noisy"),
        ((1.1,), "higher", "claim x value=1.100 floor=1.100 goal=1.500 ok"),
        ((0.8, 0.9, 0.9), "lower", "claim x value=0.900 floor=1.100 goal=1.500 ok"),
        ((1.2, 1.3, 1.4), "lower", "claim x value=1.300 floor=1.100 goal=1.500 short"),
    ],
)
def test_a_claim_is_judged_by_its_median(pairs: tuple[float, ...], better: str, line: str) -> None:
    assert harness.Claim("x", 1.1, pairs, goal=1.5, better=better).line == line


def test_a_claim_against_an_absent_peer_is_skipped_and_never_ok() -> None:
    claim = harness.Claim("x", floor=1.0, missing="tutel")
    assert claim.line == "claim x value=- floor=1.000 goal=- skipped tutel"
    assert claim.verdict == "skipped"
    assert claim.record["spread"] is None


def test_table_aligns_names_left_and_numbers_right() -> None:
    table = harness.format_table(("system", "rate"), [("a", "12345"), ("longer name", "7")])
    assert table.splitlines() == [
        "system        rate",
        "-----------  -----",
        "a            12345",
        "longer name      7",
    ]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("print('noise'); print('{\"rate\": 3}')", {"record": {"rate": 3}}),
        ('print(\'{"skipped": "no such library"}\')', {"skipped": "no such library"}),
        (
            "import sys; print('noise', file=sys.stderr); sys.exit('out of paper')",
            {"failed": "exit code 1: out of paper"},
        ),
        ("import time; time.sleep(60)", {"failed": "not done after 1 s"}),
    ],
    ids=["record", "skipped", "broken", "too slow"],
)
def test_worker_outcomes(tmp_path: Path, body: str, outcome: dict[str, object]) -> None:
    script = tmp_path / "worker.py"
    script.write_text(body)
    assert harness.run_worker(script, [], threads=1, limit_seconds=1.0 if "sleep" in body else 30.0) == (
        harness.Outcome(**outcome)
    )


def test_peak_memory_sees_what_was_freed_again() -> None:
    memory = harness.PeakMemory()
    memory.reset()
    block = bytearray(64 << 20)
    del block
    peak = memory.read_bytes()
    assert peak > 60 << 20
    if memory.was_reset:
        memory.reset()
        assert memory.read_bytes() < peak - (32 << 20)


@pytest.mark.parametrize(
    ("timing", "num_calls"),
    [
        ({"min_calls": 5, "min_seconds": 0.0}, 5),
        ({"min_calls": 3, "min_seconds": 10.0}, 10),
        ({"min_calls": 50, "min_seconds": 0.0, "max_seconds": 4.0}, 4),
        ({"min_calls": 5, "min_seconds": 0.0, "max_seconds": 0.5}, 1),
    ],
    ids=["calls", "seconds", "limit", "one at least"],
)
def test_calls_are_timed_until_enough_were_seen(
    monkeypatch: pytest.MonkeyPatch, timing: dict[str, float], num_calls: int
) -> None:
    """Every call takes one second of a clock that only calls move."""
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    settings = {"max_seconds": 100.0, **timing}
    assert harness.time_calls(call, harness.Timing(**settings)) == [1.0] * num_calls


def test_a_system_that_fails_once_is_out_of_every_pass() -> None:
    measured = harness.Measured()
    measured.add("a", harness.Outcome(record={"rate": 1}))
    measured.add("b", harness.Outcome(record={"rate": 2}))
    measured.add("a", harness.Outcome(failed="broke"))
    measured.add("c", harness.Outcome(skipped="not here"))
    assert list(measured.records) == ["b"]
    assert [measured.is_out(name) for name in "abc"] == [True, False, True]
    assert measured.absence_lines == ["skipped c (not here)", "failed a (broke)"]
