"""Sources, errors and the split by content hash."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moesys.data import Document, load_documents, split_heldout
from moesys.errors import DataError, MissingExtraError


def texts_of(documents: list[Document]) -> set[str]:
    return {document.text for document in documents}


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return load_documents("stdlib")


def test_stdlib_holds_source_and_documentation_once(stdlib: list[Document]) -> None:
    names = {document.name for document in stdlib}
    assert {"argparse.py", "json/decoder.py", "LICENSE.txt"} <= names
    assert len(texts_of(stdlib)) == len(stdlib)
    assert not any({"test", "tests", "site-packages", "__pycache__"} & set(Path(n).parts[:-1]) for n in names)
    assert "encodings/utf_8.py" in names
    assert not {"encodings/cp437.py", "encodings/iso8859_1.py", "encodings/koi8_r.py"} & names


def test_documents_are_ordered_by_content_not_by_name(tmp_path: Path) -> None:
    for folder, names in (("a", "123"), ("b", "312")):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, ("one", "two", "three"), strict=True):
            (tmp_path / folder / f"{name}.txt").write_text(text)
    first, second = (load_documents(str(tmp_path / folder)) for folder in "ab")
    assert [d.text for d in first] == [d.text for d in second]
    assert [d.content_hash for d in first] == sorted(d.content_hash for d in first)


def test_folder_is_read_recursively_by_ending(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "deep" / "a.py").write_bytes(b"line\r\n")
    (tmp_path / "deep" / ".hidden" / "no.txt").write_text("hidden")
    (tmp_path / "b.MD").write_text("markdown")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "c.jsonl").write_text('{"text": "json\u2028line"}\n\n{"text": "second"}\n', encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "notes").write_text("no ending")
    assert texts_of(load_documents(str(tmp_path))) == {"line\r\n", "markdown", "json\u2028line", "second"}
    names = {d.text: d.name for d in load_documents(str(tmp_path))}
    assert names["line\r\n"] == "deep/a.py"
    assert names["second"] == "c.jsonl:3"
    assert texts_of(load_documents(str(tmp_path), "jsonl")) == {"json\u2028line", "second"}
    assert texts_of(load_documents(str(tmp_path), "text")) == {
        *("line\r\n", "markdown", "no ending"),
        '{"text": "json\u2028line"}\n\n{"text": "second"}\n',
    }


def test_files_that_are_not_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "notes").write_text("no ending")
    assert len(load_documents(str(tmp_path), "text")) == 1
    assert not caplog.records
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "a.latin1").write_bytes(b"caf\xe9")
    assert texts_of(load_documents(str(tmp_path), "text")) == {"no ending"}
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "skipped files that are not UTF-8 text: 2, the first is a.latin1" in record.getMessage()


def test_file_is_read_by_its_ending_or_the_given_format(tmp_path: Path) -> None:
    file = tmp_path / "rows.data"
    file.write_text('{"body": "hello"}\n')
    assert texts_of(load_documents(str(file))) == {'{"body": "hello"}\n'}
    assert texts_of(load_documents(str(file), "jsonl", "body")) == {"hello"}


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "other": [1, 2]}), file)
    assert texts_of(load_documents(str(file))) == {"one", "two"}
    with pytest.raises(DataError, match=r"no column 'body'; set data.text_field to one of: text, other"):
        load_documents(str(file), text_field="body")
    with pytest.raises(DataError, match=r"row 0: the field 'other' must be text, got int"):
        load_documents(str(file), text_field="other")
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as Parquet .*check the file"):
        load_documents(str(file))


def test_hugging_face_dataset_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, str]]):
        column_names = ("text", "label")

        def select_columns(self, names: list[str]) -> list[dict[str, str]]:
            return [{name: row[name] for name in names} for row in self]

    def load_dataset(path: str, name: str | None, split: str) -> Rows:
        if path != "owner/rows":
            raise FileNotFoundError("unknown dataset")
        assert split == "train"
        if name is not None:
            return Rows([{"text": f"of the subset {name}"}])
        return Rows([{"text": "one", "label": "x"}, {"text": "two", "label": "y"}])

    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert {d.name: d.text for d in load_documents("hf:owner/rows")} == {
        "owner/rows:0": "one",
        "owner/rows:1": "two",
    }
    [document] = load_documents("hf:owner/rows:small-v1")
    assert document.text == "of the subset small-v1"
    with pytest.raises(
        DataError, match=r"hf:nobody: the dataset cannot be loaded \(unknown dataset\); check"
    ):
        load_documents("hf:nobody")
    with pytest.raises(DataError, match=r"no column 'body'"):
        load_documents("hf:owner/rows", text_field="body")


@pytest.mark.parametrize(("source", "package"), [("hf:owner/rows", "datasets"), ("rows.parquet", "pyarrow")])
def test_missing_extra_names_the_install_command(
    source: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, package: str | None = None) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"")
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*pip install 'moesys\[data\]'"):
        load_documents(source)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: there is no such file or folder .*set data.source to"):
        load_documents(str(tmp_path / "nowhere"))


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(
        DataError, match=r"no documents with text were found \(data.format=auto.*set data.format"
    ):
        load_documents(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"abc\xff\xfe", "byte 3 is 0xff, which is not UTF-8"), (b"ab\0c", "byte 2 is a zero byte")],
)
def test_binary_file_is_named_with_the_offset(content: bytes, cause: str, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(content)
    for source in (tmp_path, tmp_path / "bad.txt"):
        with pytest.raises(DataError, match=rf"bad.txt: {cause}.*text must be UTF-8.*move it out"):
            load_documents(str(source))


def test_unreadable_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "secret.txt").write_text("secret")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(
            DataError, match=r"secret.txt: cannot be read \(Permission denied\); make it readable"
        ):
            load_documents(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", refuse)
        with pytest.raises(
            DataError, match=r"the folder cannot be listed \(Permission denied\); make it readable"
        ):
            load_documents(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{broken",
            r"rows.jsonl:2: the line is not JSON \(.*\); a JSONL file holds one JSON object per line",
        ),
        ("[1]", r"rows.jsonl:2: expected a JSON object, got list"),
        ('{"body": "x"}', r"rows.jsonl:2: there is no field 'text'; set data.text_field to one of: body"),
        ('{"text": 5}', r"rows.jsonl:2: the field 'text' must be text, got int"),
        (
            r'{"text": "a\ud800"}',
            r"rows.jsonl:2: character 1 of the field 'text' is a lone surrogate \(\\ud800\)",
        ),
    ],
)
def test_bad_jsonl_line_is_located(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        load_documents(str(file))


@given(
    texts=st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=30),
    fraction=st.floats(0.001, 0.999),
)
def test_split_covers_every_document_and_keeps_copies_together(texts: list[str], fraction: float) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    assume(len(set(texts)) > 1)
    train, heldout = split_heldout(documents, fraction)
    assert train
    assert heldout
    assert sorted(train + heldout, key=lambda d: int(d.name)) == documents
    assert not texts_of(train) & texts_of(heldout)
    assert split_heldout(documents[::-1], fraction) == (train[::-1], heldout[::-1])


def test_split_is_stable_when_documents_are_added() -> None:
    documents = [Document(str(i), f"text {i}") for i in range(1000)]
    _, heldout = split_heldout(documents[:500], 0.1)
    _, more_heldout = split_heldout(documents, 0.1)
    assert texts_of(heldout) == texts_of(more_heldout) & texts_of(documents[:500])
    assert 60 < len(more_heldout) < 140


@given(text=st.text("ab\n", min_size=2, max_size=60), fraction=st.floats(0.001, 0.999))
def test_one_document_is_cut_into_a_head_and_a_tail_near_the_fraction(text: str, fraction: float) -> None:
    [train], [heldout] = split_heldout([Document("book", text)], fraction)
    assert train.text
    assert heldout.text
    assert train.text + heldout.text == text
    assert (train.name, heldout.name) == (f"book[:{len(train.text)}]", f"book[{len(train.text)}:]")
    asked = min(max(fraction * len(text), 1), len(text) - 1)
    assert abs(len(heldout.text) - asked) <= min(asked, len(text) - asked) / 2 + 1


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("line\n" * 100, "line\n" * 5),
        ("x" * 100, "x" * 5),
        ("x" * 93 + "\n" + "y" * 6, "y" * 6),
        ("x" * 96 + "\n" + "y" * 3, "y" * 3),
        ("x" * 98 + "\n" + "y", "xxx\ny"),
        ("title\n" + "x" * 94, "x" * 5),
        ("x" * 99 + "\n", "xxxx\n"),
        ("ab", "b"),
    ],
)
def test_one_document_is_cut_at_a_line_when_one_is_near(text: str, tail: str) -> None:
    [train], [heldout] = split_heldout([Document("book", text)], 0.05)
    assert (train.text, heldout.text) == (text.removesuffix(tail), tail)


def test_copies_of_one_document_are_cut_at_the_same_place() -> None:
    train, heldout = split_heldout([Document("a", "head tail"), Document("b", "head tail")], 0.45)
    assert [d.text for d in train] == ["head "] * 2
    assert [d.text for d in heldout] == ["tail"] * 2


@pytest.mark.parametrize(("documents", "found"), [([Document("a", "x")] * 2, 1), ([], 0)])
def test_a_document_too_short_to_cut_is_refused(documents: list[Document], found: int) -> None:
    with pytest.raises(DataError, match=rf"at least 2 characters, got {found}; give a longer document"):
        split_heldout(documents, 0.5)
