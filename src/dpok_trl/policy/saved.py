"""What of a model lies in a folder: where its weights are, on which base, and whether a checkpoint is whole."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, snapshot_download

from dpok_trl.policy.lora_files import LORA_FILE, PEFT_FILE
from dpok_trl.policy.shipped import DEMO, SHIPPED_PIPELINE


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # of a checkpoint
CONFIG_FILE = "dpok_config.json"  # beside a saved model
CARD_FILE = "README.md"
PIPELINE_FILE = "model_index.json"  # of a whole pipeline
MODEL_FOLDER = "model"  # what a run pushes, in its output folder
LAST_CHECKPOINT = "last-checkpoint"  # the newest one, in a repository of the Hub

# By one of them a folder with what was trained is known.
WEIGHTS = (LORA_FILE, PIPELINE_FILE, f"*/{PEFT_FILE}", "*/diffusion_pytorch_model*.safetensors")
# Of no use to somebody who loads a model.
NOT_OF_THE_MODEL = (f"{LAST_CHECKPOINT}/*", "*.png")


def find_model(model: str | Path) -> Path:
    """The folder with what was trained: of a saved model, a checkpoint, a run (its newest whole checkpoint, or else what it saved to push) or a Hub id, which
    is downloaded.

    Raises:
        `FileNotFoundError`: If there is none; the message says what was looked for.
    """
    path = Path(model).expanduser()
    if not path.exists():
        name = str(model)
        if name.startswith((".", "~", "/")) or name.count("/") != 1:
            raise FileNotFoundError(f"there is no folder {name}, and a Hub id has the form owner/name.")
        return _download(name)
    if path.is_file():
        raise FileNotFoundError(f"{model} is a file. Give the folder that it is in.")
    if not any(path.glob("checkpoint-*")) and holds_model(path):
        return path
    try:
        return find_checkpoint(path)
    except ValueError as error:
        if holds_model(path / MODEL_FOLDER):
            return path / MODEL_FOLDER
        raise FileNotFoundError(
            f"{model} holds no model: no {', no '.join(WEIGHTS)} and no whole checkpoint. Give a folder that `save_model` or a run has left."
        ) from error


def holds_model(folder: Path) -> bool:
    """Whether there are weights: an adapter, denoisers or a whole pipeline."""
    return any(any(folder.glob(name)) for name in WEIGHTS)


def base_model(folder: Path) -> str | None:
    """What a saved model was made from, by its card or its checkpoint's state; `None` if neither says so. "demo" for the shipped pipeline, wherever this package
    was installed when it was trained."""
    card, state = folder / CARD_FILE, folder / STATE_FILE
    base = None
    if card.is_file():
        base = ModelCard.load(card, ignore_metadata_errors=True).data.base_model
    if base is None and state.is_file():
        base = json.loads(state.read_text()).get("base_model")
    if isinstance(base, list):  # as a card may have it
        base = base[0] if len(base) == 1 else None
    shipped = SHIPPED_PIPELINE.parts[-4:]  # from the package's folder on
    if base is not None and PureWindowsPath(base).parts[-4:] == shipped:  # it knows both separators
        return DEMO
    return base


def is_left_by_training(folder: Path) -> bool:
    """Whether a folder that is no whole pipeline is a run, a checkpoint or a saved model."""
    files = (LORA_FILE, STATE_FILE, CONFIG_FILE, f"{MODEL_FOLDER}/{CONFIG_FILE}")
    return any((folder / name).is_file() for name in files) or any(folder.glob("checkpoint-*"))


def saved_settings(folder: Path) -> dict[str, Any]:
    """The config of the run that left a folder, flat; empty where it is not there."""
    if (folder / CONFIG_FILE).is_file():
        return json.loads((folder / CONFIG_FILE).read_text())
    if (folder / STATE_FILE).is_file():
        return json.loads((folder / STATE_FILE).read_text())["config"]
    return {}


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, ignore_patterns=list(NOT_OF_THE_MODEL)))
    except OSError as error:
        raise FileNotFoundError(
            f"there is no folder {name} here, and as a Hub id: {error} A private repository needs a token: run `hf auth login`, or set HF_TOKEN."
        ) from error


# --- checkpoints ------------------------------------------------------------------------------------------------------


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest whole one in it or (if `path` is half-written) beside it."""
    path = Path(path)
    is_checkpoint = is_checkpoint_name(path)
    problem = "there is no checkpoint-<step> in it" if path.is_dir() else "there is no such folder"
    if is_checkpoint and (problem := what_is_missing(path)) is None:
        return path
    candidates = checkpoints_in(path.parent if is_checkpoint else path)[::-1]
    problems = []
    for candidate in candidates:
        missing = what_is_missing(candidate)
        if missing is None:
            for skipped in problems:
                logger.warning("%s; resuming from %s instead", skipped, candidate)
            if is_checkpoint and not path.exists():
                logger.warning("%s does not exist; resuming from %s instead", path, candidate)
            return candidate
        problems.append(f"{candidate} is not whole ({missing})")
    raise ValueError(
        f"nothing to resume from at '{path}': "
        + ("; ".join(problems) if problems else problem)
        + ". Give a checkpoint, a folder with checkpoints, or start without resume."
    )


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, `None` if it is."""
    state_file = checkpoint / STATE_FILE
    if not state_file.is_file():
        return f"{STATE_FILE} is missing" if checkpoint.exists() else "it does not exist"
    try:
        files = json.loads(state_file.read_text())["files"]
    except (ValueError, KeyError, TypeError):  # no JSON, no text, or not an object with that key
        return f"{STATE_FILE} is cut off"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def step_of(path: Path) -> int | None:
    """The optimizer step in the name of a checkpoint."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else None


def is_checkpoint_name(path: Path) -> bool:
    return step_of(path) is not None or path.name == LAST_CHECKPOINT


def checkpoints_in(folder: Path) -> list[Path]:
    """Oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and step_of(p) is not None), key=step_of)
