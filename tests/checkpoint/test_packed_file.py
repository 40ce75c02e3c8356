"""A packed file that was damaged ends in an error of ours, or in exactly the model that was packed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import compute_logits
from safetensors import safe_open

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.checkpoint.load import load_model
from moesys.checkpoint.packed_file import open_packed_file
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packed_header import _seal
from moesys.checkpoint.packing import pack_model
from moesys.errors import ModelFormatError, MoesysError

NUM_MUTATIONS = 200
NUM_FORGERIES = 100

Entries = dict[str, Any]


@pytest.fixture(params=list(PackedForm))
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_model(tmp_path / "model", FAMILY_KEYS["qwen2_moe"] | {"num_hidden_layers": 1})
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 3}')
    pack_model(tmp_path / "model", tmp_path / "file", form=request.param)
    return tmp_path / "file"


def split(path: Path) -> tuple[Entries, bytes]:
    contents = path.read_bytes()
    length = int.from_bytes(contents[:8], "little")
    return json.loads(contents[8 : 8 + length]), contents[8 + length :]


def join(path: Path, entries: Entries, payload: bytes) -> Path:
    """Writes a file whose header has a right checksum of itself, whatever it says."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = _seal(text + b" " * (-(8 + len(text)) % 4096))
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return path


def forge(packed: Path, change: Callable[[Entries], None]) -> Path:
    entries, payload = split(packed)
    change(entries)
    return join(packed.with_name("forged"), entries, payload)


def test_other_programs_can_read_it(packed: Path) -> None:
    with safe_open(packed, "pt") as file:
        metadata = file.metadata()
        names = file.keys()
        assert (metadata["format"], metadata["version"]) == ("moesys-packed", "1")
        assert json.loads(metadata["config"])["model_type"] == "qwen2_moe"
        assert json.loads(metadata["checksums"]).keys() == set(names)
        assert file.get_tensor("experts/0/5").dtype is torch.uint8
        assert file.get_tensor("experts/0/5").shape[0] % 4096 == 0
        small = bytes(file.get_tensor("files/generation_config.json").tolist())
    assert small == b'{"eos_token_id": 3}'
    with open_packed_file(packed) as opened:
        assert opened.read_files() == {"generation_config.json": small}


def test_a_header_written_again_is_the_same(packed: Path) -> None:
    with open_packed_file(packed) as opened:
        assert opened.header.encode() == packed.read_bytes()[: opened.start]
        assert opened.start % 4096 == 0


def mutate(contents: bytearray, dice: random.Random, header_end: int) -> bytearray:
    where = dice.choice([8, header_end, header_end, len(contents)])
    at = dice.randrange(where)
    match dice.randrange(6):
        case 0 | 1:
            contents[at] ^= 1 << dice.randrange(8)
        case 2:
            contents[at] = dice.choice(b'0123456789{}[]", \0\xff')
        case 3:
            del contents[at : at + dice.choice([1, 8, 4096])]
        case 4:
            contents[at:at] = contents[at : at + dice.choice([1, 8, 4096])]
        case 5:
            del contents[at:]
    return contents


def test_damage_is_noticed_or_changes_nothing(packed: Path) -> None:
    dice = random.Random(0)
    original = packed.read_bytes()
    expected = compute_logits(load_model(packed))
    header_end = 8 + int.from_bytes(original[:8], "little")
    damaged = packed.with_name("damaged")
    num_refused = 0
    for _ in range(NUM_MUTATIONS):
        contents = mutate(bytearray(original), dice, header_end)
        if contents == original:
            continue
        damaged.write_bytes(contents)
        try:
            found = load_model(damaged)
        except MoesysError:
            num_refused += 1
        else:
            assert torch.equal(compute_logits(found), expected)
    assert num_refused > 0.8 * NUM_MUTATIONS


def test_a_config_that_was_changed_is_noticed(packed: Path) -> None:
    """Nothing but the header's own checksum can tell."""
    contents = packed.read_bytes()
    for one, other in (
        (b"1e-05", b"2e-05"),
        (b"rope_theta", b"rope_thetb"),
        (b'"checksums"', b' "checksums"'),
    ):
        changed = contents.replace(one, other, 1)
        assert changed != contents
        packed.write_bytes(changed)
        with pytest.raises(ModelFormatError, match="is no whole packed file"):
            load_model(packed)


def swap_experts(entries: Entries) -> None:
    one, other = entries["experts/0/1"], entries["experts/0/2"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def shorten_an_expert(entries: Entries) -> None:
    entries["experts/0/0"]["shape"][0] -= 4096


def overlap_experts(entries: Entries) -> None:
    entries["experts/0/1"]["data_offsets"] = entries["experts/0/0"]["data_offsets"]


def leave_out_a_tensor(entries: Entries) -> None:
    del entries["final_norm.weight"]


def rename_a_tensor(entries: Entries) -> None:
    entries["blocks.0.other"] = entries.pop("final_norm.weight")


def change_a_dtype(entries: Entries) -> None:
    entry = entries["final_norm.weight"]
    entry["dtype"], entry["shape"] = "I32", entry["shape"]


def change_metadata(**changes: str) -> Callable[[Entries], None]:
    return lambda entries: entries["__metadata__"].update(changes)


def change_config(**changes: object) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        metadata = entries["__metadata__"]
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)

    return change


