"""What a user calls a model, as a folder: a folder is itself, ``org/model[@revision]`` is fetched from the hub.

Knows which files of a repository are weights, configs and tokenizers; pickles and code are never fetched. The idea: a
name that is a folder here never touches the network, and what came from the hub is named by its commit from then on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moesys.errors import ModelFormatError

_HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_HUB_PREFIX = "hf:"
_FETCHED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")
# Other programs' copies of the weights, such as original/ and consolidated.safetensors, double the download.
_LEFT_OUT = ("*/*.safetensors", "*/*.json", "consolidated*")


@dataclass(frozen=True)
class ModelSource:
    """A folder that holds a model, and where it came from."""

    folder: Path
    repository: str | None = None
    """``org/model`` on the hub; None for a local folder."""
    commit: str | None = None
    """The revision that was fetched, in full."""

    @property
    def name(self) -> str:
        """What finds the same files again: the repository at its commit, or the absolute folder."""
        return str(self.folder.resolve()) if self.repository is None else f"{self.repository}@{self.commit}"


def resolve_model(name: str | Path) -> ModelSource:
    """Returns the folder of a model.

    name: a folder; or ``org/model`` or ``org/model@revision`` on the Hugging Face hub, where neither the folder nor
        ``org`` exists here; ``hf:org/model`` names the hub in any case. A download goes on where it stopped.

    Raises `ModelFormatError` where the hub has no such model, or cannot be reached and the model was not fetched
    before. A folder that does not exist is returned: its reader says what was expected there.
    """
    text = str(name)
    found = _HUB_NAME.fullmatch(text.removeprefix(_HUB_PREFIX))
    path = Path(name).expanduser()
    if text.startswith(_HUB_PREFIX) and found is None:
        raise ModelFormatError(
            f"{text!r} is not a name on the hub; they look like hf:org/model or hf:org/model@revision"
        )
    is_local = path.exists() or Path(text.partition("/")[0]).exists()
    if found is None or (is_local and not text.startswith(_HUB_PREFIX)):
        return ModelSource(path)
    return _fetch(found["repository"], found["revision"])


def _fetch(repository: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(_FETCHED), ignore_patterns=list(_LEFT_OUT)
            )
        )
    except (OSError, ValueError) as error:
        raise ModelFormatError(_explain(repository, revision, error)) from error
    return ModelSource(folder, repository, folder.name)


def _explain(repository: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated: accept its terms on its page on the hub, then log in (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder {repository} here and no model {repository} on the hub, or it is private; check the "
            "name, or log in (hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r} on the hub; give a branch, a tag or a commit, or drop it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        where = f"{repository}@{revision}" if revision else repository
        why = "HF_HUB_OFFLINE forbids it" if constants.HF_HUB_OFFLINE else "it cannot be reached"
        return (
            f"{where} is no folder here, was not fetched whole into {constants.HF_HUB_CACHE} before, and cannot be "
            f"fetched from the hub: {why}; give a local folder, copy the model into that cache (HF_HUB_CACHE names "
            "another one), or go online (unset HF_HUB_OFFLINE)"
        )
    return f"{repository} cannot be fetched from the hub: {error}"
