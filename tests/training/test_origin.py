"""Runs that start from a model folder: its shape, weights and tokenizer, bit-exact resumption, the same layout out."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import GENERATION, TEMPLATE, TOKEN_IDS, make_family_folder, make_model_folder

from moesys.checkpoint import load_model, load_text_model
from moesys.config import load_config
from moesys.errors import ConfigError, DataError, IneffectiveOptionError, ModelFormatError
from moesys.models import FAMILIES, Decoder, DocumentAttend, Family
from moesys.training import PlainConsole, RunDirectory, Trainer, evaluate_text, export_run

STEPS = 6
SETTINGS = [
    "data.sequence_length=48",
    "data.heldout_fraction=0.2",
    f"training.steps={STEPS}",
    "training.batch_sequences=2",
    "training.warmup_steps=1",
    "training.learning_rate=0.01",
    "training.log_every=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    records = [
        {"messages": [
            {"role": "user", "content": f"line {i}?"}, {"role": "assistant", "content": f"apples {i % 3} pears"}
        ]} for i in range(24)
    ]  # fmt: skip
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def start(folder: Path, source: Path, run: Path, *more: str) -> Trainer:
    settings = [*SETTINGS, f'model.init="{folder}"', f'data.source="{source}"', *more]
    return Trainer.start(load_config(None, settings), run, PlainConsole(STEPS, io.StringIO()))


def resume(run: Path) -> Trainer:
    return Trainer.resume(run, PlainConsole(STEPS, io.StringIO()))


def export(run: Path, target: Path) -> Path:
    export_run(run, target, None, on_damage=pytest.fail)
    return target


def compute_logits(model: Decoder) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20) * 7
    with torch.no_grad():
        output = model(tokens, torch.arange(20).repeat(2, 1), DocumentAttend(torch.zeros_like(tokens)))
        return model.compute_logits(output.hidden_BSD)


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    expected = one.optimizer.export_state()
    found = other.optimizer.export_state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_starts_with_the_folders_model(folder: Path, corpus: Path, tmp_path: Path) -> None:
    trainer = start(folder, corpus, tmp_path / "run")
    loaded = load_model(folder, torch.float32)
    assert torch.equal(compute_logits(trainer.model), compute_logits(loaded))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.model.training
    assert "experts [4, 0] top-2" in trainer.describe()[1]
    assert trainer.data.tokenizer.fingerprint == load_text_model(folder).tokenizer.fingerprint
    saved = RunDirectory.open(tmp_path / "run").load_config()
    assert saved.model.init == str(folder.resolve())
    assert "hidden_size" not in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_goes_on_in_the_same_bits_without_the_folder(
    folder: Path, corpus: Path, tmp_path: Path, dtype: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    whole = start(copy, corpus, tmp_path / "whole", f"training.dtype={dtype}")
    for _ in range(STEPS):
        whole.take_step()
    broken = start(copy, corpus, tmp_path / "broken", f"training.dtype={dtype}")
    for _ in range(2):
        broken.take_step()
    broken.save()
    shutil.rmtree(copy)
    resumed = resume(tmp_path / "broken")
    assert_same_weights(resumed, broken)
    for _ in range(STEPS - 2):
        resumed.take_step()
    assert_same_weights(resumed, whole)


def test_a_head_of_its_own_stays_one_though_the_config_ties_it(corpus: Path, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"tie_word_embeddings": True}))
    trainer = start(folder, corpus, tmp_path / "run")
    assert trainer.model.head is not None
    trainer.take_step()
    trainer.save()
    assert_same_weights(resume(tmp_path / "run"), trainer)


def test_without_a_checkpoint_the_folder_is_read_again(folder: Path, corpus: Path, tmp_path: Path) -> None:
    first = start(folder, corpus, tmp_path / "run")
    again = resume(tmp_path / "run")
    assert_same_weights(again, first)


def test_the_export_is_what_transformers_knew(folder: Path, corpus: Path, tmp_path: Path) -> None:
    trainer = start(folder, corpus, tmp_path / "run")
    trainer.train()
    target = export(tmp_path / "run", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["max_position_embeddings"] == 64
    assert {key: config[key] for key in TOKEN_IDS} == TOKEN_IDS
    assert json.loads((target / "generation_config.json").read_text()) == GENERATION
    exported = load_text_model(target)
    assert torch.equal(compute_logits(exported.decoder), compute_logits(trainer.model))
    assert exported.stop_ids >= {7, 0}
    assert not torch.equal(
        compute_logits(exported.decoder), compute_logits(load_model(folder, torch.float32))
    )


def test_transformers_runs_the_export(folder: Path, chats: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trainer = start(folder, chats, tmp_path / "run", "data.format=chat")
    trainer.train()
    target = export(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tokens = torch.arange(40).view(2, 20) * 7
    with torch.no_grad():
        theirs, ours = model(tokens).logits, compute_logits(trainer.model)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    messages = [{"role": "user", "content": "line 1?"}, {"role": "assistant", "content": "apples 1 pears"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == trainer.data.tokenizer.encode_with_special_tokens(tokenizer.decode(ids))
    assert tokenizer.chat_template == TEMPLATE
    assert model.generation_config.eos_token_id == GENERATION["eos_token_id"]


def test_the_family_stays(corpus: Path, tmp_path: Path) -> None:
    """A model that several layouts hold is exported in its own."""
    folder = make_model_folder(tmp_path / "dense", num_experts=0, qk_norm=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "mistral", "sliding_window": None})
    )
    trainer = start(folder, corpus, tmp_path / "run")
    trainer.train()
    exported = json.loads((export(tmp_path / "run", tmp_path / "out") / "config.json").read_text())
    assert exported["model_type"] == "mistral"
    with pytest.raises(
        IneffectiveOptionError, match=r"training.balance_loss has no effect: .* has no experts"
    ):
        start(folder, corpus, tmp_path / "other", "training.balance_loss=0.1")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_goes_in_trains_resumes_and_comes_out(
    family: Family, corpus: Path, tmp_path: Path
) -> None:
    folder = make_family_folder(tmp_path / "model", family)
    trainer = start(folder, corpus, tmp_path / "run", "training.steps=3", "training.checkpoint_every=2")
    trainer.train()
    shutil.rmtree(folder)
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    resumed = resume(tmp_path / "run")
    assert resumed.step == 2
    resumed.train()
    assert_same_weights(resumed, trainer)
    target = export(tmp_path / "run", tmp_path / "out")
    keys = json.loads((target / "config.json").read_text())
    assert keys["model_type"] == family.model_type
    assert keys.items() >= family.write_config(trainer.model.config).items()
    exported = load_model(target)
    assert torch.equal(compute_logits(exported), compute_logits(trainer.model.eval()))


def test_the_bias_of_a_router_moves_where_there_is_one(corpus: Path, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.model_type == "deepseek_v3")
    folder = make_family_folder(tmp_path / "model", family)
    trainer = start(folder, corpus, tmp_path / "run", "model.balance_bias_rate=0.25")
    before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.train()
    moved = [name for name, buffer in trainer.model.named_buffers() if not torch.equal(buffer, before[name])]
    assert moved
    assert_same_weights(resume(tmp_path / "run"), trainer)
    loaded = load_model(export(tmp_path / "run", tmp_path / "out"))
    assert all(torch.equal(loaded.get_buffer(name), trainer.model.get_buffer(name)) for name in moved)


def test_chats_are_learned_with_the_folders_template(folder: Path, chats: Path, tmp_path: Path) -> None:
    trainer = start(folder, chats, tmp_path / "run", "data.format=chat")
    batch = trainer._load_batches(0)[0]
    learned = batch.target_ids_BS[batch.target_ids_BS >= 0].tolist()
    text = trainer.data.tokenizer.decode(learned)
    assert text.count("apples") == text.count("<|im_end|>") > 0
    assert "line" not in text
    before = trainer.evaluate().loss
    outcome = trainer.train()
    assert outcome.evaluation is not None
    assert outcome.evaluation.loss < before
    target = export(tmp_path / "run", tmp_path / "out")
    assert (target / "chat_template.jinja").read_text() == TEMPLATE
    loaded = load_text_model(target)
    data = load_config(None, [f'data.source="{chats}"', "data.format=chat"]).data
    scored = evaluate_text(loaded.decoder, loaded.tokenizer, data, 0.2, None, None, tmp_path / "cache")
    assert scored.num_targets == outcome.evaluation.num_targets
    assert scored.loss == pytest.approx(outcome.evaluation.loss, rel=1e-3)


def test_a_chat_run_resumes_with_its_template_and_date(folder: Path, chats: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("Day {{ strftime_now('%j') }}. " + TEMPLATE)
    more = ("data.format=chat", f'data.chat_template="{template}"')
    trainer = start(folder, chats, tmp_path / "run", *more)
    trainer.train()
    template.unlink()
    assert trainer.config.data.chat_date is not None
    resumed = resume(tmp_path / "run")
    assert_same_weights(resumed, trainer)
    assert resumed.data.fingerprint == trainer.data.fingerprint
    target = export(tmp_path / "run", tmp_path / "out")
    assert (target / "chat_template.jinja").read_text().startswith("Day ")


def test_the_date_decides_the_data(
    folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    template = Path("mine.jinja")
    template.write_text("Day {{ strftime_now('%j') }}. " + TEMPLATE)
    more = ("data.format=chat", f'data.chat_template="{template}"')
    trainer = start(folder, chats, tmp_path / "run", *more, "data.chat_date=2025-01-31")
    assert trainer.data.tokenizer.decode(trainer.data.train.tokens[:8].tolist()).startswith("Day 031")
    assert trainer.config.data.chat_template == str(tmp_path / "mine.jinja")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["model.hidden_size=32"], IneffectiveOptionError, "model.hidden_size has no effect: the model's shape"),
        (["model.top_k=2"], IneffectiveOptionError, "model.top_k has no effect"),
        (["model.capacity_factor=2.0"], IneffectiveOptionError, "model.capacity_factor has no effect"),
        (['data.tokenizer="x"'], IneffectiveOptionError, "data.tokenizer has no effect: model.init brings"),
        (["data.vocab_size=400"], IneffectiveOptionError, "data.vocab_size has no effect"),
        (["training.seed=3"], IneffectiveOptionError, "training.seed has no effect"),
        (["model.balance_bias_rate=0.01"], IneffectiveOptionError, "model.balance_bias_rate has no effect: the ro"),
        (["data.sequence_length=65"], ConfigError, "must not exceed the 64 positions"),
    ],
)  # fmt: skip
def test_settings_that_the_folder_decides_are_errors(
    folder: Path, corpus: Path, tmp_path: Path, more: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")):
        start(folder, corpus, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_no_model_are_errors(folder: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="is not a folder"):
        start(tmp_path / "nothing", corpus, tmp_path / "run")
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: there is no such file"):
        start(bare, corpus, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    shutil.copy(folder / "tokenizer.json", bare)
    (bare / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ModelFormatError, match="has 302 tokens, the model embeds 300"):
        start(bare, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
