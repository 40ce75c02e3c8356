"""A usage profile is that of its model, whole, and what a cache begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from section_files import NUM_SECTIONS, list_sections, make_pool, write_sections

from moesys.errors import DataError
from moesys.store import LeastRecent, SectionCache, SectionReader
from moesys.store.usage import UsageProfile, preload

PROFILE = UsageProfile("a model", {(0, 3): 2.0, (1, 0): 7.0, (0, 1): 2.0})


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    path.write_text("older")
    PROFILE.write(path)
    assert UsageProfile.read(path, "a model") == PROFILE
    assert list(tmp_path.iterdir()) == [path]


def test_another_models_profile_is_refused(tmp_path: Path) -> None:
    PROFILE.write(tmp_path / "usage.json")
    with pytest.raises(DataError, match="the usage profile of 'a model', and the model is 'another'"):
        UsageProfile.read(tmp_path / "usage.json", "another")


@pytest.mark.parametrize(
    "counts",
    [[[1, 2, -1]], [[1, "2", 3]], [[3]], [{"1": 2}], "no list", [[True, 1, 2]], [[0, 1, float("inf")]]],
)
def test_a_damaged_profile_is_refused(counts: object, tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    content = {"format": "moesys-usage", "version": 1, "model": "a model", "counts": counts}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"usage\.json holds .* give another file"):
        UsageProfile.read(path, "a model")


@pytest.mark.parametrize("text", ["", "[1]", '{"format": "moesys-usage", "version": 2}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "usage.json").write_text(text)
    with pytest.raises(DataError, match="is not a usage profile"):
        UsageProfile.read(tmp_path / "usage.json", "a model")


def test_the_most_used_come_first_and_what_is_older_counts_less() -> None:
    everything = {(0, 1), (0, 2), (0, 3), (1, 0)}
    assert PROFILE.list_most_used(5, everything) == [(1, 0), (0, 1), (0, 3)]
    assert PROFILE.list_most_used(2, {(0, 3), (0, 1)}) == [(0, 1), (0, 3)]
    later = PROFILE.follow({(0, 3): 4, (0, 2): 1}, keep=0.5)
    assert later.counts == {(0, 3): 5.0, (1, 0): 3.5, (0, 1): 1.0, (0, 2): 1.0}


def test_a_cache_begins_with_the_most_used(tmp_path: Path) -> None:
    sections = {(0, key): section for key, section in write_sections(tmp_path / "w.bin").items()}
    assert len(list_sections(tmp_path / "w.bin")) == NUM_SECTIONS
    usage = UsageProfile("m", {(0, 3): 1.0, (0, 5): 9.0, (0, 7): 4.0, (1, 1): 50.0})
    with SectionReader(1) as reader:
        cache = SectionCache(make_pool(2), sections, reader, LeastRecent())
        assert preload(cache, usage, sections) == 2
        cache.settle([(0, 5), (0, 7)])
        assert cache.is_ready((0, 5))
        assert cache.is_ready((0, 7))
        assert preload(cache, usage, sections) == 0
        assert cache.start((0, 3))
        assert not cache.is_here((0, 7)), "the less used of both leaves first"
