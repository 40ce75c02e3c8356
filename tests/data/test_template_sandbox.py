"""Hostile templates end soon, and the next one finds a whole sandbox."""

from __future__ import annotations

import time

import pytest

from moesys.data.template_sandbox import TemplateLimits, TemplateSandbox
from moesys.errors import ModelFormatError

DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"


@pytest.fixture(scope="module")
def sandbox() -> TemplateSandbox:
    return TemplateSandbox(TemplateLimits(cpu_s=1, wall_s=20, memory_bytes=256 * 2**20, max_chars=10000))


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% for a in range(9999) %}" * 4 + "{% endfor %}" * 4, "more than 1 seconds"),
        (f"{DOUBLE}{{{{ ns.x }}}}".replace("START", "3").replace("STEP", "ns.x * ns.x"), "stopped|memory|digits"),
        (DOUBLE.replace("START", "'x'").replace("STEP", "ns.x ~ ns.x"), "memory"),
        (DOUBLE.replace("START", "[1]").replace("STEP", "ns.x + ns.x"), "memory"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ 'x' | center(10**10) }}", "memory"),
        ("{{ '%010000000000d' % 1 }}", "memory"),
        ("{{ ('a' * 99999) | replace('a', 'b' * 99999) }}", "memory"),
        ("{{ messages | tojson(indent=10**9) }}", "memory"),
        ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 10000 characters"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion"),
        ("{% if 1 %}" * 900 + "{% endif %}" * 900, "recursion"),
        (f"{{{{ {'(' * 9999}1{')' * 9999} }}}}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now.__self__.__class__.mro() }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "underscore"),
    ],
)  # fmt: skip
def test_a_hostile_template_is_an_error_and_the_next_one_renders(
    sandbox: TemplateSandbox, template: str, cause: str
) -> None:
    with pytest.raises(ModelFormatError, match=cause):
        sandbox.render(template, {"messages": [{"content": "hi"}]})
    assert sandbox.render("{{ a }}", {"a": "ok"}).text == "ok"


def test_generation_blocks_have_places_unless_their_output_is_moved(sandbox: TemplateSandbox) -> None:
    block = "{% generation %}a{% endgeneration %}"
    assert sandbox.render(f"aa{block}.{{% if 1 %}}{block}{{% endif %}}", {}).spans == ((2, 3), (4, 5))
    for moved in (
        f"{{% macro m() %}}a{block}{{% endmacro %}}.{{{{ m() }}}}",
        f"{{% set m %}}{block}{{% endset %}}aa{{{{ m }}}}",
        f"a{{% filter trim %}}{block}{{% endfilter %}}",
        f"{{% generation %}}a{block}{{% endgeneration %}}",
    ):
        assert sandbox.render(moved, {}).spans is None


def test_a_worker_that_does_not_answer_is_replaced() -> None:
    sandbox = TemplateSandbox(TemplateLimits(cpu_s=1000, wall_s=1))
    with pytest.raises(ModelFormatError, match="stopped"):
        sandbox.render("{% for a in range(9999) %}" * 4 + "{% endfor %}" * 4, {})
    assert sandbox.render("ok", {}).text == "ok"


def test_an_interrupted_request_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = TemplateSandbox()

    def interrupt(process: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "_read_line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("first", {})
    assert sandbox.render("second", {}).text == "second"


def test_a_rendering_costs_little(sandbox: TemplateSandbox) -> None:
    messages = [{"role": "user", "content": "a question of usual length"}] * 20
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    sandbox.render(template, {"messages": messages})
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        sandbox.render(template, {"messages": messages})
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.01


def test_large_conversations_pass_through(sandbox: TemplateSandbox) -> None:
    with pytest.raises(ModelFormatError, match="more than 10000 characters"):
        sandbox.render("{{ a }}", {"a": "x" * 2**22})
    assert sandbox.render("{{ a | length }}", {"a": "é" * 2**20}).text == str(2**20)
