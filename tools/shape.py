"""The shape of the code, to look at before calling a thing done: ``make shape``.

Prints per room its lines, longest functions and widest signatures, then bodies that occur twice and the imports
between rooms. Only what `lint-imports` forbids fails a build; everything here is for the eye.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grimp

SOURCE = Path(__file__).resolve().parent.parent / "src" / "moesys"
MIN_REPEATED_STATEMENTS = 3


@dataclass(frozen=True)
class Function:
    """One function or method."""

    room: str
    place: str
    num_lines: int
    num_parameters: int
    body: str
    num_statements: int


def find_room(path: Path) -> str:
    """Returns the first folder below the package, or ``.`` for a file at its top."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else "."


def iterate_functions(path: Path) -> Iterator[Function]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            statements = [
                s for s in node.body if not isinstance(s, ast.Expr) or not isinstance(s.value, ast.Constant)
            ]
            yield Function(
                room=find_room(path),
                place=f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}",
                num_lines=(node.end_lineno or node.lineno) - node.lineno + 1,
                num_parameters=sum(name.arg not in ("self", "cls") for name in names),
                body=ast.dump(ast.Module(statements, type_ignores=[])),
                num_statements=len(statements),
            )


def print_rooms(files: list[Path], functions: list[Function]) -> None:
    lines: dict[str, int] = defaultdict(int)
    for path in files:
        lines[find_room(path)] += len(path.read_text(encoding="utf-8").splitlines())
    for room in sorted(lines):
        own = [f for f in functions if f.room == room]
        longest = sorted(own, key=lambda f: -f.num_lines)[:2]
        widest = sorted(own, key=lambda f: -f.num_parameters)[:1]
        print(f"{room:12s} {lines[room]:5d} lines, {len(own):3d} functions")
        for function in longest:
            print(f"{'':12s}   {function.num_lines:4d} lines       {function.place}")
        for function in widest:
            print(f"{'':12s}   {function.num_parameters:4d} parameters  {function.place}")
    print(f"{'all':12s} {sum(lines.values()):5d} lines in {len(files)} files\n")


def print_repeated(functions: list[Function]) -> None:
    by_body = defaultdict(list)
    for function in functions:
        if function.num_statements >= MIN_REPEATED_STATEMENTS:
            by_body[function.body].append(function.place)
    repeated = [places for places in by_body.values() if len(places) > 1]
    print("repeated bodies:" if repeated else "repeated bodies: none")
    for places in repeated:
        print("  " + " = ".join(places))


def print_imports() -> None:
    graph = grimp.build_graph("moesys")
    rooms = sorted(name for name in graph.find_children("moesys"))
    for room in rooms:
        graph.squash_module(room)
    print("\nimports between rooms:")
    for room in rooms:
        imported = sorted(
            m.removeprefix("moesys.")
            for m in graph.find_modules_directly_imported_by(room)
            if m not in ("moesys", room)
        )
        print(f"  {room.removeprefix('moesys.'):12s} -> {', '.join(imported) or '-'}")


def main() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    functions = [function for path in files for function in iterate_functions(path)]
    print_rooms(files, functions)
    print_repeated(functions)
    print_imports()


if __name__ == "__main__":
    main()
