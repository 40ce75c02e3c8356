"""One decoder, configured by plain records, in single-device PyTorch. Families of checkpoints are data."""

from moesys.models.attend import Attend, DocumentAttend
from moesys.models.config import AttentionConfig, DecoderConfig, DenseConfig
from moesys.models.decoder import Decoder, DecoderOutput
from moesys.models.families import FAMILIES, Family, choose_family
from moesys.models.initialize import initialize_weights
from moesys.models.roles import Role, classify_parameters

__all__ = [
    "FAMILIES",
    "Attend",
    "AttentionConfig",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "DenseConfig",
    "DocumentAttend",
    "Family",
    "Role",
    "choose_family",
    "classify_parameters",
    "initialize_weights",
]
