"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def find_commands(program: str) -> list[list[str]]:
    lines = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command for command in commands if command and command[0] == program]


def test_the_first_two_commands_are_make_targets() -> None:
    assert [command[1] for command in find_commands("make")[:2]] == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for _, target, *_ in find_commands("make"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path: Path) -> None:
    """In a folder that has what the commands name, and nothing else."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    commands = find_commands("moesys")
    assert {command[1] for command in commands} >= {"train", "resume", "export", "generate", "eval", "config"}
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip()


def test_the_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})  # noqa: S102  our own README
    assert "torch.Size([2, 10, 64])" in capsys.readouterr().out


def test_the_files_it_names_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_room_is_on_the_map() -> None:
    rooms = {path.name for path in (ROOT / "src" / "moesys").iterdir() if (path / "__init__.py").exists()}
    assert all(f"  {room}/" in README or f", {room}/" in README for room in rooms)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_what_the_docs_link_to_exists(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
