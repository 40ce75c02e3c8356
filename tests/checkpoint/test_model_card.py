"""The model card states the run's facts and is Markdown with metadata that hubs read."""

from __future__ import annotations

from moesys.checkpoint import CurvePoint, ModelCard
from moesys.checkpoint.files import WrittenFile
from moesys.models import AttentionConfig, DecoderConfig, DenseConfig, RopeConfig
from moesys.moe import MoEConfig

CONFIG = DecoderConfig(
    300,
    8,
    (AttentionConfig(2, 1, 4, RopeConfig(4)),) * 2,
    (MoEConfig(4, 2, 6), DenseConfig(10)),
    max_positions=64,
)


def render() -> str:
    return ModelCard(
        name="tiny",
        architecture="Qwen3MoeForCausalLM",
        config=CONFIG,
        num_parameters=1234567,
        data_source="stdlib",
        curve=[CurvePoint(10, 20480, 2.5, None), CurvePoint(20, 40960, None, 2.25)],
        config_toml='\n[model]\nhidden_size = 8\n\n[data]\nsource = "stdlib"\n',
        environment={"moesys": "0.1.0", "git_revision": "abc"},
        files={"model.safetensors": WrittenFile(4096, "d" * 64)},
    ).render()


def test_it_states_the_facts() -> None:
    card = render()
    for line in (
        "# tiny",
        f"| Parameters | 1,234,567 ({CONFIG.num_matmul_parameters_per_token:,} multiply each token) |",
        "| Layers | 2, of which 1 with experts |",
        "| Context | 64 tokens |",
        "| Data | `stdlib` |",
        "| Trained with | moesys 0.1.0, revision abc |",
        "| 10 | 20,480 | 2.5000 |  |",
        "| 20 | 40,960 |  | 2.2500 |",
        f"| `model.safetensors` | 4,096 | `{'d' * 64}` |",
    ):
        assert line in card.splitlines()
    assert '```toml\n[model]\nhidden_size = 8\n\n[data]\nsource = "stdlib"\n```' in card


def test_it_opens_with_metadata() -> None:
    opening, metadata, _ = render().split("---\n", 2)
    assert opening == ""
    assert "library_name: transformers\n" in metadata
    assert "pipeline_tag: text-generation\n" in metadata
