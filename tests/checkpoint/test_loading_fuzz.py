"""Damaged checkpoints: each ends in an error of ours or in a model that runs on exactly the tensors of the files.

A process of its own, with a limit on its memory, damages small checkpoints at random and loads them. The judge of a
load that succeeds is the safetensors library: it must accept the files too, every tensor must be the one it reads, and
no tensor of the files may be left over. Then a few tokens must give finite logits, or an error of ours.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_checkpoints import WEIGHTS, make_fp8, make_mxfp4
from torch import Tensor

from moesys.checkpoint import load_model, save_model
from moesys.checkpoint.hf import find_family, read_config_file
from moesys.checkpoint.model_files import INDEX_NAME
from moesys.errors import MoesysError
from moesys.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    DenseConfig,
    DocumentAttend,
    Encoding,
    QKNorm,
    RopeConfig,
    StoredTensor,
    initialize_weights,
)
from moesys.moe import MoEConfig

MEMORY_BYTES = 2**30
SLOWEST_SECONDS = 5.0
LARGEST_USUAL = 1e4
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SCALE_ENDINGS = ("_scale_inv", "_blocks", "_scales")
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    2**31,
    10**9,
    10**30,
    1.5,
    float("nan"),
    "x",
    "8",
    "",
    [],
    [0],
    {},
    {"a": 1},
]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "U8", "BOOL", "F4", "", "f32"]

Damage = Callable[[Path, random.Random], None]


def make_plain(folder: Path, **options: Any) -> None:
    layers = (MoEConfig(4, 2, 6), DenseConfig(10))
    attention = AttentionConfig(4, 2, 6, RopeConfig(6), QKNorm.PER_HEAD)
    model = Decoder(DecoderConfig(23, 12, (attention,) * 2, layers, tie_embeddings=False))
    initialize_weights(model, seed=0, std=0.5)
    save_model(model, folder, torch.float32, {}, **options)


MAKERS: dict[str, Callable[[Path], None]] = {
    "plain": make_plain,
    "sharded": lambda folder: make_plain(folder, max_shard_bytes=2000),
    "fp8": make_fp8,
    "mxfp4": make_mxfp4,
}


def damage_bytes(contents: bytearray, dice: random.Random, end: int) -> bytearray:
    """Flips bits, overwrites, removes, repeats or inserts a few of the first ``end`` bytes."""
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        at = dice.randrange(max(1, min(end, len(contents))))
        match dice.randrange(5):
            case 0:
                contents[at] ^= 1 << dice.randrange(8)
            case 1:
                contents[at] = dice.randrange(256)
            case 2:
                del contents[at : at + dice.choice([1, 1, 2, 8, 100])]
            case 3:
                contents[at:at] = contents[at : at + dice.choice([1, 2, 8, 100])]
            case 4:
                contents[at:at] = dice.choice(
                    [b"{", b"}", b"[", b"]", b'"', b",", b"-", b"9", b"\0", b"\xff", b"\\u0"]
                )
        if not contents:
            break
    return contents


def pick_weights(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(folder.glob("*.safetensors")))


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    contents = path.read_bytes()
    length = int.from_bytes(contents[:8], "little")
    return json.loads(contents[8 : 8 + length]), contents[8 + length :]


def join_header(path: Path, header: bytes, payload: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + payload)


def truncate(folder: Path, dice: random.Random) -> None:
    path = pick_weights(folder, dice)
    size = path.stat().st_size
    os.truncate(
        path, dice.choice([dice.randrange(size), dice.randrange(20), size - 1, size + 1, size + 4096])
    )


def damage_length(folder: Path, dice: random.Random) -> None:
    path = pick_weights(folder, dice)
    contents = bytearray(path.read_bytes())
    length = int.from_bytes(contents[:8], "little")
    extremes = [
        0,
        1,
        2**63,
        2**64 - 1,
        10**8,
        10**8 + 1,
        len(contents),
        len(contents) - 8,
        length + 1,
        length - 1,
    ]
    flipped = length ^ (1 << dice.randrange(64))
    contents[:8] = dice.choice([*extremes, *[flipped] * 10]).to_bytes(8, "little")
    path.write_bytes(contents)


def damage_header_bytes(folder: Path, dice: random.Random) -> None:
    """With the length corrected to the new header, so that the JSON is looked at."""
    path = pick_weights(folder, dice)
    header, payload = split_header(path)
    text = damage_bytes(bytearray(json.dumps(header, separators=(",", ":")).encode()), dice, 10**9)
    join_header(path, bytes(text), payload)


def damage_file_bytes(folder: Path, dice: random.Random) -> None:
    path = pick_weights(folder, dice)
    path.write_bytes(damage_bytes(bytearray(path.read_bytes()), dice, dice.choice([8, 2000, 10**9])))


def damage_header_fields(folder: Path, dice: random.Random) -> None:
    path = pick_weights(folder, dice)
    header, payload = split_header(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = dice.choice(names), dice.choice(names)
    entry = header[name]
    text: str | None = None
    match dice.randrange(12):
        case 0:
            entry["dtype"] = dice.choice(DTYPES)
        case 1:
            entry["shape"] = [dice.choice([*VALUES, *entry["shape"]]) for _ in range(dice.randrange(5))]
        case 2:
            entry["shape"] = dice.choice(
                [entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]], []]
            )
        case 3:
            entry["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"],
                entry["data_offsets"],
            )
        case 4:
            entry["data_offsets"][dice.randrange(2)] += dice.choice([-8, -4, -1, 1, 4, 8, 2**40, 2**63])
        case 5:
            entry["data_offsets"] = dice.choice(
                [[], [0], [0, 0, 0], [4, 0], "0", None, [0.0, 4.0], ["0", "4"]]
            )
        case 6:
            header[dice.choice([f"{name}x", other, "", "__metadata__", "lm_head.weight", "\ud800"])] = (
                header.pop(name)
            )
        case 7:
            del header[name]
        case 8:
            entry[dice.choice(["dtype", "shape", "data_offsets", "more"])] = dice.choice(VALUES)
        case 9:
            header["__metadata__"] = dice.choice([*VALUES, {"format": "tf"}])
        case 10:
            text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
        case 11:
            depth = dice.choice([10, 1000, 50_000])
            text = json.dumps(header)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    join_header(path, (text or json.dumps(header)).encode(), payload)


def damage_json(path: Path, dice: random.Random) -> None:
    if dice.random() < 0.3:
        path.write_bytes(damage_bytes(bytearray(path.read_bytes()), dice, 10**9))
        return
    keys = json.loads(path.read_text())
    for _ in range(dice.choice([1, 1, 1, 2])):
        place = keys
        while True:
            key = dice.choice(list(place))
            if not (isinstance(place[key], dict) and place[key] and dice.random() < 0.8):
                break
            place = place[key]
        if dice.random() < 0.2:
            del place[key]
        else:
            place[key] = dice.choice([*VALUES, *place.values()])
        if not place or not keys:
            break
    path.write_text(json.dumps(keys))


def damage_config(folder: Path, dice: random.Random) -> None:
    damage_json(folder / "config.json", dice)


def damage_index(folder: Path, dice: random.Random) -> None:
    """Of a folder without an index, one is made up."""
    path = folder / INDEX_NAME
    if not path.exists():
        names = list(load_file(folder / WEIGHTS))
        path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}))
    if dice.random() < 0.5:
        damage_json(path, dice)
        return
    index = json.loads(path.read_text())
    name = dice.choice([*index["weight_map"], "ghost"])
    shards = sorted(set(index["weight_map"].values()))
    names = [
        "../x.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "\0.safetensors",
        "config.json",
    ]
    index["weight_map"][name] = dice.choice([*names, *shards, *shards])
    path.write_text(json.dumps(index))


def damage_folder(folder: Path, dice: random.Random) -> None:
    path, other = pick_weights(folder, dice), pick_weights(folder, dice)
    contents = path.read_bytes()
    match dice.randrange(4):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(other.read_bytes())
            other.write_bytes(contents)
        case 2:
            path.unlink()
            path.mkdir()
        case 3:
            other.write_bytes(contents)


def damage_match(folder: Path, dice: random.Random) -> None:
    """Leaves tensors without a place: one more in a file, or a layer that ``config.json`` no longer asks for."""
    if dice.random() < 0.5:
        keys = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(keys | {"num_hidden_layers": 1}))
        return
    path, index = pick_weights(folder, dice), folder / INDEX_NAME
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    further = dice.choice(["further", f"{name}.further", name.replace("layers.1", "layers.2"), HEAD])
    save_file({further: tensors[name].clone()} | tensors, path)
    if index.exists():
        keys = json.loads(index.read_text())
        keys["weight_map"].setdefault(further, path.name)
        index.write_text(json.dumps(keys))


DAMAGES: tuple[Damage, ...] = (
    truncate,
    damage_length,
    damage_header_bytes,
    damage_header_bytes,
    damage_file_bytes,
    damage_header_fields,
    damage_header_fields,
    damage_header_fields,
    damage_config,
    damage_config,
    damage_index,
    damage_folder,
    damage_match,
)


def check_loaded(folder: Path, model: Decoder) -> None:
    """Raises AssertionError when a loaded model holds other tensors than the library reads from the files, or fewer,
    or when its logits are not finite though the weights are of a usual size."""
    files = read_files(folder)
    keys = read_config_file(folder)
    quantization = keys.get("quantization_config") or {}
    block = quantization.get("weight_block_size") or [10**9, 10**9]
    if model.head is None and HEAD in files:
        head = files.pop(HEAD)
        assert same_numbers(head, files.setdefault(EMBEDDING, head)), "the head is not the embedding"
    used: set[str] = set()
    for stored in find_family(keys).list_tensors(model, files.keys()):
        expected = read_expected(stored, files, block).to(stored.view.dtype)
        found = stored.view.reshape(stored.shape)
        assert expected.shape == found.shape, stored.name
        assert same_numbers(expected, found), stored.name
        used |= {stored.name, *(f"{stored.name}{ending}" for ending in SCALE_ENDINGS)}
    left_over = {name for name in files.keys() - used if not name.endswith("rotary_emb.inv_freq")}
    assert not left_over, f"never read: {sorted(left_over)}"


def check_runs(model: Decoder) -> None:
    """Raises AssertionError when logits are not finite though all weights are of a usual size."""
    length = min(4, model.config.position_limit)
    token_ids = torch.arange(length).remainder(model.config.vocab_size)
    with torch.no_grad():
        hidden_BSD = model(token_ids[None], torch.arange(length)[None], DocumentAttend(None)).hidden_BSD
        logits = model.compute_logits(hidden_BSD)
    if all(is_usual(tensor) for tensor in (*model.parameters(), *model.buffers())):
        assert logits.isfinite().all(), "the logits are not finite"


def is_usual(tensor: Tensor) -> bool:
    """Whether no number is NaN or so large that it says for itself that the files were damaged."""
    return bool((tensor.abs() <= LARGEST_USUAL).all())


def same_numbers(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def read_files(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors as the library reads them; raises AssertionError where it refuses a file."""
    index = folder / INDEX_NAME
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {WEIGHTS}
    files: dict[str, Tensor] = {}
    for name in names:
        try:
            files |= load_file(folder / name)
        except (SafetensorError, KeyError) as error:
            raise AssertionError(f"the library refuses {name}: {error}") from error
    return files


