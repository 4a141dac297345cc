"""Rewards by name."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dpok_trl.rewards.info import RewardInfo


# name -> module and attribute; a class is made without arguments
SHIPPED = {
    "image-reward": "dpok_trl.rewards.image_reward:ImageReward",
    "hpsv2.1": "dpok_trl.rewards.hps:HPSv21",
    "hpsv2": "dpok_trl.rewards.hps:HPSv2",
    "pickscore": "dpok_trl.rewards.clip:PickScore",
    "clip-score": "dpok_trl.rewards.clip:CLIPScore",
    "aesthetic": "dpok_trl.rewards.aesthetic:Aesthetic",
    "jpeg-compressibility": "dpok_trl.rewards.jpeg:JpegCompressibility",
    "jpeg-incompressibility": "dpok_trl.rewards.jpeg:JpegIncompressibility",
    "ocr": "dpok_trl.rewards.ocr:OCRReward",
    "diversity": "dpok_trl.rewards.diversity:PairwiseDiversity",
    "demo-exact": "dpok_trl.rewards.demo:DemoExact",
    "demo-soft": "dpok_trl.rewards.demo:DemoSoft",
    "demo-greenness": "dpok_trl.rewards.demo:DemoGreenness",
}


# What needs an environment of its own.
SERVED = ("hpsv3", "geneval")


def load_reward(reward: Any, **kwargs: Any) -> Callable[..., Any]:
    """A reward function from what a user may write.

    Args:
        reward: A function, as it is; the name of a shipped reward; `"module:function"`; the address of a server, `"http://..."`.
        kwargs: Of the constructor of a shipped reward or the client (`device`, `weights`, `revision` ...).

    Raises:
        `ValueError`: For an unknown name, with the nearest one, and for a module or function that is not there.
    """
    if not isinstance(reward, str):
        return reward
    scheme, separator, rest = reward.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        from dpok_trl.rewards.remote import RemoteReward

        return RemoteReward(f"{scheme.lower()}://{rest}", **kwargs)
    if reward in SHIPPED:
        return _attribute(SHIPPED[reward])(**kwargs)
    _refuse_half_an_address(reward)
    if ":" in reward:
        found = _attribute(reward)
        if isinstance(found, type):
            found = found(**kwargs)
        elif kwargs:
            raise ValueError(
                f"'{reward}' is a function and takes no {', '.join(kwargs)}; only classes are made with arguments."
            )
        if not callable(found):
            raise ValueError(f"'{reward}' is {found!r} of type {type(found).__name__}: a reward is something to call.")
        return found
    close = difflib.get_close_matches(reward.lower(), SHIPPED, n=1, cutoff=0.4)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    if reward.lower() in SERVED:
        hint = " It runs in an environment of its own, behind an address: docs/remote-rewards.md has its server."
    module, dot, name = reward.rpartition(".")
    if dot and all(part.isidentifier() for part in reward.split(".")):
        hint = f" For a function of yours write '{module}:{name}', with a colon."
    raise ValueError(
        f"there is no reward named '{reward}'.{hint} There are: {', '.join(SHIPPED)}; 'module:function' and 'http://...' work too."
    )


def load_on_device(name: str, device: str | None, default: str | None = None) -> Callable[..., Any]:
    """
    A reward for a command, on its device. The module of `module:function` may lie in the current folder.

    Args:
        name (`str`): As [`load_reward`] takes it.
        device (`str`, *optional*): The one that was asked for.
        default (`str`, *optional*): Where a reward that can be moved goes if none was.

    Raises:
        `ValueError`: If there is no such reward, or it cannot be moved to the device that was asked for.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    reward = load_reward(name)
    if callable(getattr(reward, "to", None)):
        if device or default:
            _refuse_no_device(device or default)
            reward.to(device or default)
    elif device is not None:
        raise ValueError(f"{name} has no method `to`, so --device {device} would do nothing: leave it away.")
    return reward


def shipped_rewards() -> list[RewardInfo]:
    """What the shipped rewards say of themselves; loads no weights."""
    return [_attribute(place).info for place in SHIPPED.values()]


def _refuse_no_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        raise ValueError(
            f"'{device}' is no device of this machine ({error}). There is cpu, or cuda, cuda:1 with a GPU."
        ) from error


def _refuse_half_an_address(reward: str) -> None:
    """An address that is written wrongly has a colon too, and would be looked for among the modules."""
    scheme = re.match(r"(https?):/*", reward, re.IGNORECASE)
    port = re.match(r"[^:/]+:\d+(/|$)", reward)
    if scheme or port:
        meant = f"{scheme[1].lower()}://{reward[scheme.end() :]}" if scheme else f"http://{reward}"
        raise ValueError(
            f"'{reward}' is no address: that of a server begins with http:// or https://, as in '{meant}'."
        )


def _attribute(place: str) -> Any:
    module_name, _, name = place.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ValueError(f"'{place}' is no module and function: write 'module:function', as in 'mine:sharpness'.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise  # something that the module itself needs
        raise ValueError(f"there is no module '{module_name}' (of '{place}'); is it on PYTHONPATH?") from error
    except SyntaxError as error:
        raise ValueError(f"the module '{module_name}' is no Python: {error}.") from error
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"the module '{module_name}' has no '{name}'.{hint}")
    return getattr(module, name)
