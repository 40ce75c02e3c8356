"""Prompt files: what is read, and that every wrong line is named before anything is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_decoders import make_tokenizer

from moesys.errors import GenerationError
from moesys.inference import SamplingParams
from moesys.inference.batch_plan import describe_settings, plan_prompts
from moesys.inference.model_digest import digest_model
from moesys.inference.prompt_file import PromptLine, read_prompts
from moesys.kernels import Int8Product


def write(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return path


def test_lines_are_prompts(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "a\u2028b\n"},
        b"",
        b"  \r",
        {"prompt": "", "id": "x", "max_new_tokens": 3},
        {"prompt": "日本", "id": 7, "max_new_tokens": None},
        b"",
    )
    assert read_prompts(path) == [
        PromptLine(1, "a\u2028b\n"),
        PromptLine(4, "", "x", 3),
        PromptLine(5, "日本", 7),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: Expecting property name"),
        (b'{"prompt": "\xff"}', "line 2: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "line 2: nested too deeply"),
        ([1], "line 2: must be an object, is a list"),
        (None, "line 2: must be an object, is null"),
        ({}, "line 2: prompt must be text, is missing"),
        ({"prompt": 3}, "line 2: prompt must be text, is a number"),
        ({"prompt": True}, "line 2: prompt must be text, is true or false"),
        (b'{"prompt": "\\ud800"}', "line 2: prompt holds half of a surrogate pair"),
        (
            {"prompt": "a", "tempreature": 1},
            "line 2: unknown key 'tempreature'; known ones: prompt, id, max_new_tokens",
        ),
        ({"prompt": "a", "id": 1.5}, "line 2: id must be text or a whole number, is a number"),
        ({"prompt": "a", "id": True}, "line 2: id must be text or a whole number, is true or false"),
        (
            {"prompt": "a", "max_new_tokens": 0},
            "line 2: max_new_tokens must be a whole number of 1 or more, is 0",
        ),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens must be .*, is True"),
        ({"prompt": "a", "id": "first"}, "line 2: id 'first' is that of line 1; give each its own"),
    ],
)
def test_a_wrong_line_is_named(line: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "id": "first"}, line, {"prompt": "b", "id": 1})
    with pytest.raises(
        GenerationError, match=rf"prompts.jsonl cannot be used; nothing was written:\n  .*{message}"
    ):
        read_prompts(path)


def test_all_wrong_lines_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a"}, *[{"prompt": n} for n in range(30)])
    with pytest.raises(GenerationError) as caught:
        read_prompts(path)
    listed = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in listed[:20]] == [f"line {n}" for n in range(2, 22)]
    assert listed[20:] == ["  and 10 more"]


def test_a_file_of_no_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r'holds no prompts; each line is an object such as \{"prompt"'):
        read_prompts(write(tmp_path, b"", b" "))


def test_ids_of_different_types_are_different(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "id": 1}, {"prompt": "a", "id": "1"})
    first, second = read_prompts(path)
    assert first.seed_name != second.seed_name


def test_a_plan_is_tokens_lengths_and_seeds() -> None:
    tokenizer, path = make_tokenizer(), Path("prompts.jsonl")
    lines = [PromptLine(1, "to be"), PromptLine(2, "to be"), PromptLine(3, "hi", "x", 5)]
    first, second, third = plan_prompts(path, lines, tokenizer, 40, None, SamplingParams(seed=3))
    assert first.token_ids == [tokenizer.end_of_text_id, *tokenizer.encode("to be")]
    assert (first.max_new_tokens, third.max_new_tokens) == (40 - len(first.token_ids), 5)
    assert len({first.sampling.seed, second.sampling.seed, third.sampling.seed}) == 3
    (again,) = plan_prompts(path, lines[1:2], tokenizer, 40, None, SamplingParams(seed=3))
    assert again == second
    (other,) = plan_prompts(path, lines[1:2], tokenizer, 40, None, SamplingParams(seed=4))
    assert other.sampling.seed != second.sampling.seed


def test_lines_that_do_not_fit_the_model_are_listed() -> None:
    lines = [PromptLine(1, "hi"), PromptLine(3, "🙃9" * 20), PromptLine(4, "hi", None, 1000)]
    with pytest.raises(GenerationError) as caught:
        plan_prompts(Path("prompts.jsonl"), lines, make_tokenizer(), 40, 20, SamplingParams())
    _, *listed = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in listed] == ["  line 3", "  line 4"]
    assert all("the model was made for 1 to 40" in line for line in listed)
    with pytest.raises(GenerationError, match=r"max_new_tokens \(0\) must be 1 or more"):
        plan_prompts(Path("prompts.jsonl"), lines, make_tokenizer(), 40, 0, SamplingParams())


def test_settings_change_with_all_that_texts_depend_on(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    base = describe_settings(tmp_path, None, SamplingParams(), [], None, None)
    assert json.loads(json.dumps(base)) == base
    assert base == describe_settings(tmp_path, None, SamplingParams(), [], None, Int8Product.W8)
    others = [
        describe_settings(tmp_path, 5, SamplingParams(), [], None, None),
        describe_settings(tmp_path, None, SamplingParams(0.5), [], None, None),
        describe_settings(tmp_path, None, SamplingParams(seed=1), [], None, None),
        describe_settings(tmp_path, None, SamplingParams(), ["x"], None, None),
        describe_settings(tmp_path, None, SamplingParams(), [], "bf16", None),
        describe_settings(tmp_path, None, SamplingParams(), [], None, Int8Product.W8A8),
    ]
    assert all(other != base for other in others)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ],
)
def test_a_models_digest_changes_with_each_file_that_a_text_depends_on(name: str, tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "config.json").write_text("{}")
    without = digest_model(tmp_path)
    (tmp_path / name).write_text("one")
    with_one = digest_model(tmp_path)
    (tmp_path / name).write_text("others")
    assert len({without, with_one, digest_model(tmp_path)}) == 3
    before = digest_model(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert digest_model(tmp_path) == before


def test_a_packed_file_has_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "model.packed"
    path.write_text("one")
    before = digest_model(path)
    path.write_text("others")
    assert digest_model(path) != before
