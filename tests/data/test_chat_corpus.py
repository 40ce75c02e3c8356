"""Chat JSONL: read with suspicion, packed whole, learned in answers only, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import TEMPLATES, add_turns

from moesys.config import load_config
from moesys.data import IGNORED_TARGET, SequenceLoader, Tokenizer, heldout_windows, pack_source, prepare_data
from moesys.data.chat_corpus import load_conversations
from moesys.errors import DataError, IneffectiveOptionError

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def write_lines(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def make_records(number: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i} " * (1 + i % 3)},
                {"role": "assistant", "content": f"answer {i * i} " * (1 + i % 5) + "end"},
            ]
        }
        for i in range(number)
    ]


@pytest.fixture
def chat_folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    add_turns(tokenizer, folder, (TEMPLATES / "qwen.jinja").read_text())
    return folder


def read_config(chats: Path, folder: Path, *more: str) -> Any:
    keys = [
        f'data.source="{chats}"',
        "data.format=chat",
        f'data.tokenizer="{folder}"',
        "data.sequence_length=128",
    ]
    return load_config(None, [*keys, *more]).data


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ('{"text": "a"}', r"there is no list 'messages' \(keys: text\)"),
        ('{"messages": []}', "messages must be a list of at least one"),
        ('{"messages": ["a"]}', "message 0 must be an object with a role"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "message 0 must be an object with a role"),
        ('{"messages": [{"role": "assistant"}]}', r"message 0 \(assistant\) has neither content nor tool_calls"),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "content must be text or a list of parts, got int"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "lone surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message with the role assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": {}}', "tools must be a list"),
        ('{"conversations": [{"from": "bing", "value": "a"}]}', "turn 0 .* got 'bing'"),
        ('{"conversations": [{"from": "gpt"}]}', "turn 0"),
    ],
)  # fmt: skip
def test_a_bad_line_is_an_error_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"messages": [QUESTION, ANSWER]})
    (tmp_path / "chats.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"chats.jsonl:3: .*{message}"):
        load_conversations(str(tmp_path / "chats.jsonl"))


def test_lines_in_either_form_are_read_once(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    system = {"role": "system", "content": "s"}
    write_lines(tmp_path / "a.jsonl", [{"conversations": turns}, {"messages": [QUESTION, ANSWER]}])
    write_lines(tmp_path / "b.jsonl", [{"messages": [QUESTION, ANSWER]}])
    (tmp_path / "README.md").write_text("not data")
    found = load_conversations(str(tmp_path))
    assert sorted(conversation.name for conversation in found) == ["a.jsonl:1", "b.jsonl:1"]
    by_name = {conversation.name: list(conversation.messages) for conversation in found}
    assert by_name["a.jsonl:1"] == [system, QUESTION, ANSWER]
    assert [c.content_hash for c in found] == sorted(c.content_hash for c in found)


def test_a_corpus_without_conversations_is_an_error(chat_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there is no conversation"):
        load_conversations(str(tmp_path / "empty.jsonl"))
    one = write_lines(tmp_path / "one.jsonl", make_records(1))
    with pytest.raises(DataError, match="at least 2 different conversations"):
        prepare_data(read_config(one, chat_folder), tmp_path / "cache")


def test_conversations_lie_whole_in_rows_and_only_answers_are_targets(
    chat_folder: Path, tmp_path: Path
) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", make_records(40))
    data = prepare_data(read_config(chats, chat_folder), tmp_path / "cache")
    loader = SequenceLoader(data.train, 128, 4, 2, seed=0)
    answers: list[str] = []
    for step in range(loader.steps_per_epoch):
        for part in range(2):
            batch = loader.load(step, part)
            for row in range(2):
                tokens, targets = batch.token_ids_BS[row], batch.target_ids_BS[row]
                assert int(batch.positions_BS[row, 0]) == 0
                for document in range(int(batch.document_ids_BS[row].max()) + 1):
                    inside = batch.document_ids_BS[row] == document
                    text = data.tokenizer.decode(tokens[inside].tolist())
                    assert text.startswith("<|im_start|>user\nquestion")
                    assert text.count("<|im_start|>user") == 1
                    positions = batch.positions_BS[row][inside]
                    assert positions.tolist() == list(range(len(positions)))
                    learned = targets[inside]
                    answers.append(data.tokenizer.decode(learned[learned != IGNORED_TARGET].tolist()))
    expected = [record["messages"][1]["content"] + "<|im_end|>" for record in make_records(40)]
    heldout = [name.rpartition(":")[2] for name in data.heldout.names]
    learned = [text for i, text in enumerate(expected, start=1) if str(i) not in heldout]
    assert set(answers) == set(learned)
    assert len(heldout) + len(learned) == 40
    assert data.train.num_targets == sum(
        len(data.tokenizer.encode(text.removesuffix("<|im_end|>"))) + 1 for text in learned
    )
    assert data.train.num_bytes == sum(len(text.removesuffix("<|im_end|>")) for text in learned)
    assert f"{len(heldout)} conversations held out" in data.description


def test_rows_are_nearly_full(chat_folder: Path, tmp_path: Path) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", make_records(200))
    config = read_config(chats, chat_folder, "data.sequence_length=256", "data.heldout_fraction=0.01")
    rows = prepare_data(config, tmp_path / "cache").train
    whole = pack_source(config, Tokenizer.load(chat_folder), None, tmp_path / "cache")
    share = rows.num_documents / whole.num_documents
    assert whole.num_tokens * share > 0.9 * rows.num_tokens


def test_held_out_answers_are_scored_once_in_windows(chat_folder: Path, tmp_path: Path) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", make_records(30))
    config = read_config(chats, chat_folder, "data.heldout_fraction=0.3")
    packed = prepare_data(config, tmp_path / "cache").heldout
    for length, stride in ((96, 96), (16, 5), (16, 16)):
        held = heldout_windows(packed, length, stride)
        found = [
            int(token) for batch in held.batches for token in batch.target_ids_BS.flatten()
            if token != IGNORED_TARGET
        ]  # fmt: skip
        assert len(found) == held.num_targets == packed.num_targets
        assert packed.is_target is not None
        assert sorted(found) == sorted(packed.tokens[packed.is_target].tolist())
    whole = pack_source(config, Tokenizer.load(chat_folder), None, tmp_path / "cache")
    assert whole.num_documents == 30
    part = pack_source(config, Tokenizer.load(chat_folder), 0.3, tmp_path / "cache")
    assert part.names == packed.names


def test_what_is_too_long_is_an_error_or_counted(chat_folder: Path, tmp_path: Path) -> None:
    records = make_records(10)
    records[3]["messages"][1]["content"] = "long answer " * 30
    records[4]["messages"][0]["content"] = "long question " * 30
    chats = write_lines(tmp_path / "chats.jsonl", records)

    def prepare(*more: str) -> Any:
        return prepare_data(
            read_config(chats, chat_folder, "data.heldout_fraction=0.01", *more), tmp_path / "cache"
        )

    held = prepare("data.sequence_length=1000").heldout.names
    assert not {"chats.jsonl:4", "chats.jsonl:5"} & set(held)
    with pytest.raises(
        DataError, match=r"2 of 9 conversations are longer than data.sequence_length \(128\); the fir"
    ):
        prepare()
    dropped = prepare("data.overlong=drop")
    assert (dropped.train.num_dropped, dropped.train.num_truncated) == (2, 0)
    assert "2 dropped (longer than 128 tokens)" in dropped.description
    cut = prepare("data.overlong=truncate")
    assert (cut.train.num_dropped, cut.train.num_truncated) == (1, 1)
    assert cut.train.num_targets > dropped.train.num_targets
    assert "1 truncated (longer than 128 tokens), 1 dropped" in cut.description
    with pytest.raises(DataError, match="no conversation is left"):
        prepare("data.overlong=drop", "data.sequence_length=4")


def test_the_fingerprint_follows_what_decides_the_tokens(chat_folder: Path, tmp_path: Path) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", make_records(12))
    template = tmp_path / "other.jinja"
    template.write_text((TEMPLATES / "generation.jinja").read_text())
    variants = [
        [],
        ["data.chat_answers=last"],
        ["data.chat_date=2025-05-01"],
        [f'data.chat_template="{template}"'],
        ["data.sequence_length=160"],
        ["data.overlong=drop"],
    ]
    found = [prepare_data(read_config(chats, chat_folder, *more), tmp_path / "cache") for more in variants]
    assert len({data.fingerprint for data in found}) == len(variants)
    again = prepare_data(read_config(chats, chat_folder), tmp_path / "other cache")
    assert again.fingerprint == found[0].fingerprint
    assert np.array_equal(again.train.tokens, found[0].train.tokens)
    assert found[3].tokenizer.render_files()["chat_template.jinja"] == template.read_bytes()
    kept = prepare_data(read_config(chats, chat_folder), tmp_path / "cache", found[3].tokenizer)
    assert np.array_equal(kept.train.tokens, found[3].train.tokens)


def test_a_damaged_entry_is_rebuilt(
    chat_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", make_records(12))
    first = prepare_data(read_config(chats, chat_folder), tmp_path / "cache")
    expected = np.array(first.train.tokens)
    for name in ("tokens.bin", "is_target.npy"):
        for file in (tmp_path / "cache" / "packed").glob(f"*/{name}"):
            file.write_bytes(file.read_bytes()[:-3])
        again = prepare_data(read_config(chats, chat_folder), tmp_path / "cache")
        assert np.array_equal(again.train.tokens, expected)
    assert caplog.text.count("built again") == 4


def test_chat_options_without_chats_are_errors(chat_folder: Path, tmp_path: Path) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", make_records(12))
    for key in ("chat_answers=last", "chat_date=2025-05-01", "overlong=drop", 'chat_template="x"'):
        with pytest.raises(IneffectiveOptionError, match=rf"data.{key.partition('=')[0]} has no effect"):
            load_config(None, [f'data.source="{chats}"', f"data.{key}"])
    with pytest.raises(IneffectiveOptionError, match=r"data.text_field"):
        read_config(chats, chat_folder, "data.text_field=x")
    plain = load_config(None, [f'data.source="{chats}"', "data.format=chat"]).data
    with pytest.raises(DataError, match=r"set model.init to a model folder, or data.tokenizer"):
        prepare_data(plain, tmp_path / "cache")