def change_checksum(name: str, value: object) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        metadata = entries["__metadata__"]
        metadata["checksums"] = json.dumps(json.loads(metadata["checksums"]) | {name: value})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            change_metadata(version="2"),
            "it is of version 2, this moesys reads version 1; pack the model anew",
        ),
        (change_metadata(format="other"), "its metadata lack the format"),
        (change_metadata(weights="int4"), "its weights are 'int4', this moesys knows float, int8"),
        (change_metadata(config="[]"), "its JSON is not an object"),
        (change_config(hidden_size=64), "do not fit its config"),
        (change_config(num_experts=7), "missing: experts/0/6"),
        (change_config(shared_expert_intermediate_size=24), "shared_expert.gate_up_proj"),
        (change_config(num_hidden_layers=10**9), "asks for 1000000000 layers"),
        (change_config(dtype="bfloat16"), "the config asks for BF16"),
        (change_config(dtype="int8"), "dtype 'int8' in config.json is not supported"),
        (change_config(model_type="qwen9_moe"), "model_type 'qwen9_moe' is not supported"),
        (change_config(vocab_size=-3), "vocab_size is -3"),
        (change_checksum("experts/0/0", "00000000"), "experts/0/0 has 1 checksums for"),
        (change_checksum("final_norm.weight", "xyz"), "are no numbers of 8 digits"),
        (change_checksum("final_norm.weight", 7), "are no numbers of 8 digits"),
        (change_checksum("other", "00000000"), "its checksums are not those of its tensors"),
        (swap_experts, "differs from its checksum"),
        (shorten_an_expert, "should lie at bytes"),
        (overlap_experts, "should lie at bytes"),
        (leave_out_a_tensor, "should lie at bytes"),
        (rename_a_tensor, "checksums are not those of its tensors"),
        (change_a_dtype, "final_norm.weight is I32"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    change: Callable[[Entries], None], reason: str, packed: Path
) -> None:
    with pytest.raises(MoesysError, match=reason):
        load_model(forge(packed, change))


def test_an_unaligned_expert_is_refused(packed: Path) -> None:
    """The small file is moved before the experts, with its bytes; nothing else could be noticed."""
    entries, payload = split(packed)
    name = "files/generation_config.json"
    start, end = entries[name]["data_offsets"]
    for other in entries.values():
        if "data_offsets" in other and other is not entries[name]:
            other["data_offsets"] = [offset + end - start for offset in other["data_offsets"]]
    entries[name]["data_offsets"] = [0, end - start]
    forged = join(packed.with_name("forged"), entries, payload[start:end] + payload[:start])
    with pytest.raises(ModelFormatError, match=r"experts/0/0 begins at byte .* no multiple of 4096"):
        load_model(forged)


def test_forged_headers_never_load_another_model(packed: Path) -> None:
    """With a header whose own checksum is right, the rules of shape, place and weights' checksums are on their own."""
    dice = random.Random(1)
    expected = compute_logits(load_model(packed))
    names = [name for name in split(packed)[0] if name != "__metadata__"]
    num_refused = 0

    def change(entries: Entries) -> None:
        entry = entries[dice.choice(names)]
        match dice.randrange(4):
            case 0:
                entry["data_offsets"][dice.randrange(2)] += dice.choice([-4096, -1, 1, 64, 4096])
            case 1:
                entry["shape"] = [*entry["shape"], dice.choice([0, 1, 2])]
            case 2:
                entry["dtype"] = dice.choice(["U8", "I8", "F32", "BF16", "BOOL", "F8_E4M3", "X"])
            case 3:
                entry["shape"], entry["data_offsets"] = dice.choice(
                    [(e["shape"], e["data_offsets"]) for name, e in entries.items() if name in names]
                )

    for _ in range(NUM_FORGERIES):
        try:
            found = load_model(forge(packed, change))
        except MoesysError:
            num_refused += 1
        else:
            assert torch.equal(compute_logits(found), expected)
    assert num_refused > 0.7 * NUM_FORGERIES


def test_a_damaged_small_file_is_noticed(packed: Path) -> None:
    contents = packed.read_bytes()
    changed = contents.replace(b'{"eos_token_id": 3}', b'{"eos_token_id": 4}')
    assert changed != contents
    packed.write_bytes(changed)
    with (
        open_packed_file(packed) as opened,
        pytest.raises(
            ModelFormatError, match=r"files/generation_config\.json in .* differs from its checksum"
        ),
    ):
        opened.read_files()


def test_what_is_no_packed_file_is_told(packed: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name, reason in (
        ("model/model.safetensors", "is no packed file of moesys; give the folder of a model"),
        ("model/config.json", "is no whole packed file"),
        ("empty", "is too short for a header"),
        ("pipe", "is not a regular file"),
        ("missing", "No such file"),
    ):
        with pytest.raises(ModelFormatError, match=reason), open_packed_file(tmp_path / name):
            pass
