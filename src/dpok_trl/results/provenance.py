"""Where a result comes from: versions, machine, command and commit; told in a way that gives nothing away of the machine's folders or of secrets."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from dpok_trl import __version__


PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl")

# Paths of the machine, and arguments that may hold names, tokens or addresses: not for a public repository.
PRIVATE_SETTINGS = ("output_dir", "logdir", "resume_from", "tracker_kwargs", "accelerator_kwargs", "project_kwargs")

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")  # of the Hub
SECRET = re.compile(rf"{TOKEN.pattern}|token|secret|passw|api.?key", re.IGNORECASE)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    others = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"dpok-trl": __version__, **others, "Python": platform.python_version()}


def machine(device: torch.device) -> str:
    """The name of a GPU, or the CPU with torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config without what is nobody else's business: [`PRIVATE_SETTINGS`], absolute paths, and what looks like a secret."""
    return {
        name: value
        for name, value in settings.items()
        if name.split("/")[0] not in PRIVATE_SETTINGS
        and not SECRET.search(name)
        and not any(_is_private(part) for part in (value if isinstance(value, (list, tuple)) else [value]))
    }


def command_line(arguments: Sequence[str] | None = None) -> str | None:
    """What was typed for this run, as far as it is for everybody: options of [`PRIVATE_SETTINGS`] are left out, of absolute paths only the last part is told,
    secrets and hosts are stars. `None` in a notebook and at a prompt, where nothing was typed.

    Args:
        arguments (`Sequence[str]`, *optional*): Default: `sys.argv`.
    """
    program, *words = sys.argv if arguments is None else arguments
    if program in ("", "-c") or Path(program).name == "ipykernel_launcher.py":
        return None
    shown = [Path(program).name]
    if program.endswith(".py"):
        shown.insert(0, "python")
    before = ""  # the option whose value may come next
    for word in words:
        option, equals, value = word.partition("=")
        if not word.startswith("--"):
            if not _left_out(before):
                shown.append("***" if SECRET.search(before) else public_word(word))
            before = ""
            continue
        if not _left_out(option):
            shown.append(f"{option}={'***' if SECRET.search(option) else public_word(value)}" if equals else option)
        before = "" if equals else option
    return " ".join("***" if word == "***" else shlex.quote(word) for word in shown)


def public_model(source: str) -> str:
    """Where a model was loaded from, as everybody may see it: a Hub id, the last part of a folder, or in words the pipeline that this package ships."""
    if Path(source).is_relative_to(Path(__file__).parents[1]):
        return "the shipped demo pipeline"
    return Path(source).resolve().name if Path(source).is_dir() else public_word(source)


def git_commit() -> str | None:
    """The commit of the folder that the run was started in, and whether files differ from it; `None` where there is none to tell."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None
    return f"{commit}, with uncommitted changes" if changes else commit


def _left_out(option: str) -> bool:
    return option.removeprefix("--").replace("-", "_") in PRIVATE_SETTINGS


def public_word(word: str) -> str:
    """An argument as everybody may see it."""
    scheme, separator, _ = word.partition("://")
    if separator:
        return f"{scheme}://***"
    if _is_path(word):
        return PureWindowsPath(word).name or "***"  # it knows both separators
    return "***" if SECRET.search(word) and " " not in word else word


def _is_private(value: Any) -> bool:
    return isinstance(value, str) and (_is_path(value) or "://" in value or bool(TOKEN.search(value)))


def _is_path(word: str) -> bool:
    return bool(re.match(r"/|~|[A-Za-z]:[\\/]", word))
