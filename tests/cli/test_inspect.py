"""``moesys inspect``: what it says, how wide, how fast, and what it refuses."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_calls import Call
from safetensors.torch import load_file, save_file

from family_keys import FAMILY_KEYS
from model_folders import write_model, write_sparse_model
from moesys.checkpoint import load_model
from moesys.inference.pages import PagePool
from moesys.models import DecoderConfig

RAM_BYTES = 64 * 2**30
NUM_EXPERTS = FAMILY_KEYS["glm4_moe"]["n_routed_experts"]
LARGE_KEYS = FAMILY_KEYS["qwen3_moe"] | {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [0, 1, 2],
    "intermediate_size": 6144,
}


def count_step_bytes(
    config: DecoderConfig, num_tokens: int, num_positions: int, itemsize: int, num_sequences: int
) -> int:
    """Whatever the engine takes; here what is easy to count."""
    return num_tokens * 2**20


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesys.cli.inspect_sizing.read_device_bytes", lambda: None)
    monkeypatch.setattr("moesys.cli.inspect_sizing.read_ram_bytes", lambda: RAM_BYTES)
    monkeypatch.setattr("moesys.cli.inspect_sizing.compute_step_bytes", count_step_bytes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", FAMILY_KEYS["glm4_moe"], torch.bfloat16)
    return tmp_path / "model"


@pytest.fixture(scope="session")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    assert write_sparse_model(folder, LARGE_KEYS, num_shards=24) > 90 * 2**30
    return folder


def test_the_text_of_a_large_model(large_model: Path, moesys_command: Call) -> None:
    answer = moesys_command("inspect", large_model, "--host-memory", "32GiB")
    assert answer.status == 0, answer.err
    assert max(map(len, answer.out.splitlines())) <= 80
    assert (
        answer.out.splitlines()
        == """\
model: qwen3_moe (Qwen3MoeForCausalLM)
  files       24, with 17721 tensors, 95.9 GiB (bf16 95.9 GiB)
  parameters  51.5B, 4.8B active per token
  layers      48: 45 with 128 experts, 8 per token; 3 dense (0-2)
  attention   32 heads of 128, 4 for keys and values
  context     32768 tokens, of a vocabulary of 151936

  part                      parameters      in files     in memory, bf16
  embedding                     311.2M     593.5 MiB           593.5 MiB
  attention                     906.0M       1.7 GiB             1.7 GiB
  dense layers                  113.2M     216.0 MiB           216.0 MiB
  router                         11.8M      22.5 MiB            45.0 MiB
  norms                         198.7K     388.0 KiB           388.0 KiB
  head                          311.2M     593.5 MiB           593.5 MiB
  experts                        49.8B      92.8 GiB            92.8 GiB
  all                            51.5B      95.9 GiB            95.9 GiB
  one expert                      8.7M      16.5 MiB            16.5 MiB
  experts of one token                                           5.8 GiB
  KV cache of one token                                         96.0 KiB
  KV cache of 32768 tokens                                       3.0 GiB

  1686 of 5760 experts fit in 32.0 GiB of RAM
    used by every token        3.1 GiB  all but the experts
    experts                   27.2 GiB  1686 of them
    KV cache                 384.0 MiB  4096 tokens
    a step                   512.0 MiB  512 tokens of a prompt
    reserve                  875.9 MiB  loading and libraries
  disk                        65.6 GiB  4074 experts
