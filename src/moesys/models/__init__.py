"""One decoder, configured by plain records, in single-device PyTorch. Families of checkpoints are data."""

from moesys.models.attend import Attend, DocumentAttend, SoftmaxRule, compute_attention
from moesys.models.config import (
    AttentionConfig,
    DecoderConfig,
    DenseConfig,
    LatentAttentionConfig,
    MixerConfig,
    QKNorm,
    compute_mean_visible_keys,
)
from moesys.models.decoder import Block, Decoder, DecoderOutput
from moesys.models.families import FAMILIES, REFUSED, Family, choose_family
from moesys.models.initialize import initialize_weights
from moesys.models.layout import ExpertStorage
from moesys.models.norm import NormConfig, NormKind
from moesys.models.roles import Role, classify_parameters
from moesys.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling
from moesys.models.skeleton import make_skeleton
from moesys.models.stored import Encoding, StoredTensor

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Attend",
    "AttentionConfig",
    "Block",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "DenseConfig",
    "DocumentAttend",
    "Encoding",
    "ExpertStorage",
    "Family",
    "LatentAttentionConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MixerConfig",
    "NormConfig",
    "NormKind",
    "QKNorm",
    "Role",
    "RopeConfig",
    "SoftmaxRule",
    "StoredTensor",
    "YarnScaling",
    "choose_family",
    "classify_parameters",
    "compute_attention",
    "compute_mean_visible_keys",
    "initialize_weights",
    "make_skeleton",
]
