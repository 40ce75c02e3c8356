"""Packed copies: made once per state of the files, and only where a run of them could begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.small_checkpoints import GPT_OSS, make_checkpoint
from moesys.checkpoint import open_weights, pack_model, save_model
from moesys.errors import GenerationError, IneffectiveOptionError, ModelFormatError
from moesys.inference import packed_copy
from moesys.inference.offload_plan import ModelSize, OffloadRequest
from moesys.inference.packed_copy import find_packed_copy
from moesys.kernels import Int8Product
from moesys.models import AttentionConfig, Decoder, DecoderConfig, DenseConfig, RopeConfig

REQUEST = OffloadRequest("1GiB", 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose experts cannot be read one by one from its own files."""
    (tmp_path / "model").mkdir()
    make_checkpoint(tmp_path / "model", GPT_OSS)
    return tmp_path / "model"


def refuse_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("packed")

    monkeypatch.setattr(packed_copy, "pack_model", fail)


def test_a_copy_is_made_once_for_the_files_as_they_are(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    path = find_packed_copy(folder, copies, REQUEST)
    written = path.stat().st_mtime_ns
    assert find_packed_copy(folder, copies, REQUEST) == path
    assert path.stat().st_mtime_ns == written
    (folder / "tokenizer_config.json").write_text("{}")
    other = find_packed_copy(folder, copies, REQUEST)
    assert sorted(copies.iterdir()) == sorted([path, other])


def test_what_a_copy_needs_is_known_before_it_is_packed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[ModelSize] = []
    monkeypatch.setattr(packed_copy, "require_room", lambda size, request: sizes.append(size))
    with open_weights(find_packed_copy(folder, tmp_path / "copies", REQUEST)) as weights:
        section_bytes = [section.num_bytes for section in weights.experts.sections.values()]
        expected = ModelSize.measure(weights.config, weights.dtype, weights.resident_bytes, section_bytes)
    assert sizes == [expected]


@pytest.mark.parametrize(
    ("request_", "dtype", "product", "error"),
    [
        (OffloadRequest("1MiB", 16), None, None, GenerationError),
        (REQUEST, "bf16", None, IneffectiveOptionError),
        (REQUEST, None, Int8Product.W8A8, IneffectiveOptionError),
        (REQUEST, None, Int8Product.W8, IneffectiveOptionError),
    ],
)
def test_what_could_not_run_is_not_packed(
    request_: OffloadRequest,
    dtype: str | None,
    product: Int8Product | None,
    error: type[Exception],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_packing(monkeypatch)
    with pytest.raises(error) as caught:
        find_packed_copy(folder, tmp_path / "copies", request_, dtype=dtype, product=product)
    assert not (tmp_path / "copies").exists()
    assert (str(folder) in str(caught.value)) == (error is IneffectiveOptionError)


def test_a_model_without_experts_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_packing(monkeypatch)
    mixer = AttentionConfig(4, 2, 8, RopeConfig(8))
    model = Decoder(DecoderConfig(61, 32, (mixer,), (DenseConfig(20),), tie_embeddings=False))
    (tmp_path / "dense").mkdir()
    save_model(model, tmp_path / "dense", torch.float32, {})
    with pytest.raises(ModelFormatError, match="has no experts that could stay on the disk"):
        find_packed_copy(tmp_path / "dense", tmp_path / "copies", REQUEST)


def test_a_packed_file_is_read_where_it_lies(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "model.packed"
    pack_model(folder, packed)
    with pytest.raises(
        IneffectiveOptionError, match=r"has no effect on .*model\.packed, which is packed already"
    ):
        find_packed_copy(packed, tmp_path / "copies", REQUEST)
