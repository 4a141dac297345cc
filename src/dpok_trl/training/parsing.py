"""Settings from flags, a YAML file and a preset: `DPOKParser`, and what a training script asks for besides the configuration."""

from __future__ import annotations

import argparse
import difflib
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from dpok_trl.policy.shipped import DEMO
from dpok_trl.prompts.reading import Prompt, read_prompts
from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.presets import PRESETS, preset_values


if TYPE_CHECKING:
    from dpok_trl.training.trainer import DPOKTrainer


USER_ERROR = 2  # exit code, argparse's own
MERGE_TAG = "tag:yaml.org,2002:merge"  # of the key `<<`
# what a type is called in an error
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text (in quotes)", dict: "a mapping"}


class _EachKeyOnce(yaml.SafeLoader):
    """Of two lines with one name YAML takes the last, in silence. A key that a merge (`<<: *defaults`) brings, and that stands beside it too, is no such pair."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._flattened: set[yaml.MappingNode] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # One that was merged into another before its own turn comes twice, and the second time what it was given stands among its keys.
        if node in self._flattened:
            return
        self._flattened.add(node)
        own = [key for key, _ in node.value if key.tag != MERGE_TAG]
        super().flatten_mapping(node)
        names = [self.construct_object(key, deep=True) for key in own]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} stands in it {names.count(name)} times", node.start_mark
                )


class DPOKParser(TrlParser):
    """`trl.TrlParser` that knows presets, and says in words what is wrong with flags and file.

    A flag wins over the file of `--config`, the file over the preset, and the preset over the default of a field. The preset is the field `preset` of the
    first dataclass that has one, such as [`ScriptArguments`].

    Args:
        dataclass_types: As for `TrlParser`: `(ScriptArguments, DPOKConfig)`.
        kwargs: Of `argparse.ArgumentParser`.

    Example:

    ```python
    script, config = DPOKParser((ScriptArguments, DPOKConfig)).parse_args_and_config()
    ```
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        usage = "%(prog)s [--config FILE] [--SETTING VALUE ...]"
        super().__init__(dataclass_types, **{"allow_abbrev": False, "usage": usage, **kwargs})
        for action in self._actions:
            if action.choices is not None:  # None is the default of a field, and nothing that can be typed
                action.choices = [choice for choice in action.choices if choice is not None]
        self.add_argument("--config", metavar="FILE", help="YAML file of these settings; a flag wins over it")

    def parse_args_and_config(self, args: Iterable[str] | None = None) -> tuple[Any, ...]:  # type: ignore[override]
        """One instance of each dataclass. A mistake ends the program: one line on stderr, exit code 2."""
        try:
            return self.parse(sys.argv[1:] if args is None else list(args))
        except (ValueError, OSError) as error:
            self.exit(USER_ERROR, f"{self.prog}: error: {error}\n")

    def parse(self, args: Sequence[str]) -> tuple[Any, ...]:
        """As [`~DPOKParser.parse_args_and_config`], for a program that tells errors itself.

        Raises:
            `ValueError`: For settings that do not exist, with the nearest, and for values that they cannot take.
            `OSError`: For a file that cannot be read.
        """
        *objects, unknown = self.parse_known(args)
        if unknown:
            self.refuse_unknown(unknown)
        return tuple(objects)

    def parse_known(self, args: Sequence[str]) -> tuple[Any, ...]:
        """As [`~DPOKParser.parse`], and last a list of the arguments that are not known here."""
        file = self._file(args)
        settings = {} if file is None else self._read(file)
        self.set_defaults_with_config(**settings)
        preset = self._preset(args)
        if preset is not None:
            self.set_defaults_with_config(**{**self._preset_values(preset, args, settings), **settings})
        namespace, unknown = self.parse_known_args(list(args))
        objects = [_made(kind, namespace) for kind in self.dataclass_types]
        if file is not None and "model" not in settings and not _names(args, "--model"):
            self._refuse_no_model(file)
        return (*objects, unknown)

    def _refuse_no_model(self, file: str) -> None:
        """What somebody has written settings for is not the demo, which a script without any argument trains: a run that was made in Python leaves a
        `config.yaml` that names no model."""
        if ScriptArguments in self.dataclass_types:
            raise ValueError(
                f"{file} names no model, and neither does --model: give --model, --reward and --prompts, or write them into the file. "
                f"--model {DEMO} is the pipeline that is shipped."
            )

    def settings(self) -> list[str]:
        """Names of all settings, in their order."""
        return [item.name for kind in self.dataclass_types for item in fields(kind) if item.init]

    def refuse_unknown(self, unknown: Sequence[str], others: Sequence[str] = ()) -> NoReturn:
        """
        Args:
            unknown: Arguments that nobody took.
            others (`Sequence[str]`): Further names that could have been meant.
        """
        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        if not flags:
            raise ValueError(f"{unknown[0]!r} stands there without a setting that it belongs to.")
        name = flags[0][2:].replace("-", "_")
        raise ValueError(f"there is no setting {flags[0]}.{_nearest(name, [*self.settings(), *others], '--')}")

    def error(self, message: str) -> NoReturn:  # of argparse: without the usage of a hundred settings
        raise ValueError(message)

    def _file(self, args: Sequence[str]) -> str | None:
        """Before the others: the file may have what is required."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.error = self.error  # type: ignore[method-assign]
        first.add_argument("--config")
        return first.parse_known_args(list(args))[0].config

    def _preset(self, args: Sequence[str]) -> str | None:
        for kind in self.dataclass_types:
            if any(item.name == "preset" for item in fields(kind)):
                return _made(kind, self.parse_known_args(list(args))[0]).preset
        return None

    def _preset_values(self, preset: str, args: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Of the configuration, without what flags and file make moot."""
        config_class = next(kind for kind in self.dataclass_types if issubclass(kind, DPOKConfig))
        names = {item.name for item in fields(config_class)}
        words = {arg.split("=")[0] for arg in args}
        parsed = vars(self.parse_known_args(list(args))[0])
        flags = {action.dest: parsed[action.dest] for action in self._actions if words & set(action.option_strings)}
        given = {name: value for name, value in {**settings, **flags}.items() if name in names}
        return {name: value for name, value in preset_values(preset, given, config_class).items() if name not in given}

    def _read(self, file: str) -> dict[str, Any]:
        """The settings of a YAML file, each of the type of its field."""
        if not Path(file).is_file():
            what = "is a folder" if Path(file).is_dir() else "does not exist"
            raise FileNotFoundError(f"--config {file}: that {what}. Give a YAML file of settings.")
        try:
            content = yaml.load(Path(file).read_text(encoding="utf-8"), _EachKeyOnce)
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold settings as `name: value`, one on each line; it holds {content!r}.")
        known: dict[str, tuple[Any, Any]] = {}
        for kind in self.dataclass_types:
            hints = get_type_hints(kind)
            known.update({item.name: (hints[item.name], item.metadata) for item in fields(kind) if item.init})
        read = {}
        for name, value in content.items():
            if name not in known:
                raise ValueError(f"{file}: there is no setting {name!r}.{_nearest(str(name), list(known))}")
            hint, metadata = known[name]
            if value is False and "no" in (metadata.get("choices") or ()):
                value = "no"  # YAML reads a bare no as false
            fits, read[name] = _as_type(value, hint)
            if not fits:
                raise ValueError(f"{file}: {name} = {value!r}, but it must be {_in_words(hint)}.")
        return read


