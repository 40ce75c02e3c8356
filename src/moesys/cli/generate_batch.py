"""``moesys generate --batch``: the prompts of a file through one engine, and their results into another file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moesys.cli.arguments import parse_product
from moesys.cli.memory_options import MemoryOptions
from moesys.cli.opening import open_behind_bar

if TYPE_CHECKING:
    from moesys.inference import SamplingParams
    from moesys.inference.batch import BatchRun, BatchStats
    from moesys.inference.result_file import ResultFile


def generate_batch(
    model: Path,
    prompt_file: Path,
    output: Path,
    *,
    batch_size: int | None,
    max_new_tokens: int | None,
    sampling: SamplingParams,
    stop: Sequence[str],
    dtype: str | None,
    memory: MemoryOptions,
) -> None:
    """Continues every prompt of a file that has no result yet. Loads nothing before all are known to fit."""
    from moesys.checkpoint import read_layout, read_text_tools
    from moesys.inference import Stop
    from moesys.inference.batch import MAX_SEQUENCES, BatchRun
    from moesys.inference.batch_plan import describe_settings, plan_prompts
    from moesys.inference.prompt_file import read_prompts
    from moesys.inference.result_file import open_results

    lines = read_prompts(prompt_file)
    tools = read_text_tools(model)
    limit = read_layout(model).decoder.position_limit
    prompts = plan_prompts(prompt_file, lines, tools.tokenizer, limit, max_new_tokens, sampling)
    settings = describe_settings(model, max_new_tokens, sampling, stop, dtype, parse_product(memory.product))
    with open_results(output, lines, settings) as results:
        indices = results.left
        if not indices:
            print(f"all {len(lines)} results are in {output} already", file=sys.stderr)
            return
        left = [prompts[index] for index in indices]
        num_positions = max(len(prompt.token_ids) + prompt.max_new_tokens for prompt in left)
        request = memory.make_request(num_positions, batch_size, len(left))
        with open_behind_bar(model, dtype, memory, request) as open_run:
            opened = open_run.opened
            open_run.report_plan()
            planned = None if opened.offloaded is None else opened.offloaded.plan.batch_size
            run = BatchRun(
                opened.engine,
                opened.tokenizer,
                left,
                Stop(stop, opened.stop_ids),
                max_sequences=planned or batch_size or MAX_SEQUENCES,
                prefill_tokens=opened.prefill_tokens,
            )
            open_run.begin()
            try:
                with _show_results(len(lines) - len(left), len(lines), run) as on_result:
                    for result in run:
                        results.add(indices[result.index], result)
                        on_result()
            finally:
                print(_describe_results(output, results, len(left), run.stats), file=sys.stderr)
            open_run.report_batch(run.stats, len(left))
            open_run.report_traffic()


def _describe_results(output: Path, results: ResultFile, num_begun: int, stats: BatchStats) -> str:
    """One line for people on a run that had ``num_begun`` prompts to do and has ended, perhaps too early."""
    num_left = len(results.left)
    rest = f"; {num_left} are left: the same command does them" if num_left else ""
    return f"{num_begun - num_left} results in {output}: {stats.describe()}{rest}"


@contextmanager
def _show_results(num_before: int, total: int, run: BatchRun) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each result, which moves a bar on a terminal's stderr; it vanishes at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("writing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    is_silent = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=is_silent) as progress:
        task = progress.add_task("", completed=num_before, total=total, rate="")
        yield lambda: progress.update(task, advance=1, rate=f"{run.stats.new_tokens_per_s:.1f} tokens/s")
