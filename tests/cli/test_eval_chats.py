"""``moesys eval`` of conversations scores the answers that it is told to, from folders and packed files alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_calls import Call

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packing import pack_model
from moesys.data import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>"
    "{% else %}{{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
TURNS = ["to be", "or not", "that is", "the question"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"] | {"vocab_size": 300})
    train_tokenizer([" ".join(TURNS)] * 3, 290).with_chat_template(TEMPLATE).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, TURNS, strict=True)]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    return tmp_path / "chats.jsonl"


def test_the_answers_that_are_asked_for_are_scored(
    model: Path, chats: Path, tmp_path: Path, moesys_command: Call
) -> None:
    pack_model(model, tmp_path / "file")
    for place in (model, tmp_path / "file"):
        num_bytes = {}
        for answers in ("all", "last", None):
            options = [] if answers is None else ["--chat-answers", answers]
            answer = moesys_command("eval", place, "--data", chats, "--format", "chat", *options, "--json")
            assert answer.status == 0, answer.err
            num_bytes[answers] = json.loads(answer.out)["num_bytes"]
        assert num_bytes == {"all": len("or not" + "the question"), "last": len("the question"), None: 18}


def test_options_that_cannot_be_used(model: Path, chats: Path, moesys_command: Call) -> None:
    for options, reason in (
        (["--data", chats, "--format", "jsonl", "--chat-answers", "last"], "data.chat_answers has no effect"),
        (
            ["--data", chats, "--format", "chat", "--chat-answers", "some"],
            "data.chat_answers: Input should be",
        ),
        (["--product", "w4"], "--product ('w4') must be w8 or w8a8"),
        (["--data", chats, "--format", "chat", "--product", "w8"], "product w8 has no effect on the folder"),
    ):
        answer = moesys_command("eval", model, *options)
        assert answer.status == 1
        assert reason in answer.error


def test_products_of_int8_weights_give_losses_of_their_own(
    model: Path, chats: Path, tmp_path: Path, moesys_command: Call
) -> None:
    pack_model(model, tmp_path / "file", form=PackedForm.INT8)
    losses = {}
    for place, product in (
        (model, None),
        (tmp_path / "file", None),
        (tmp_path / "file", "w8"),
        (tmp_path / "file", "w8a8"),
    ):
        options = [] if product is None else ["--product", product]
        answer = moesys_command("eval", place, "--data", chats, "--format", "chat", *options, "--json")
        assert answer.status == 0, answer.err
        losses[place.name, product] = json.loads(answer.out)["loss"]
    assert losses["file", None] == losses["file", "w8"] != losses["file", "w8a8"]
    assert losses["file", "w8"] != losses["model", None]
    assert losses["file", "w8a8"] == pytest.approx(losses["model", None], rel=0.05)
