"""Writes ``docs/families.md`` from the code: what is read and written, and what is refused by name and why.

``python tools/families.py`` prints the page, ``--write`` puts it into its place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from moesys.models import FAMILIES, REFUSED, Encoding, Family
from moesys.models.layout import InterleavedExperts, MoELayout

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"

_HEAD = """\
# Families of checkpoints

<!-- Written by tools/families.py --write; a test compares this page with the code. -->

A checkpoint belongs to a family by the `model_type` in its `config.json`. `moesys inspect MODEL` says which it is, how
large its parts are and whether it loads. A value of `config.json` that would need other arithmetic than ours is refused
by its name and never ignored.

## Read and written

| `model_type` | transformers' class | what sets it apart | experts as written | experts also read |
|---|---|---|---|---|
"""

_MIDDLE = """
Experts are named from a layer on, of expert 0 where each has tensors of its own. `moesys export --experts separate` or
`stacked` picks among the two kinds. Stacked experts are what transformers calls them inside; other programs know what
is written unless you ask. The second `model_type` of a row is read and written as the first.

## Numbers

Weights are read in fp32, bf16, fp16 and fp64, and written in fp32 or bf16. fp16 is loaded as fp32, because router
logits overflow in it. Quantised weights are decoded when they are loaded:

- **FP8** (`quant_method` `fp8`: e4m3, one factor per block, as DeepSeek-V3): in every family.
"""

_TAIL = """
Any other `quant_method` is refused by its name.

## Long contexts

`rope_type` `default`, `linear`, `llama3` and `yarn` turn a key by its position alone, and run up to the length that
they are stretched to. Two kinds turn it by the length of the sequence as well:

- **`longrope`** (PhiMoE) runs up to the original context, with its short factors. For longer sequences it turns all
  keys by its long factors, also those that a cache holds already. transformers then computes the cache anew when a
  text grows past that length, and a prompt that is read in pieces gets a mixture; a sequence that needs more positions
  is refused here.
- **`dynamic`** is refused. Its frequencies change with every token beyond the original context, and in transformers
  they are those of the pass that a token came in: the same text gives other logits in one pass, in pieces and token by
  token, so there is nothing to be equal to.

## Refused by name

| `model_type` | why |
|---|---|
"""


def describe_layout(layout: MoELayout) -> str:
    """Returns the kind of a layout, and the name that tells it from others."""
    encoding = layout.experts.encoding if isinstance(layout.experts, InterleavedExperts) else Encoding.PLAIN
    kind = (
        str(layout.experts.storage) if encoding is Encoding.PLAIN else f"{layout.experts.storage} {encoding}"
    )
    return f"{kind}: `{layout.prefix}.{layout.experts.probe}`"


def has_mxfp4(family: Family) -> bool:
    return any(
        isinstance(layout.experts, InterleavedExperts) and layout.experts.encoding is Encoding.MXFP4
        for layout in family.layout.moe
    )


def iterate_rows() -> Iterator[str]:
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        written, *others = [describe_layout(layout) for layout in family.layout.moe] or ["–"]
        also_read = "<br>".join(others) or "–"
        yield f"| {types} | {family.architecture} | {family.summary} | {written} | {also_read} |\n"


def render_page() -> str:
    """Returns the page."""
    mxfp4 = ", ".join(f"`{family.model_type}`" for family in FAMILIES if has_mxfp4(family))
    parts = [
        _HEAD,
        *iterate_rows(),
        _MIDDLE,
        f"- **MXFP4** (`quant_method` `mxfp4`: two 4-bit floats per byte, an exponent per 32): {mxfp4}.\n",
        _TAIL,
        *(f"| `{name}` | {reason} |\n" for name, reason in REFUSED.items()),
    ]
    return "".join(parts)


def main() -> None:
    if "--write" in sys.argv[1:]:
        PAGE.write_text(render_page(), encoding="utf-8")
    else:
        sys.stdout.write(render_page())


if __name__ == "__main__":
    main()
