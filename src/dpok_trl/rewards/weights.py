"""Where the weights of a reward come from, and what all rewards with weights have in common.

Files are read as tensors alone (never as code), keys are strict (a model that is partly random gives scores that look like scores),
and a model that two rewards ask for is loaded once.
"""

from __future__ import annotations

import abc
import logging
import pickle
import struct
import threading
import weakref
import zipfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import refuse_videos


logger = logging.getLogger(__name__)

LISTED = 5  # keys that an error lists before it only counts
BROKEN = "is broken, or was not copied to its end"
Item = TypeVar("Item")


# ---------------------------------------------------------------- files


def find_file(weights: str | Path, filename: str, revision: str | None = None) -> Path:
    """
    The file itself: from a folder, as given, or from the Hub (which is asked only if there is no such file or folder).

    Args:
        weights (`str` or `Path`): a Hub id such as `"zai-org/ImageReward"`, a folder that holds `filename`, or the file.
        filename (`str`): its name on the Hub or in the folder.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        [`RewardError`]: if there is no such file, or it could not be downloaded.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        there = sorted(entry.name for entry in path.iterdir())
        raise RewardError(f"the folder {path} has no file {filename}; it holds {_some(there) or 'nothing'}.")
    if not _is_hub_id(str(weights)):
        raise RewardError(
            f"there is no file or folder {path}. Give a Hub id (owner/name), a folder with {filename} in it, or the file itself."
        )
    return _download(str(weights), filename, revision)


def _is_hub_id(name: str) -> bool:
    owner, _, rest = name.partition("/")
    return bool(owner and rest) and "/" not in rest and owner not in {".", "..", "~"}


def _download(repository: str, filename: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    except OSError as error:  # what the Hub refuses, a file that is not there, and no network at all
        raise RewardError(
            f"could not get {filename} of {repository}{f' at {revision}' if revision else ''} from the Hub ({error}). On a "
            "machine without network give `weights` the path of a copy."
        ) from error


def load_state_dict(weights: str | Path, filename: str, revision: str | None = None) -> dict[str, Tensor]:
    """
    The tensors of a checkpoint by their keys, on the CPU, mapped from the file where its format allows it.

    A checkpoint that keeps them one level deeper, under `"state_dict"`, is unwrapped. Arguments as in [`find_file`].

    Raises:
        [`RewardError`]: if there is no such file, it is broken, or it holds anything but tensors.
    """
    path = find_file(weights, filename, revision)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise RewardError(f"{path} {BROKEN} ({error}).") from error
    try:
        # Checkpoints from before torch 1.6 are no zip archives, and only those can be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise RewardError(f"{path} is refused: it does not hold tensors alone ({error}).") from error
    except (EOFError, RuntimeError, ValueError, LookupError, struct.error) as error:  # what torch says of half a file
        raise RewardError(f"{path} {BROKEN} ({type(error).__name__}: {error}).") from error
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise RewardError(f"{path} holds one {type(checkpoint).__name__}; a mapping of keys to tensors is needed.")
    others = [key for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if others:
        raise RewardError(f"{path} is no state dict: not tensors are {_some(others)}.")
    return dict(checkpoint)


def load_tokenizer(tokenizer_class: Any, tokenizer: str, revision: str | None = None) -> Any:
    """
    A tokenizer of the given class from a Hub id or a folder.

    Raises:
        [`RewardError`]: if there is none. (Where transformers finds no file, and there is no network, it makes a tokenizer of
            special tokens alone and says nothing: every prompt would read the same.)
    """
    try:
        made = tokenizer_class.from_pretrained(tokenizer, revision=revision)
    except OSError as error:
        raise RewardError(f"could not get the tokenizer {tokenizer}: {error}") from error
    if len(made) <= len(made.all_special_tokens):
        raise RewardError(
            f"found no vocabulary at {tokenizer}. On a machine without network give `tokenizer` a folder with the files of the tokenizer."
        )
    return made


# ---------------------------------------------------------------- models


def build(
    make: Callable[[], nn.Module], state_dict: Mapping[str, Tensor], source: str, dtype: torch.dtype
) -> nn.Module:
    """
    A model around the given tensors, in evaluation mode and frozen.

    It is made on the meta device and takes the tensors as they are: nothing is initialised only to be written over.

    Args:
        make (`Callable`): makes the model.
        state_dict (`Mapping[str, torch.Tensor]`): under the model's own keys, all of them and no other.
        source (`str`): for the error: whose weights these are.
        dtype (`torch.dtype`): of the result.

    Raises:
        [`RewardError`]: if keys are missing or unexpected, or a shape is another.
    """
    with torch.device("meta"):
        model = make()
    expected = model.state_dict()
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    check_keys(
        source,
        missing=expected.keys() - state_dict.keys(),
        unexpected=state_dict.keys() - expected.keys(),
        shapes=shapes,
    )
    model.load_state_dict(state_dict, assign=True)
    for module in model.modules():
        positions = module._buffers.get("position_ids")
        if positions is not None and positions.is_meta:  # not persistent, so in no checkpoint
            module.position_ids = torch.arange(positions.shape[-1]).expand(1, -1)
    return model.to(dtype).eval().requires_grad_(False)


def check_keys(source: str, **wrong: Sequence[str] | set[str]) -> None:
    """Raises a [`RewardError`] that counts the keys given under each heading and lists the first of them."""
    found = [f"{len(keys)} {heading} ({_some(sorted(keys))})" for heading, keys in wrong.items() if keys]
    if found:
        raise RewardError(f"the weights of {source} do not fit this model: {', '.join(found)}.")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


_loaded: weakref.WeakValueDictionary[Hashable, nn.Module] = weakref.WeakValueDictionary()
# For loading, moving and calling. One for all, since rewards share models and parts of them, a model that moves while it is called fails,
# and a tokenizer keeps the length of the last call.
in_turn = threading.RLock()


def shared(key: Hashable, load: Callable[[], nn.Module]) -> Any:
    """What `load` returned for this key, as long as anybody holds it: rewards that name the same weights share one model."""
    with in_turn:
        model = _loaded.get(key)
        if model is None:
            model = _loaded[key] = load()
        return model


# ---------------------------------------------------------------- rewards


class ModelReward(abc.ABC):
    """
    A reward that runs a network. A subclass says which (`_load`) and what the score is (`_score`).

    Args:
        weights (`str` or `Path`): a Hub id, a folder or a file.
        revision (`str`, *optional*): branch, tag or commit of the weights on the Hub. A tokenizer or another model from elsewhere is not pinned by it:
            to pin that, give a folder.
        device (`str` or `torch.device`, *optional*): where it runs. `None` is not decided: [`~ModelReward.to`] decides, or the first call, for the CPU.
        dtype (`torch.dtype`): of the network. Heads and cosines are computed in float32 whatever it is.
        batch_size (`int`): pictures (and prompts) in one forward pass.

    Nothing is loaded before the first call. Calls from several threads run one after another, with those of the other rewards with a network.
    """

    info: RewardInfo
    image_type = "pil"
    overlaps = False

    def __init__(
        self,
        weights: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        if batch_size < 1:
            raise ValueError(f"{self.info.name}: `batch_size` must be at least 1; got {batch_size}.")
        self.weights = str(weights)
        self.revision = revision
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size
        self._model: nn.Module | None = None
        self._told_of_a_cut = False

    def to(self, device: str | torch.device) -> ModelReward:
        """Where it runs from now on. What is loaded moves at once, so `.to("cpu")` frees the memory of a GPU."""
        with in_turn:
            self.device = torch.device(device)
            if self._model is not None:
                self._model.to(self.device)
        return self

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """
        Args:
            images (`Sequence[PIL.Image.Image]` of length B): pictures of any size and mode.
            prompts (`Sequence[str]` of length B).

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, on the CPU.
        """
        images, prompts = check_pictures(self.info.name, images, prompts)
        with in_turn, torch.no_grad():
            if self.device is None:
                self.device = torch.device("cpu")
            if self._model is None:
                self._model = self._load()
            self._model.to(self.device)  # another reward that shares it may have moved it
            return self._score(self._model, images, prompts).float().cpu()

    def _batched(self, function: Callable[[Sequence[Item]], Tensor], items: Sequence[Item]) -> Tensor:
        """`function` of all items, at most `batch_size` at a time."""
        size = self.batch_size
        return torch.cat([function(items[start : start + size]) for start in range(0, len(items), size)])

    def _tell_of_a_cut(self, tokenizer: Any, prompts: Sequence[str], limit: int) -> None:
        """Logs once, of the first of the prompts with more tokens than the network reads."""
        for prompt in () if self._told_of_a_cut else prompts:
            length = len(tokenizer(prompt, verbose=False)["input_ids"])
            if length > limit:
                logger.warning(
                    "%s reads the first %d tokens of a prompt; this one has %d, and what it asks for at its end is not rewarded (said once): %r",
                    self.info.name,
                    limit,
                    length,
                    prompt,
                )
                self._told_of_a_cut = True
                return

    @abc.abstractmethod
    def _load(self) -> nn.Module:
        """The network, frozen, on any device; through [`shared`], so that rewards can share it."""

    @abc.abstractmethod
    def _score(self, model: Any, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """One score for each picture, on any device. Called under `no_grad` with the network on `self.device`."""


def check_pictures(name: str, images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[list, list]:
    """Both as lists, if they are equally many (and at least one) pictures and prompts."""
    images, prompts = list(images), list(prompts)
    if len(images) != len(prompts) or not images:
        raise ValueError(
            f"{name} needs one prompt for each picture, and at least one; got {len(images)} pictures and {len(prompts)} prompts."
        )
    refuse_videos(name, images)
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(f"{name} scores PIL pictures; got an object of type {type(image).__name__} among them.")
    return images, prompts
