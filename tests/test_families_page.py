"""``docs/families.md`` says what the code says."""

from __future__ import annotations

import sys
from pathlib import Path

from moesys.models import FAMILIES, REFUSED

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import families


def test_the_page_is_what_the_code_says() -> None:
    assert families.PAGE.read_text(encoding="utf-8") == families.render_page(), (
        "docs/families.md is stale; run python tools/families.py --write"
    )


def test_every_family_and_every_refusal_has_a_row() -> None:
    page = families.render_page()
    for name in [*(name for family in FAMILIES for name in family.model_types), *REFUSED]:
        assert f"`{name}`" in page


def test_a_family_is_not_refused() -> None:
    assert not REFUSED.keys() & {name for family in FAMILIES for name in family.model_types}
