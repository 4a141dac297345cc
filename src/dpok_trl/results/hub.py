"""The upload to the Hub: which files go there, and what may go wrong."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCardData, get_token
from huggingface_hub.errors import (  # HTTPError: of the HTTP library that huggingface_hub uses, which differs between its versions
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from dpok_trl.policy.lora_files import LORA_FILE
from dpok_trl.policy.saved import (
    CARD_FILE,
    CONFIG_FILE,
    LAST_CHECKPOINT,
    MODEL_FOLDER,
    PIPELINE_FILE,
    STATE_FILE,
    WEIGHTS,
    base_model,
    find_model,
    holds_model,
)
from dpok_trl.results.model_card import LOCAL, PICTURES, hub_id
from dpok_trl.results.provenance import public_settings
from dpok_trl.results.runlog import METRICS_FILE


logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES, FIRST_WAIT = 3, 1.0  # of requests that huggingface_hub does not repeat by itself; seconds, doubled each time
BUSY = (408, 429)  # statuses that are no refusal
# What of a run's output folder, or of a checkpoint, is the model.
MODEL_FILES = (
    CARD_FILE,
    CONFIG_FILE,
    *WEIGHTS,
    LORA_FILE.replace(".", "_*."),  # of a second expert
    "*/adapter_config.json",
    "*/config.json",
    "*/diffusion_pytorch_model*.json",  # index of weights in several files
    f"{PICTURES}/*.png",
)


class HubError(OSError):
    """A repository of the Hub that cannot be used, or an upload that failed; the message says what to do.

    `temporary` tells whether the Hub or the network is to blame, and not what was asked for.
    """

    def __init__(self, message: str, temporary: bool = False):
        super().__init__(message)
        self.temporary = temporary


def open_repository(repo_id: str, *, private: bool | None) -> str:
    """Makes a model repository if there is none, and makes sure that it may be written to. Returns its full name.

    Raises:
        [`HubError`]
    """
    api = HfApi()
    with told_in_words(repo_id):
        name = str(_repeated(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id)
        # `create_repo` says nothing of a repository of somebody else that exists. To ask how a file would be uploaded needs the right to write, and writes nothing.
        api.preupload_lfs_files(name, [CommitOperationAdd(CARD_FILE, b"-")])
    return name


def push_folder(
    folder: str | Path, repo_id: str, *, commit_message: str, private: bool | None, checkpoint: Path | None = None
) -> str:
    """Uploads a model to a repository, which is made if need be, in one commit: all of it is there, or nothing. Files that are there already are not sent again.

    Args:
        folder (`str` or `Path`): A saved model, or a checkpoint: of that the weights, with a card that says how to load them.
        private (`bool`, *optional*): For a new repository; `None`: the account's default.
        checkpoint (`Path`, *optional*): Goes to `last-checkpoint/`, all of it, to resume from.

    Returns:
        `str`: The URL of the commit.

    Raises:
        [`HubError`]
    """
    name = open_repository(repo_id, private=private)
    files = model_files(Path(folder), name)
    if checkpoint is not None:
        files |= {f"{LAST_CHECKPOINT}/{path}": content for path, content in checkpoint_files(checkpoint).items()}
    files = {path: without_folders(content) for path, content in files.items()}
    replaced = tuple(f"{top}/" for top in (LAST_CHECKPOINT, PICTURES) if any(p.startswith(f"{top}/") for p in files))
    api = HfApi()

    def commit() -> str:
        there = api.list_repo_files(name) if replaced else []
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        gone = [path for path in there if path.startswith(replaced) and path not in files]
        changes += [CommitOperationDelete(path) for path in gone]
        return str(api.create_commit(name, changes, commit_message=commit_message).commit_url)

    with told_in_words(name):
        return _repeated(commit)  # all of it: if the commit has come through after all, nothing is left to send


def newest_model(folder: Path) -> Path:
    """What `dpok-trl push` takes of a folder: the saved model, or of a run the newest of checkpoint and saved model.

    Raises:
        `FileNotFoundError`: If there is neither.
    """
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}.")
    found, saved = find_model(folder), folder / MODEL_FOLDER
    if found != saved and found != folder and holds_model(saved):
        written = max(path.stat().st_mtime for path in saved.rglob("*") if path.is_file())
        return saved if written >= (found / STATE_FILE).stat().st_mtime else found
    return found


def model_files(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """By their paths in the repository. The card is the one that is there, with the repository's name in its code, or a short one."""
    of_a_run = (folder / STATE_FILE).is_file() or (folder / METRICS_FILE).is_file()
    found = [path for name in MODEL_FILES for path in folder.glob(name)] if of_a_run else folder.rglob("*")
    paths = {path.relative_to(folder) for path in found if path.is_file()}
    files: dict[str, Path | bytes] = {
        path.as_posix(): folder / path for path in sorted(paths) if not any(part[0] == "." for part in path.parts)
    }
    card = folder / CARD_FILE
    text = card_for(card.read_text(encoding="utf-8"), repo_id) if card.is_file() else short_card(folder, repo_id)
    return {**files, CARD_FILE: text.encode()}


