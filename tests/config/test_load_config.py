"""From files and overrides to a config, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moesys.config import Config, TrainingConfig, dump_toml, load_config, parse_overrides
from moesys.errors import ConfigError, IneffectiveOptionError, UnknownKeyError


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_nothing_given_is_the_defaults() -> None:
    assert load_config() == Config()


def test_overrides_win_over_the_file_and_leave_the_rest(write: Callable[[str], Path]) -> None:
    path = write("[model]\nnum_experts = 16\ntop_k = 4\n[training]\nsteps = 50\n")
    config = load_config(path, ["model.num_experts=32", "data.source=my/folder"])
    assert (config.model.num_experts, config.model.top_k) == (32, 4)
    assert config.training.steps == 50
    assert config.data.source == "my/folder"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("[0, 16]", [0, 16]),
        ('"3"', "3"),
        ("hf:a/b", "hf:a/b"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_override_values_are_toml_else_text(text: str, value: object) -> None:
    assert list(parse_overrides([f"a.b={text}"])) == [("a.b", value)]


def test_an_override_is_one_value() -> None:
    assert list(parse_overrides(["data.source=1\nb = 2"])) == [("data.source", "1\nb = 2")]


@pytest.mark.parametrize("override", ["steps", "=3", ""])
def test_malformed_override(override: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"must look like section.key=value, got '{override}'; for example"
    ):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_expert=4", "unknown key 'model.num_expert'; did you mean 'model.num_experts'?"),
        ("data.seqence_length=4", "did you mean 'data.sequence_length'?"),
        ("top_k=4", "unknown key 'top_k'; did you mean 'model.top_k'?"),
        ("zzzz=4", "unknown key 'zzzz'; `moesys config schema` lists all keys"),
        ("training.num_experts=4", "unknown key 'training.num_experts'; did you mean 'model.num_experts'?"),
        ("modle.top_k=4", "unknown key 'modle.top_k'; did you mean 'model.top_k'?"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, message: str) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        load_config(overrides=[override])
    assert message in str(caught.value)


def test_unknown_key_in_a_file(write: Callable[[str], Path]) -> None:
    with pytest.raises(UnknownKeyError, match=r"did you mean 'training.learning_rate'"):
        load_config(write("[training]\nlearing_rate = 0.1\n"))


def test_a_key_is_not_a_section() -> None:
    with pytest.raises(ConfigError, match="'num_experts' is not a section"):
        load_config(overrides=["model.num_experts=8", "model.num_experts.first=1"])


def test_a_section_is_not_a_key() -> None:
    with pytest.raises(
        ConfigError, match=r"'model' is a section and cannot be set to 5; set its keys: model\.KEY=VALUE"
    ):
        load_config(overrides=["model=5"])


def test_files_that_cannot_be_read(tmp_path: Path, write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"missing.toml does not exist; give a TOML file"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match=r"run.toml is not a TOML file: .*Invalid value"):
        load_config(write("model ="))
    with pytest.raises(ConfigError, match=r"cannot read the config file .*: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"run.toml is not a TOML file"):
        load_config(tmp_path / "run.toml")


REFUSED = [
    (
        ["model.hidden_size=10"],
        "hidden_size (10) must be divisible by num_heads (4); try num_heads = 1, 2, 5, 10",
    ),
    (
        ["model.hidden_size=12"],
        "head_dim (3) must be even for the rotary embedding; change num_heads or set head_dim",
    ),
    (["model.head_dim=9"], "head_dim (9) must be even"),
    (
        ["model.num_kv_heads=3"],
        "num_heads (4) must be divisible by num_kv_heads (3); try num_kv_heads = 1 or 4",
    ),
    (["model.num_kv_heads=8"], "num_heads (4) must be divisible by num_kv_heads (8)"),
    (
        ["model.num_experts=[4, 4, 4]"],
        "pattern has 3 entries, which do not divide num_layers (4); give one number",
    ),
    (["model.num_experts=[]"], "pattern has 0 entries"),
    (["model.top_k=9"], "top_k (9) must not exceed num_experts (8); set model.top_k to at most 8"),
    (
        ["model.num_experts=[0, 4]", "model.top_k=5"],
        "num_experts (4); set model.top_k to at most 4 or model.num_experts to at least 5",
    ),
    (["training.dtype=fp16"], "fp16 is refused: its range overflows in router logits and gradients"),
    (["training.dtype=fp16"], "use bf16 (fp32 master weights are kept) or fp32"),
    (
        ["training.micro_batch_sequences=3"],
        "batch_sequences (8) must be divisible by micro_batch_sequences (3); try 1, 2, 4, 8",
    ),
    (
        ["training.micro_batch_sequences=16"],
        "batch_sequences (8) must be divisible by micro_batch_sequences (16)",
    ),
    (["training.steps=20"], "warmup_steps (20) must be less than steps (20); try warmup_steps = 2"),
    (["model.num_layers=0"], "model.num_layers: Input should be greater than 0 (got 0)"),
    (["model.num_experts=-1"], "model.num_experts: Input should be greater than or equal to 0 (got -1)"),
    (["data.vocab_size=256"], "data.vocab_size: Input should be greater than or equal to 257 (got 256)"),
    (["runtime.kernel=fast"], "runtime.kernel: Input should be 'auto', 'reference', 'torch' or 'native'"),
    (
        ["runtime.kernel=native"],
        "runtime: kernel (native) computes no gradients, so nothing can be trained with it",
    ),
    (
        ["runtime.kernel=native"],
        "use auto, which takes the fastest that has gradients, or torch or reference",
    ),
    (
        ["model.expert_activation=silu"],
        "Input should be 'swiglu', 'clamped_swiglu', 'gelu' or 'relu' (got 'silu')",
    ),
    (["model.normalize_top_k=after"], "model.normalize_top_k: Input should be 'before' (got 'after')"),
    (["data.seed=a"], "data.seed: Input should be a valid integer"),
    (["training.learning_rate=nan"], "training.learning_rate: Input should be a finite number (got nan)"),
    (["training.gradient_clip=-1"], "training.gradient_clip: Input should be greater than or equal to 0"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=[" ".join(o) + f" {m[:12]}" for o, m in REFUSED]
)
def test_a_refusal_tells_values_and_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert message in str(caught.value)
    assert "Value error" not in str(caught.value)


@pytest.mark.parametrize("key", ["training.learning_rate", "model.init_std", "training.gradient_clip"])
def test_infinity_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: Input should be a finite number \(got inf\)"):
        load_config(overrides=[f"{key}=inf"])


def test_true_is_not_a_number() -> None:
    with pytest.raises(ConfigError, match=r"model.top_k: Input should be a valid integer \(got True\)"):
        load_config(overrides=["model.top_k=true"])


def test_a_quoted_number_is_not_a_number() -> None:
    with pytest.raises(ConfigError, match=r"training.steps: Input should be a valid integer \(got '50'\)"):
        load_config(overrides=['training.steps="50"'])


def test_a_whole_number_may_stand_for_a_real_one() -> None:
    assert load_config(overrides=["training.learning_rate=1"]).training.learning_rate == 1.0


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["model.num_layers=0", "training.beta1=1.5"])
    assert str(caught.value).count("\n") == 1


def test_every_ineffective_key_is_told_at_once() -> None:
    with pytest.raises(IneffectiveOptionError) as caught:
        load_config(overrides=["model.num_experts=0", "model.top_k=1", "training.balance_loss=0.1"])
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["model.top_k", "training.balance_loss"]


ROUND_TRIPS = {
    "defaults": [],
    "dense": ["model.num_experts=0", "model.intermediate_size=300"],
    "switch": ["model.top_k=1", "model.normalize_top_k=false"],
    "expert_form": [
        "model.expert_activation=clamped_swiglu",
        "model.expert_limit=5",
        "model.expert_alpha=1.5",
        "model.expert_bias=true",
    ],
    "need": ["model.capacity_factor=-1.5", "model.capacity_formula=tutel", "model.min_capacity=2"],
    "no_drops": ["model.capacity_factor=0", "model.capacity_formula=tutel"],
    "softmax_over_the_chosen": ["model.normalize_top_k=before", "model.router_score=sigmoid"],
    "never_clips": ["training.gradient_clip=0"],
    "every_other_layer": ["model.num_experts=[0, 16]", "model.top_k=4"],
    "pyramid": ["model.num_experts=[8, 8, 16, 16]", "model.num_kv_heads=2", "model.sliding_window=64"],
    "wsd": ["training.schedule=wsd", "training.decay_fraction=0.4", "training.dtype=bf16"],
    "files": ["data.source=a folder/ä.jsonl", "data.text_field=body", "data.tokenizer=t.json"],
    "schedule_of_evaluations": ["training.evaluate_every=100", "training.evaluate_tokens=1000"],
    "hugging_face": ["data.source=hf:a/b", "data.text_field=x", "training.checkpoint_every=10"],
    "gpu": [
        "runtime.device=cuda:1",
        "training.micro_batch_sequences=2",
        "memory.activation_checkpointing=true",
    ],
}


@pytest.mark.parametrize("overrides", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_dump_reads_back_to_an_equal_config(overrides: list[str], write: Callable[[str], Path]) -> None:
    config = load_config(overrides=overrides)
    text = dump_toml(config)
    assert load_config(write(text)) == config
    assert dump_toml(load_config(write(text))) == text


def test_dump_keeps_that_gradients_are_never_clipped(write: Callable[[str], Path]) -> None:
    config = Config(training=TrainingConfig(gradient_clip=0))
    assert "gradient_clip = 0" in dump_toml(config)
    assert load_config(write(dump_toml(config))).training.gradient_clip == 0
    assert load_config(write(dump_toml(config))) == config
