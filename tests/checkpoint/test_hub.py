"""Names of models: a folder is itself and stays off the network, a name on the hub is pinned to its commit."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from moesys.checkpoint import ModelSource, resolve_model
from moesys.errors import ModelFormatError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_local_folder_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "./org/model", "org/missing", "/no/such/folder", "missing", tmp_path / "org"):
        assert resolve_model(name) == ModelSource(Path(name))
    assert resolve_model("org/model").name == str(tmp_path / "org" / "model")


def answer_with(
    monkeypatch: pytest.MonkeyPatch, answer: Path | Exception
) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repository: str, **options: Any) -> str:
        calls.append((repository, options))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_name_on_the_hub_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    calls = answer_with(monkeypatch, tmp_path / COMMIT)
    for name, repository, revision in (
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", None),
        ("a/b@refs/pr/3", "a/b", "refs/pr/3"),
        ("hf:org/model@v1.0", "org/model", "v1.0"),
    ):
        source = resolve_model(name)
        assert source == ModelSource(tmp_path / COMMIT, repository, COMMIT)
        assert source.name == f"{repository}@{COMMIT}"
        assert calls[-1][0] == repository
        assert calls[-1][1]["revision"] == revision
    with pytest.raises(ModelFormatError, match="'hf:model' is not a name on the hub"):
        resolve_model("hf:model")


@pytest.mark.parametrize(
    ("make_error", "message"),
    [
        (lambda: errors.LocalEntryNotFoundError("x"), r"a/b@v1 is no folder here, .* copy the model into that cache"),
        (lambda: make_http_error(errors.RepositoryNotFoundError), "no folder a/b here and no model a/b on the hub"),
        (lambda: make_http_error(errors.GatedRepoError), "a/b is gated: accept its terms"),
        (lambda: make_http_error(errors.RevisionNotFoundError), "a/b has no revision 'v1'"),
        (lambda: OSError(28, "No space left on device"), "a/b cannot be fetched from the hub: .*No space left"),
        (lambda: errors.HFValidationError("bad name"), "a/b cannot be fetched from the hub: bad name"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, make_error: Any, message: str
) -> None:
    answer_with(monkeypatch, make_error())
    with pytest.raises(ModelFormatError, match=message):
        resolve_model("a/b@v1")


def make_http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """Such an error without the response that it usually carries."""
    error = kind.__new__(kind)
    OSError.__init__(error, "refused")
    return error


def test_the_offline_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer_with(monkeypatch, errors.LocalEntryNotFoundError("x"))
    with pytest.raises(ModelFormatError, match="HF_HUB_OFFLINE forbids it"):
        resolve_model("a/b")


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 3000,
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"t",
    "additional_chat_templates/tool_use.jinja": b"u",
    "modeling.py": b"code",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"twice",
    "consolidated.safetensors": b"twice",
    "original/params.json": b"{}",
}
WANTED = {name for name in FILES if not name.startswith(("original", "consolidated", "modeling", "pytorch"))}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        asked.append(self.path)
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        tree = [{"type": "file", "path": name, "size": len(data), "oid": hash_file(data)} for name, data in
                FILES.items()]  # fmt: skip
        answers = {
            "/api/models/org/model/revision/main": json.dumps({"id": "org/model", "sha": COMMIT}).encode(),
            f"/api/models/org/model/tree/{COMMIT}": json.dumps(tree).encode(),
            **{f"/org/model/resolve/{COMMIT}/{name}": data for name, data in FILES.items()},
        }
        body = answers.get(path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        if body is not None:
            self.send_header("ETag", f'"{hash_file(body)}"')
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET" and body is not None:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


asked: list[str] = []


def hash_file(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import sys
from moesys.checkpoint.hub import resolve_model
from moesys.errors import ModelFormatError
for name in sys.argv[1:]:
    try:
        print(resolve_model(name).folder)
    except ModelFormatError as error:
        print("error:", error)
"""


def ask(*names: str, cache: Path, **environment: str) -> list[str]:
    """Resolves names in a process of its own: the library reads its environment when it is imported."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env={**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.splitlines()


@pytest.mark.slow
def test_a_download_takes_weights_configs_and_tokenizers_only(hub: str, tmp_path: Path) -> None:
    first, missing = ask("org/model", "org/other", cache=tmp_path, HF_ENDPOINT=hub)
    folder = Path(first)
    assert folder.name == COMMIT
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert missing.startswith("error: there is no folder org/other here and no model org/other on the hub")
    fetched = [path for path in asked if "/resolve/" in path]
    assert len(fetched) == len(WANTED)
    again = ask(f"org/model@{COMMIT}", "org/model", cache=tmp_path, HF_HUB_OFFLINE="1")
    assert again == [first, first]
    (refused,) = ask("org/other", cache=tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids it; give a local folder" in refused