def without_folders(content: Path | bytes) -> Path | bytes:
    """A file of diffusers' configs without the folder of this machine that a network was loaded from; all else as it is."""
    if isinstance(content, bytes) or content.name not in (PIPELINE_FILE, "config.json"):
        return content
    config = json.loads(content.read_text(encoding="utf-8"))
    if hub_id(config.get("_name_or_path")) is not None or "_name_or_path" not in config:
        return content
    del config["_name_or_path"]
    return json.dumps(config, indent=2).encode()


def checkpoint_files(checkpoint: Path) -> dict[str, Path | bytes]:
    """All of a checkpoint by path; its state without what is nobody else's business."""
    files: dict[str, Path | bytes] = {
        path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()
    }
    state = json.loads((checkpoint / STATE_FILE).read_text())
    state["config"] = public_settings(state["config"])
    state["base_model"] = hub_id(state["base_model"])
    state["callbacks"]["best_model_checkpoint"] = None  # a folder of this machine
    return {**files, STATE_FILE: json.dumps(state, indent=2).encode()}


def card_for(text: str, repo_id: str) -> str:
    """A model card whose title and code name this repository, and not the folder or repository that it was written for."""
    named = re.search(r'(?:load_lora_weights|load_tuned|PeftModel\.from_pretrained)\((?:pipe\.\w+, )?"([^"]+)"', text)
    if named is None or named[1] == repo_id:
        return text
    title = re.sub(
        rf"^# {re.escape(named[1].removeprefix(LOCAL))}$", lambda _: f"# {repo_id}", text, count=1, flags=re.MULTILINE
    )
    return title.replace(f'"{named[1]}"', f'"{repo_id}"')


def short_card(folder: Path, repo_id: str) -> str:
    """Of a model that was saved without one, as checkpoints are."""
    base = hub_id(base_model(folder))
    whole = (folder / PIPELINE_FILE).is_file()
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune" if whole else "adapter",
        library_name="diffusers",
        tags=["diffusers", *(["lora"] if (folder / LORA_FILE).is_file() else []), "reinforcement-learning", "dpok"],
    )
    given = "" if base is not None or whole else ', base="path/to/the/base"'
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id}\n\nTrained with [dpok-trl](https://pypi.org/project/dpok-trl/).\n\n"
        f'```python\nfrom dpok_trl import load_tuned\n\npipe = load_tuned("{repo_id}"{given})\nimage = pipe("a prompt").images[0]\n```\n'
    )


# --- what may go wrong ------------------------------------------------------------------------------------------------


@contextmanager
def told_in_words(repo_id: str) -> Iterator[None]:
    """Within it what huggingface_hub raises becomes a [`HubError`]."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        raise hub_error(error, repo_id) from error


def hub_error(error: Exception, repo_id: str) -> HubError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = " ".join(str(error).split())
    login = "Run `hf auth login` with a token that may write (huggingface.co/settings/tokens), or set HF_TOKEN to it."
    if isinstance(error, HFValidationError):
        return HubError(
            f"'{repo_id}' cannot be the name of a repository: {said} Give one such as 'me/rabbit-lora': letters, digits, '-', '_' and '.'."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, so nothing goes to the Hub. Unset it to push.", temporary=True)
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and get_token() is None):
        return HubError(f"there is no token to push to {repo_id} with. {login}")
    if status == 401:
        return HubError(f"the Hub does not accept the token that was to push to {repo_id}. {login}")
    if status == 403:
        return HubError(
            f"this account, or its token, may not write to {repo_id}. Choose a repository under a name of your own, or a token that may write there: {said}"
        )
    if status == 404:
        return HubError(f"there is no repository {repo_id} that this account may see: {said}")
    if "Invalid metadata in README.md" in said:
        return HubError(f"the Hub refuses the model card, the README.md: {said}")
    if status is not None and 400 <= status < 500 and status not in BUSY:
        return HubError(f"the Hub refuses {repo_id}: {said}")
    return HubError(f"the Hub does not answer as it should ({type(error).__name__}: {said})", temporary=True)


def _repeated(request: Callable[[], T]) -> T:
    """Asks again what may have failed by chance."""
    wait = FIRST_WAIT
    for _ in range(TRIES - 1):
        try:
            return request()
        except (HTTPError, OSError) as error:
            if isinstance(error, OfflineModeIsEnabled) or not hub_error(error, "").temporary:
                raise
            logger.info("the Hub: %s; trying again in %g s", error, wait)
            time.sleep(wait)
            wait *= 2
    return request()
