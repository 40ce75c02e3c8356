"""The small steps between a router's scores and its experts' rows, in C for inference on a CPU."""

from moesys.kernels.routing.api import choose_and_weigh, choose_top_k, group_by_expert, takes, weigh_choice

__all__ = ["choose_and_weigh", "choose_top_k", "group_by_expert", "takes", "weigh_choice"]
