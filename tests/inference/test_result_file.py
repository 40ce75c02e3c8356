"""Result files: each result at once, whole lines whatever happens, resumed under the settings of their beginning."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moesys.errors import GenerationError
from moesys.inference.batch import BatchResult
from moesys.inference.continuation import FinishReason
from moesys.inference.prompt_file import PromptLine
from moesys.inference.result_file import ResultFile, open_results

PROMPTS = [PromptLine(1, "a"), PromptLine(2, "b", "id", 9), PromptLine(4, "c\n日")]
SETTINGS: dict[str, Any] = {"model": "m", "seed": 1, "stop": ["x"]}


def make_result(index: int) -> BatchResult:
    return BatchResult(index, f"text\n{index} é", 2, 3, FinishReason.LENGTH)


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def add(results: ResultFile, *indices: int) -> None:
    for index in indices:
        results.add(index, make_result(index))


def test_a_result_is_written_at_once_and_names_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS) as results:
        assert results.left == [0, 1, 2]
        add(results, 2)
        assert [record["line"] for record in read(path)] == [4]
        assert results.left == [0, 1]
        add(results, 0)
        assert [record["line"] for record in read(path)] == [4, 1]
        add(results, 1)
        assert results.left == []
    third, first, second = read(path)
    assert first == {
        "line": 1,
        "prompt": "a",
        "text": "text\n0 é",
        "prompt_tokens": 2,
        "new_tokens": 3,
        "finish_reason": "length",
    }
    assert (second["id"], second["max_new_tokens"]) == ("id", 9)
    assert (third["line"], third["prompt"]) == (4, "c\n日")
    assert "日" in path.read_text(encoding="utf-8")


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS) as results:
        add(results, 2, 0)
    with open_results(path, PROMPTS, SETTINGS) as results:
        assert results.left == [1]
        add(results, 1)
    with open_results(path, [PromptLine(3, "new"), *PROMPTS, PromptLine(5, "d")], SETTINGS) as results:
        assert results.left == [0, 4]
        add(results, 4)
    assert [record["line"] for record in read(path)] == [4, 1, 2, 5]


@pytest.mark.parametrize("cut", [1, 5, -1])
def test_a_half_line_is_dropped(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS) as results:
        add(results, 0, 1)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    path.write_bytes(whole[: second + cut] if cut > 0 else whole[:cut])
    with open_results(path, PROMPTS, SETTINGS) as results:
        assert results.left == [1, 2]
        assert path.read_bytes() == whole[:second]
        add(results, 1)
    assert path.read_bytes() == whole


def test_a_write_that_fails_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write = os.write
    with open_results(path, PROMPTS, SETTINGS) as results:
        add(results, 0)

        def fail(descriptor: int, data: bytes) -> int:
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return write(descriptor, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            add(results, 1)
    assert [record["line"] for record in read(path)] == [1]


def test_other_settings_are_an_error_that_names_them(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS) as results:
        add(results, 0)
    before = path.read_bytes()
    other = {**SETTINGS, "seed": 2, "stop": []}
    with (
        pytest.raises(
            GenerationError,
            match=r'written under other settings: seed was 1 and is 2; stop was \["x"\] and is \[\]; choose another',
        ),
        open_results(path, PROMPTS, other),
    ):
        pass
    assert path.read_bytes() == before


def test_an_empty_file_is_begun_under_new_settings(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS):
        pass
    with open_results(path, PROMPTS, {"seed": 5}) as results:
        add(results, 0)
    with open_results(path, PROMPTS, {"seed": 5}) as results:
        assert results.left == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            None,
            r"has no out.jsonl.settings.json beside it, so its origin is not known; choose another --output",
        ),
        (b"{", "out.jsonl.settings.json is not JSON"),
        (b"[]", "out.jsonl.settings.json is not a JSON object"),
    ],
)
def test_a_file_of_another_origin_is_not_touched(
    settings: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("a letter")
    if settings is not None:
        (tmp_path / "out.jsonl.settings.json").write_bytes(settings)
    with pytest.raises(GenerationError, match=message), open_results(path, PROMPTS, SETTINGS):
        pass
    assert path.read_text() == "a letter"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS[:1], "line 2 is not the result of any of the prompts"),
        ([PROMPTS[0], PromptLine(2, "B", "id", 9)], "line 2 is not that of the prompt in line 2"),
        ([PROMPTS[0], PromptLine(2, "b", "id")], "line 2 is not that of the prompt in line 2"),
        ([PROMPTS[0], PromptLine(2, "b", None, 9)], "line 2 is not that"),
        ([PromptLine(2, "a"), PROMPTS[2]], "line 1 is not the result of any of the prompts"),
    ],
)
def test_other_prompts_are_an_error(prompts: list[PromptLine], message: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS) as results:
        add(results, 0, 1)
    with pytest.raises(GenerationError, match=message), open_results(path, prompts, SETTINGS):
        pass


def test_two_results_of_one_prompt_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS) as results:
        add(results, 1, 0)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])
    with (
        pytest.raises(GenerationError, match="line 3 and line 1 are both results of the prompt in line 2"),
        open_results(path, PROMPTS, SETTINGS),
    ):
        pass


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[1]\n", b"\n", b"\xff\n", b'{"line": [1]}\n', b'{"line": true}\n']
)
def test_lines_that_are_no_results_are_an_error(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_results(path, PROMPTS, SETTINGS):
        pass
    path.write_bytes(line)
    with pytest.raises(GenerationError, match="line 1"), open_results(path, PROMPTS, SETTINGS):
        pass
    assert path.read_bytes() == line


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        open_results(path, PROMPTS, SETTINGS),
        pytest.raises(GenerationError, match="is being written by another process"),
        open_results(path, PROMPTS, SETTINGS),
    ):
        pass