def read_expected(stored: StoredTensor, files: dict[str, Tensor], block: list[int]) -> Tensor:
    if stored.encoding is Encoding.MXFP4:
        blocks, exponents = files[f"{stored.name}_blocks"], files[f"{stored.name}_scales"]
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        values = torch.stack([table[blocks.long() & 15], table[blocks.long() >> 4]], dim=-1).flatten(-2)
        powers = torch.where(exponents == 255, torch.nan, 2.0 ** (exponents.double() - 127))
        return (values.double() * powers.unsqueeze(-1)).float().flatten(-2)
    values = files[stored.name]
    if values.dtype != torch.float8_e4m3fn:
        return values
    factors = files[f"{stored.name}_scale_inv"]
    if factors.dtype in (torch.uint8, torch.float8_e8m0fnu):
        powers = 2.0 ** (factors.view(torch.uint8).double() - 127)
        factors = torch.where(factors.view(torch.uint8) == 255, torch.nan, powers).float()
    factors = factors.float().reshape(-(-values.shape[0] // block[0]), -(-values.shape[1] // block[1]))
    rows = torch.arange(values.shape[0]) // block[0]
    columns = torch.arange(values.shape[1]) // block[1]
    return values.float() * factors[rows][:, columns]


def try_loading(folder: Path) -> str:
    """Returns how it ended. What `check_loaded` raises is never an end, whatever its kind."""
    try:
        model = load_model(folder)
    except MoesysError:
        return "refused"
    check_loaded(folder, model)
    try:
        check_runs(model)
    except MoesysError:
        return "refused to run"
    return "loaded"


def run(folder: Path, first: int, count: int) -> dict[str, Any]:
    """Damages and loads ``count`` checkpoints in this process; returns what became of them."""
    for name, make in MAKERS.items():
        (folder / name).mkdir()
        make(folder / name)
        assert try_loading(folder / name) == "loaded"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    ends = {"loaded": 0, "refused": 0, "refused to run": 0}
    failures: list[str] = []
    for seed in range(first, first + count):
        dice = random.Random(seed)
        base, damage = dice.choice(sorted(MAKERS)), dice.choice(DAMAGES)
        damaged = folder / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder / base, damaged)
        damage(damaged, dice)
        started = time.monotonic()
        try:
            end = try_loading(damaged)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
            failures.append(f"seed {seed} ({base}, {damage.__name__}): {type(error).__name__}: {error}")
        else:
            ends[end] += 1
        if (seconds := time.monotonic() - started) > SLOWEST_SECONDS:
            failures.append(f"seed {seed} ({base}, {damage.__name__}): took {seconds:.1f} s")
    return {**ends, "failures": failures}


def run_apart(folder: Path, first: int, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), str(first), str(count)]
    paths = os.pathsep.join(path for path in sys.path if path)
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")
def test_damaged_checkpoints_never_load_wrongly(tmp_path: Path) -> None:
    outcome = run_apart(tmp_path, 0, 400)
    assert outcome["failures"] == []
    assert outcome["refused"] > 200
    assert outcome["loaded"] > 20


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")
@pytest.mark.parametrize("part", range(4))
def test_many_damaged_checkpoints_never_load_wrongly(tmp_path: Path, part: int) -> None:
    assert run_apart(tmp_path, 10_000 * (part + 1), 2_000)["failures"] == []


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))  # noqa: T201
