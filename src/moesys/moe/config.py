"""The shape of a MoE layer as one plain frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesys.errors import RoutingError
from moesys.kernels import ExpertForm
from moesys.moe.capacity import Capacity
from moesys.moe.score import Score
from moesys.moe.selection import (
    GroupLimitedTopK,
    GroupScore,
    Selection,
    Threshold,
    TopK,
    require_unbiased_threshold,
)
from moesys.moe.weighting import Normalization, Weighting


@dataclass(frozen=True)
class MoEConfig:
    """The shape of a MoE layer. Raises `RoutingError` for options that contradict each other."""

    num_experts: int
    top_k: int
    """Experts that compute each token; with ``min_score`` the most that do."""
    intermediate_size: int
    """Inner width of one expert."""
    weighting: Weighting = Normalization.AFTER
    """Whether and how a token's weights are scaled to sum to one."""
    shared_intermediate_size: int = 0
    """Inner width of a SwiGLU that every token passes beside its experts; 0 for none."""
    score: Score = Score.SOFTMAX
    weight_scale: float = 1.0
    """Multiplies every weight after normalisation (DeepSeek's routed scaling factor)."""
    num_groups: int = 1
    """Groups of experts that compete for tokens; see `GroupLimitedTopK`."""
    top_groups: int = 1
    """Groups that a token may use."""
    group_score: GroupScore = GroupScore.TOP_2_SUM
    """What groups compete with."""
    min_score: float | None = None
    """Score that an expert needs to get a token, the best one excepted; None: always ``top_k`` experts. Not with
    ``bias_update_rate``."""
    bias_update_rate: float = 0.0
    """Step of the selection bias that balances the experts; 0 for none that moves. See `BiasBalancer`."""
    selection_bias: bool = False
    """Whether the router has a selection bias although none moves, as in a loaded model."""
    router_bias: bool = False
    """Whether the router's logits have a bias (gpt-oss)."""
    capacity: Capacity | None = None
    """Limit on the assignments of an expert; None is dropless. `Capacity.from_tutel_factor` and `Capacity.by_formula`
    take Tutel's 0 and negative factors."""
    shared_expert_gate: bool = False
    """Whether the shared expert is multiplied by a sigmoid of the token (Qwen2-MoE)."""
    is_residual: bool = False
    """Whether a dense layer of the experts' shape stands beside the experts; see `ResidualBranch`."""
    form: ExpertForm = field(default_factory=ExpertForm)
    """Arithmetic of the experts."""
    expert_bias: bool = False
    """Whether the experts have biases."""

    def __post_init__(self) -> None:
        if self.shared_expert_gate and not self.shared_intermediate_size:
            raise RoutingError("shared_expert_gate needs a shared expert; set shared_intermediate_size")
        if self.bias_update_rate < 0:
            raise RoutingError(f"bias_update_rate ({self.bias_update_rate}) must be at least 0")
        self._check_groups()
        if self.min_score is not None:
            self._check_threshold(self.min_score)
        if self.capacity is not None:
            self.capacity.require_effect(self.num_experts, self.top_k)

    def _check_groups(self) -> None:
        if self.num_groups < 1:
            raise RoutingError(
                f"num_groups ({self.num_groups}) must be at least 1; 1 lets all experts compete together"
            )
        if self.num_groups == 1 and self.top_groups != 1:
            raise RoutingError(
                f"top_groups ({self.top_groups}) has no effect with num_groups (1); set num_groups to more, or drop "
                "top_groups"
            )
        if self.num_groups == 1 and self.group_score is not GroupScore.TOP_2_SUM:
            raise RoutingError(f"group_score ({self.group_score}) has no effect with num_groups (1); drop it")

    def _check_threshold(self, min_score: float) -> None:
        if self.num_groups > 1:
            raise RoutingError(
                f"min_score ({min_score}) and num_groups ({self.num_groups}) are two ways to choose; use one"
            )
        if self.capacity is not None and self.capacity.factor is not None:
            raise RoutingError(
                f"min_score ({min_score}) gives tokens different numbers of experts, for which a capacity factor "
                f"({self.capacity.factor}) is not defined; drop one of the two"
            )
        if not 0 < min_score < 1:
            raise RoutingError(
                f"min_score ({min_score}) must be between 0 and 1, as scores are: at 0 every expert passes and at 1 "
                "none does, so that it would not choose; drop it to use always top_k experts"
            )
        if self.top_k == 1:
            raise RoutingError(
                f"min_score ({min_score}) has no effect with top_k (1), since the best expert is always used; raise "
                "top_k, or drop min_score"
            )
        require_unbiased_threshold(self.selection, has_bias=self.has_selection_bias)

    @property
    def has_selection_bias(self) -> bool:
        return self.selection_bias or self.bias_update_rate > 0

    @property
    def selection(self) -> Selection:
        """How experts are chosen."""
        if self.min_score is not None:
            return Threshold(self.top_k, self.min_score)
        if self.num_groups > 1:
            return GroupLimitedTopK(self.top_k, self.num_groups, self.top_groups, self.group_score)
        return TopK(self.top_k)
