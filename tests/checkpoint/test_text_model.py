"""A decoder and its tokenizer must belong together; dtypes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moesys.checkpoint import hf, load_text_model, parse_dtype, save_model, text_model
from moesys.data.tokenizer import train_tokenizer
from moesys.errors import DataError, ModelFormatError
from moesys.models import AttentionConfig, Decoder, DecoderConfig, QKNorm, RopeConfig, initialize_weights
from moesys.moe import MoEConfig


def write_folder(folder: Path, vocab_size: int) -> Path:
    attention = AttentionConfig(2, 1, 4, RopeConfig(4), QKNorm.PER_HEAD)
    model = Decoder(DecoderConfig(vocab_size, 8, (attention,), (MoEConfig(2, 1, 4),)))
    initialize_weights(model, seed=0, std=0.5)
    save_model(model, folder, torch.float32, {})
    train_tokenizer(["to be or not to be"], 260).save(folder)
    return folder


def test_it_loads_as_what_was_asked_for(tmp_path: Path) -> None:
    loaded = load_text_model(write_folder(tmp_path, 300), "bf16")
    assert loaded.decoder.embedding.weight.dtype == torch.bfloat16
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("to be")) == "to be"
    assert load_text_model(tmp_path).decoder.embedding.weight.dtype == torch.float32


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelFormatError, match="has 260 tokens, the model embeds 259; they do not belong together"
    ):
        load_text_model(write_folder(tmp_path, 259))


def test_a_missing_tokenizer_is_found_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, 300)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setattr(text_model, "load_model", lambda *_: pytest.fail("read the weights"))
    with pytest.raises(DataError, match="there is no such file"):
        load_text_model(tmp_path)


def test_a_run_is_said_to_be_one_though_it_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(ModelFormatError, match="export it first"):
        load_text_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, {0}),
        (5, None, {0, 5}),
        ([5, 6], None, {0, 5, 6}),
        (5, {}, {0, 5}),
        (5, {"eos_token_id": [7, 8]}, {0, 7, 8}),
        (5, {"eos_token_id": None}, {0}),
    ],
)
def test_stop_tokens_are_those_of_the_generation_config(
    tmp_path: Path, config: object, generation: object, expected: set[int]
) -> None:
    write_folder(tmp_path, 300)
    keys = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_text_model(tmp_path).stop_ids == expected


@pytest.mark.parametrize("value", ["</s>", -1, [1, "2"], True, {"id": 1}])
def test_a_stop_token_that_is_no_id_is_refused(tmp_path: Path, value: object) -> None:
    write_folder(tmp_path, 300)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelFormatError, match=r"eos_token_id in .* must be a token id or a list of them"):
        load_text_model(tmp_path)


def test_fp16_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "read_config_file", lambda *_: pytest.fail("read the folder"))
    with pytest.raises(ModelFormatError, match=r"dtype fp16 is refused: .* use bf16"):
        load_text_model(tmp_path, "fp16")


def test_dtype_names() -> None:
    assert (parse_dtype("fp32"), parse_dtype("bf16")) == (torch.float32, torch.bfloat16)
    with pytest.raises(ModelFormatError, match="dtype 'int8' is not known; use fp32 or bf16"):
        parse_dtype("int8")
