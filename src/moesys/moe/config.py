"""The shape of a MoE layer as one plain frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesys.errors import RoutingError
from moesys.kernels import ExpertForm
from moesys.moe.capacity import Capacity
from moesys.moe.score import Score
from moesys.moe.selection import GroupLimitedTopK, Selection, Threshold, TopK


@dataclass(frozen=True)
class MoEConfig:
    """The shape of a MoE layer. Raises `RoutingError` for options that contradict each other."""

    num_experts: int
    top_k: int
    """Experts that compute each token; with ``min_score`` the most that do."""
    intermediate_size: int
    """Inner width of one expert."""
    normalize_top_k: bool = True
    """Whether a token's weights are scaled to sum to one."""
    shared_intermediate_size: int = 0
    """Inner width of a SwiGLU that every token passes beside its experts; 0 for none."""
    score: Score = Score.SOFTMAX
    weight_scale: float = 1.0
    """Multiplies every weight after normalisation (DeepSeek's routed scaling factor)."""
    num_groups: int = 1
    """Groups of experts that compete for tokens; see `GroupLimitedTopK`."""
    top_groups: int = 1
    """Groups that a token may use."""
    min_score: float | None = None
    """Score that an expert needs to get a token, the best one excepted; None: always ``top_k`` experts."""
    bias_update_rate: float = 0.0
    """Step of the selection bias that balances the experts; 0 for no bias. See `BiasBalancer`."""
    capacity: Capacity | None = None
    """Limit on the assignments of an expert; None is dropless."""
    shared_expert_gate: bool = False
    """Whether the shared expert is multiplied by a sigmoid of the token (Qwen2-MoE)."""
    is_residual: bool = False
    """Whether a dense layer of the experts' shape stands beside the experts; see `ResidualBranch`."""
    form: ExpertForm = field(default_factory=ExpertForm)
    """Arithmetic of the experts."""
    expert_bias: bool = False
    """Whether the experts have biases."""

    def __post_init__(self) -> None:
        if self.min_score is not None and self.num_groups > 1:
            raise RoutingError(
                f"min_score ({self.min_score}) and num_groups ({self.num_groups}) are two ways to choose; use one"
            )
        if self.min_score is not None and self.capacity is not None and self.capacity.factor is not None:
            raise RoutingError(
                f"min_score ({self.min_score}) gives tokens different numbers of experts, for which a capacity factor "
                f"({self.capacity.factor}) is not defined; drop one of the two"
            )
        if self.shared_expert_gate and not self.shared_intermediate_size:
            raise RoutingError("shared_expert_gate needs a shared expert; set shared_intermediate_size")
        if self.bias_update_rate < 0:
            raise RoutingError(f"bias_update_rate ({self.bias_update_rate}) must be at least 0")

    @property
    def selection(self) -> Selection:
        """How experts are chosen."""
        if self.min_score is not None:
            return Threshold(self.top_k, self.min_score)
        if self.num_groups > 1:
            return GroupLimitedTopK(self.top_k, self.num_groups, self.top_groups)
        return TopK(self.top_k)
