"""The training loop and what it is made of: steps, optimizer, schedule, metrics, report."""

from moesys.training.console import Console, PlainConsole, open_console
from moesys.training.evaluate import Evaluation, evaluate, evaluate_text
from moesys.training.export import ExportedRun, export_run
from moesys.training.interrupt import exit_status
from moesys.training.report import ReportSummary, require_matplotlib, write_report
from moesys.training.run_directory import RunDirectory
from moesys.training.trainer import Outcome, Trainer

__all__ = [
    "Console",
    "Evaluation",
    "ExportedRun",
    "Outcome",
    "PlainConsole",
    "ReportSummary",
    "RunDirectory",
    "Trainer",
    "evaluate",
    "evaluate_text",
    "exit_status",
    "export_run",
    "open_console",
    "require_matplotlib",
    "write_report",
]
