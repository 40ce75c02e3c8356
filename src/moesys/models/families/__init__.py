"""Families of Hugging Face checkpoints as data: config keys, names and layouts of tensors, in both directions."""

from __future__ import annotations

from moesys.errors import ModelFormatError
from moesys.models.config import DecoderConfig
from moesys.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE
from moesys.models.families.family import Family
from moesys.models.families.gpt_oss import GPT_OSS
from moesys.models.families.granite import GRANITE_MOE
from moesys.models.families.llama import LLAMA, MISTRAL
from moesys.models.families.minimax import MINIMAX_M2
from moesys.models.families.mixtral import MIXTRAL
from moesys.models.families.olmoe import OLMOE
from moesys.models.families.phimoe import PHIMOE
from moesys.models.families.qwen import QWEN2_MOE, QWEN3, QWEN3_MOE
from moesys.models.families.refused import REFUSED

FAMILIES: tuple[Family, ...] = (
    QWEN3_MOE,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GPT_OSS,
    GRANITE_MOE,
    PHIMOE,
    MINIMAX_M2,
    QWEN3,
    LLAMA,
    MISTRAL,
)
"""In the order in which a layout is chosen for a model that has none yet."""


_NUM_NAMED = 3


def choose_family(config: DecoderConfig) -> Family:
    """Returns the first family that holds the model; raises `ModelFormatError` saying why the nearest ones do not."""
    misfits = {family.model_type: family.find_misfits(config) for family in FAMILIES}
    for family in FAMILIES:
        if not misfits[family.model_type]:
            return family
    nearest = sorted(FAMILIES, key=lambda f: (not f.has_keys_for(config), len(misfits[f.model_type])))
    reasons = "\n".join(f"  {f.model_type}: {'; '.join(misfits[f.model_type])}" for f in nearest[:_NUM_NAMED])
    raise ModelFormatError(f"no Hugging Face layout holds this model; the nearest are\n{reasons}")


__all__ = ["FAMILIES", "REFUSED", "Family", "choose_family"]
