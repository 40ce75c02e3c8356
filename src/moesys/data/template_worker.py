"""Renders chat templates in a process of its own, where neither their time nor their memory is anybody else's.

Runs as a script: one JSON object per line comes in, one goes out, until the input ends. Imports nothing of moesys, so
that it starts in tens of milliseconds. The idea: jinja2's sandbox keeps a template from Python objects and files, but
not from looping or multiplying strings; the operating system ends that for a process, whatever trick is used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from itertools import chain
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_Limits = Mapping[str, int]


class TemplateNamespace(Namespace):
    """jinja2's ``namespace`` without names that begin with an underscore."""

    def __init__(*args: Any, **attributes: Any) -> None:  # ``self`` may be an attribute, as in jinja2
        self, values = args[0], dict(*args[1:], **attributes)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


class GenerationBlocks(Extension):
    """``{% generation %}``: marks what the assistant writes. Remembers where each block lies in the text."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def __init__(self, environment: ImmutableSandboxedEnvironment) -> None:
        super().__init__(environment)
        self.num_rendered_chars = 0
        self.blocks: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_remember"), [], [], body).set_lineno(line)

    def _remember(self, caller: Macro) -> str:
        text = caller()
        self.blocks.append((self.num_rendered_chars, self.num_rendered_chars + len(text)))
        return text


class CompiledTemplate(NamedTuple):
    """A template that is ready to render."""

    template: Any
    has_places: bool
    """Whether generation blocks can be found in the text: not where their output passes through a macro or block."""


class Renderer:
    """Renders requests; keeps the templates that it has compiled."""

    def __init__(self) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        self._environment.filters["tojson"] = _write_json
        helpers: Any = self._environment.globals
        helpers |= {"raise_exception": _raise, "dict": _make_dict, "namespace": TemplateNamespace}
        self._templates: dict[str, CompiledTemplate] = {}

    def render(self, request: Mapping[str, Any], max_chars: int) -> dict[str, Any]:
        """Returns ``text`` and the ``spans`` of its generation blocks, None without places; or an ``error``."""
        try:
            now = datetime.fromisoformat(request["now"]) if request["now"] else datetime.now()
            return self._render(
                self._compile(request["template"]),
                {**request["variables"], "strftime_now": now.strftime},
                max_chars,
            )
        except MemoryError:
            return {"error": "it needs more memory than a template may have"}
        except Exception as error:  # noqa: BLE001  a template can raise anything, and none of it is our defect
            return {"error": f"{_locate(error)}{error or type(error).__name__}"}

    def _compile(self, source: str) -> CompiledTemplate:
        if source not in self._templates:
            tree = self._environment.parse(source)
            buffers = tree.find_all((nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock))
            self._templates[source] = CompiledTemplate(
                self._environment.from_string(tree),
                has_places=not any(
                    map(_is_generation, chain(*(b.find_all(nodes.CallBlock) for b in buffers)))
                ),
            )
        return self._templates[source]

    def _render(
        self, compiled: CompiledTemplate, variables: Mapping[str, Any], max_chars: int
    ) -> dict[str, Any]:
        tracker: Any = self._environment.extensions[GenerationBlocks.identifier]
        tracker.num_rendered_chars, tracker.blocks = 0, []
        pieces = []
        for piece in compiled.template.generate(variables):
            pieces.append(piece)
            tracker.num_rendered_chars += len(piece)
            if tracker.num_rendered_chars > max_chars:
                raise TemplateError(f"it writes more than {max_chars} characters")
        spans = tracker.blocks if compiled.has_places else None
        return {"text": "".join(pieces), "spans": spans}


def serve(requests: Iterator[bytes], limits: _Limits) -> Iterator[str]:
    """Yields the answer to each line."""
    renderer = Renderer()
    _limit_memory(limits["memory_bytes"])
    for line in requests:
        _limit_cpu(limits["cpu_s"])
        try:
            yield json.dumps(renderer.render(json.loads(line), limits["max_chars"]))
        except (MemoryError, RecursionError):
            yield json.dumps({"error": "the conversation or what becomes of it is too large"})


def _limit_memory(num_bytes: int) -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def _limit_cpu(seconds: int) -> None:
    """Lets the system end this process when the next request has taken so many seconds, rounded up."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, hard))


def _locate(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return "" if line is None else f"line {line}: "


def _is_generation(block: nodes.CallBlock) -> bool:
    method = block.call.node
    return isinstance(method, nodes.ExtensionAttribute) and method.identifier == GenerationBlocks.identifier


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no names that begin with an underscore, such as {name!r}")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _make_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _write_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson`` as transformers has it: without HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def main() -> None:
    for answer in serve(iter(sys.stdin.buffer.readline, b""), json.loads(sys.argv[1])):
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
