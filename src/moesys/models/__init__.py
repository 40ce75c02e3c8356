"""One decoder, configured by plain records, in single-device PyTorch. Families of checkpoints are data."""

from moesys.models.attend import Attend, DocumentAttend, SoftmaxRule, compute_attention
from moesys.models.attention import AttentionConfig, QKNorm
from moesys.models.config import DecoderConfig, DenseConfig
from moesys.models.decoder import Block, Decoder, DecoderOutput
from moesys.models.families import FAMILIES, REFUSED, Family, choose_family
from moesys.models.initialize import initialize_weights
from moesys.models.latent_attention import LatentAttentionConfig
from moesys.models.layout import ExpertStorage
from moesys.models.mixer import CachedTensor, Mixer, MixerConfig
from moesys.models.norm import NormConfig, NormKind
from moesys.models.roles import Role, classify_parameters
from moesys.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling
from moesys.models.skeleton import make_skeleton
from moesys.models.stored import Encoding, StoredTensor
from moesys.models.visible_keys import compute_mean_visible_keys

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Attend",
    "AttentionConfig",
    "Block",
    "CachedTensor",
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
    "Mixer",
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
