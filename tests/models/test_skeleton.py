"""A skeleton is the decoder without its numbers, and without the time that drawing them takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from small_models import make_config, make_model

from moesys.errors import RoutingError
from moesys.models import make_skeleton
from moesys.moe import MoEConfig


def test_it_has_the_shapes_of_the_decoder_and_no_memory() -> None:
    skeleton, model = make_skeleton(make_config()).state_dict(), make_model().state_dict()
    assert {name: tensor.shape for name, tensor in skeleton.items()} == {
        name: tensor.shape for name, tensor in model.items()
    }
    assert all(tensor.is_meta for tensor in skeleton.values())


def test_it_loads_no_symbolic_shapes() -> None:
    script = (
        "import sys\n"
        "from moesys.models import DecoderConfig, DenseConfig, make_skeleton\n"
        "make_skeleton(DecoderConfig(8, 4, (), ()))\n"
        "print('sympy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_a_config_that_no_decoder_has_is_refused() -> None:
    with pytest.raises(RoutingError, match="top_k"):
        make_skeleton(make_config(feed_forwards=(MoEConfig(num_experts=2, top_k=3, intermediate_size=4),)))