def _names(args: Iterable[str], flag: str) -> bool:
    return any(word.partition("=")[0] == flag for word in args)


def _made(kind: Any, namespace: Any) -> Any:
    return kind(**{item.name: getattr(namespace, item.name) for item in fields(kind) if item.init})


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _as_type(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value of YAML is of the type, and the value as that type. YAML reads 1e-4 as text."""
    for kind in _options(hint):
        if get_origin(kind) is list:
            rows = [_as_type(item, get_args(kind)[0]) for item in (value if isinstance(value, list) else [value])]
            if value is not None and all(fits for fits, _ in rows):
                return True, [item for _, item in rows]
        elif kind in (int, float) and isinstance(value, str):
            try:
                return True, kind(value)
            except ValueError:
                continue
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            return True, float(value)
        elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return True, value
    return False, value


def _in_words(hint: Any) -> str:
    def word(kind: Any) -> str:
        if get_origin(kind) is list:
            return f"a list, each entry {WORDS[get_args(kind)[0]]}"
        return WORDS.get(kind, "null")

    return " or ".join(word(kind) for kind in _options(hint))


def _nearest(name: str, names: Sequence[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {dashes}{near[0]}?" if near else ""


@dataclass
class ScriptArguments:
    """What a training script asks for besides [`DPOKConfig`]. For the model "demo", which is the default without a file of settings, everything else has a value
    already.

    Raises:
        `ValueError`: Without a reward or prompts for another model.
    """

    model: str = field(
        default=DEMO,
        metadata={"help": "Pipeline to tune: Hub id, folder, or 'demo' for the one that is shipped."},
    )
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or more rewards: name of a shipped one, module:function, or the address of a server. demo: demo-soft."
        },
    )
    prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts, files of them (txt, csv, json ...), names of lists, ids of datasets. demo: 'a green triangle'."
        },
    )
    eval_prompts: list[str] | None = field(
        default=None,
        metadata={"help": "Other prompts, likewise, to compare the tuned model with the pretrained one on."},
    )
    eval_reward: list[str] | None = field(
        default=None, metadata={"help": "Other rewards, likewise, for that comparison alone."}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Settings under a name; file and flags win over them. demo: demo.",
            "choices": [None, *PRESETS],
        },
    )

    def __post_init__(self) -> None:
        if self.model == DEMO:
            self.reward = self.reward or ["demo-soft"]
            self.prompts = self.prompts or ["a green triangle"]
            self.preset = self.preset or DEMO
        for name, example in (("reward", "image-reward"), ("prompts", '"A green colored rabbit."')):
            if not getattr(self, name):
                raise ValueError(f"--model {self.model} needs --{name}, such as --{name} {example}.")
        if self.eval_reward and not self.eval_prompts:
            raise ValueError("--eval_reward is of use with --eval_prompts only: give both, or neither.")

    def record(self, trainer: DPOKTrainer) -> None:
        """Lets the `config.yaml` of the run name them too, so that `--config` with that file starts the same run. Without `preset`: all that it sets stands there."""
        if trainer.run_log is not None:  # on the main process
            named = ("model", "reward", "prompts", "eval_prompts", "eval_reward")
            trainer.run_log.arguments = {name: getattr(self, name) for name in named if getattr(self, name)}

    def training_prompts(self) -> list[Prompt]:
        """(prompt, metadata) pairs, for `prompt_function`."""
        return read_prompts(self.prompts or [])

    def evaluation_prompts(self) -> dict[str, list[Prompt]] | None:
        """For `eval_prompts` of the trainer."""
        return {"held-out": read_prompts(self.eval_prompts)} if self.eval_prompts else None
