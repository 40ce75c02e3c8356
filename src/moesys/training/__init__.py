"""The training loop and what it is made of: steps, optimizer, schedule, metrics, report."""

from moesys.training.console import Console, open_console
from moesys.training.evaluate import Evaluation, evaluate
from moesys.training.run_directory import RunDirectory
from moesys.training.trainer import Outcome, Trainer

__all__ = ["Console", "Evaluation", "Outcome", "RunDirectory", "Trainer", "evaluate", "open_console"]