""".splitlines()
    )


def measure_cpu_s(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, *command], capture_output=True, timeout=60).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_hundred_gigabytes_take_little_longer_than_to_import_torch(large_model: Path) -> None:
    """1.4 s, of them 0.9 for torch, on a quiet machine; the ratio holds on a busy one too."""
    ratios = [
        measure_cpu_s("-m", "moesys", "inspect", str(large_model)) / measure_cpu_s("-c", "import torch")
        for _ in range(2)
    ]
    assert min(ratios) < 2


def test_json_has_units_in_its_names(model: Path, moesys_command: Call) -> None:
    answer = moesys_command("inspect", model, "--json", "--context", "100", "--host-memory", "50%")
    found = json.loads(answer.out)
    loaded = load_model(model)
    tensors = load_file(model / "model.safetensors")
    assert found["loads"] is True
    assert found["stored_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["num_tensors"] == len(tensors)
    described = found["model"]
    assert described["num_parameters"] == loaded.count_parameters()
    assert described["loaded_bytes"] == sum(
        tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers())
    )
    assert sum(part["stored_bytes"] for part in described["parts"].values()) == found["stored_bytes"]
    assert described["moe_layers"][0]["layer_id"] == 1
    assert described["num_dense_layers"] == 1
    pool = PagePool(loaded.config.mixers, 2, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert described["kv_bytes_per_token"] * 128 == pool.num_bytes
    (tier,) = found["placement"]["tiers"]
    assert tier["kv_bytes"] == pool.num_bytes, "100 tokens take two pages"
    assert tier["step_bytes"] == 100 * 2**20
    assert tier["budget"]["size_bytes"] == described["loaded_bytes"] // 2
    assert found["placement"]["num_experts_on_disk"] + tier["num_experts"] == NUM_EXPERTS
    assert found["check"] is None


def test_without_budgets_it_is_this_machines_memory(model: Path, moesys_command: Call) -> None:
    assert "fits in 64.0 GiB of RAM (this machine's)" in moesys_command("inspect", model).out


def test_both_options_name_the_ram_of_a_machine_without_a_gpu(model: Path, moesys_command: Call) -> None:
    placements = [
        json.loads(moesys_command("inspect", model, "--json", option, "1GiB").out)["placement"]
        for option in ("--host-memory", "--device-memory")
    ]
    assert placements[0] == placements[1]
    answer = moesys_command("inspect", model, "--host-memory", "1GiB", "--device-memory", "2GiB")
    assert answer.status == 1
    assert "both name the RAM of a machine without a GPU; give one of them" in answer.error


def test_a_gpu_is_a_tier_of_its_own(
    model: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.cli.inspect_sizing.read_device_bytes", lambda: 16 * 2**30)
    out = moesys_command("inspect", model, "--host-memory", "1GiB").out
    assert "fits in 16.0 GiB of GPU memory (this machine's)\n  GPU memory (this machine's)\n" in out
    found = json.loads(moesys_command("inspect", model, "--device-memory", "80%", "--json").out)["placement"]
    device, host = found["tiers"]
    assert (device["budget"]["is_share"], host["budget"]["size_bytes"]) == (True, RAM_BYTES)
    assert 0 < device["num_experts"] < NUM_EXPERTS == device["num_experts"] + host["num_experts"]
    assert found["is_resident"] is False


def test_what_does_not_fit_at_all_is_told_with_what_is_missing(model: Path, moesys_command: Call) -> None:
    out = moesys_command("inspect", model, "--host-memory", "100MiB").out
    assert "does not fit in 100.0 MiB of RAM: 278.5 MiB are missing" in out


def test_windows_and_unused_tensors_are_told(tmp_path: Path, moesys_command: Call) -> None:
    write_model(tmp_path / "oss", FAMILY_KEYS["gpt_oss"])
    assert "1 of 2 layers see 8 tokens" in moesys_command("inspect", tmp_path / "oss").out
    write_model(tmp_path / "v3", FAMILY_KEYS["deepseek_v3"])
    path = tmp_path / "v3" / "model.safetensors"
    save_file({**load_file(path), "model.layers.9.eh_proj.weight": torch.ones(512)}, path)
    out = moesys_command("inspect", tmp_path / "v3").out
    assert "latent, 4 heads" in out
    assert "2.0 KiB of it not used" in " ".join(out.split())


def test_an_unknown_family_says_what_it_can(model: Path, moesys_command: Call) -> None:
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"model_type": "glm5_moe"}))
    answer = moesys_command("inspect", model, "--check")
    assert answer.status == 0
    assert answer.out.startswith("model: glm5_moe\n  files       1, with ")
    assert "moesys cannot load it:" in answer.out
    assert "the nearest is 'glm4_moe'" in " ".join(answer.out.split())
    assert "all weights are finite" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80
    found = json.loads(moesys_command("inspect", model, "--json").out)
    assert (found["loads"], found["model"], found["placement"]) == (False, None, None)
    refused = moesys_command("inspect", model, "--host-memory", "1GiB", "--context", "5")
    assert refused.status == 1
    assert "--host-memory, --context has no effect" in refused.error


def test_check_exits_with_1_and_names_the_tensors(model: Path, moesys_command: Call) -> None:
    clean = moesys_command("inspect", model, "--check")
    assert clean.status == 0
    assert "/s): all weights are finite" in clean.out
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name in sorted(tensors)[:22]:
        tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)
    answer = moesys_command("inspect", model, "--check")
    assert answer.status == 1
    assert f"22 of {len(tensors)} tensors hold NaN or Inf" in answer.out
    assert "  lm_head.weight: 1 NaN, 0 Inf" in answer.out
    assert answer.out.endswith("  and 2 more\n")
    found = moesys_command("inspect", model, "--check", "--json")
    assert found.status == 1
    check = json.loads(found.out)["check"]
    assert len(check["found"]) == 22
    assert check["num_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host-memory", "8GB"], "--host-memory ('8GB') must be a size above 0"),
        (["--device-memory", "0%"], "--device-memory ('0%') must be above 0%"),
        (["--context", "4096"], "--context (4096) must not exceed what the model was made for, 128 tokens"),
        (["--dtype", "fp16"], "dtype fp16 is refused"),
        (["--dtype", "int4"], "dtype 'int4' is not known"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], reason: str, model: Path, moesys_command: Call
) -> None:
    answer = moesys_command("inspect", model, *options)
    assert (answer.status, answer.out) == (1, "")
    assert reason in answer.error


def test_wrong_folders_are_refused(tmp_path: Path, run: Path, moesys_command: Call) -> None:
    assert "is not a folder" in moesys_command("inspect", tmp_path / "nowhere").error
    assert "has no config.json" in moesys_command("inspect", tmp_path).error
    assert "is a training run; export it first" in moesys_command("inspect", run).error
