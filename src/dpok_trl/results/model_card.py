"""The model card: what was trained on what, by which reward, how far it got, and how to use it. Only what was measured stands on it."""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    metadata_load,
    try_to_load_from_cache,
)
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dpok_trl.core.gaussian import Reduction
from dpok_trl.results import card_text
from dpok_trl.results.curves import draw_curves
from dpok_trl.results.evaluation_files import GRID_FILE, JSON_FILE
from dpok_trl.results.pictures import SMALLEST_CELL, fit_cell
from dpok_trl.results.provenance import command_line, git_commit, public_settings, versions
from dpok_trl.results.runlog import METRICS_FILE, read_metrics
from dpok_trl.results.samples import read_samples, sampled_epochs
from dpok_trl.rewards.info import RewardInfo


CARD_FILE, CONFIG_FILE = "README.md", "dpok_config.json"
PICTURES = "card"  # the folder of the card's own pictures: `samples` of a run's folder is the run's
GALLERY = 8  # pictures in it at most
LOCAL = "path/to/"  # before the name of a folder, in code: where it lies is nobody else's business
DIGITS = 6  # of a mean reward in the Hub's table, which shows what it is given


@dataclass(frozen=True)
class TrainedReward:
    """A reward of the run: its name, its weight in the sum, and what a shipped one says of itself."""

    name: str
    weight: float
    info: RewardInfo | None


@dataclass(frozen=True)
class RunFacts:
    """What a run knows of itself and its model card tells.

    Args:
        pipeline (`str`): Name of its class.
        base_model (`str`, *optional*): Where it was loaded from: a Hub id, or a folder, of which the card says nothing.
        task (`str`): `"text-to-image"`, `"image-to-image"`, `"text-to-video"` or `"image-to-video"`.
        full (`bool`): Whether the model is a whole pipeline, and not an adapter.
        trained (`str`): In words, what of the pipeline was trained.
        objective (`str`): A key of [`~dpok_trl.results.card_text.METHODS`].
        kl (`str`, *optional*): In words, the KL term; `None` without one.
        reduction (`"mean"` or `"sum"`): Of the KL in the metrics.
        loading_code (`Callable[[str, str], str]`): From the base model and the repository, the lines of Python that load it.
        call (`dict`): Arguments of the pipeline's call, the same for all images.
        call_columns (`Sequence[str]`): Names of those that come with each prompt.
        prompts (`Sequence[str]`, *optional*): That it was trained on; `None` if a function made them.
        rewards (`Sequence[TrainedReward]`)
        settings (`dict`): The config, flat. Private ones are left out here.
        epochs, updates (`int`): Done so far.
        images (`int`, *optional*): Drawn so far, or of the dataset.
        seconds (`float`): Of training.
        hardware (`str`): Device, number of processes and precision.
        run_folder (`Path`): With `metrics.jsonl` and `samples`.
        evaluation_folder (`Path`): With the newest evaluation, if there was one.
    """

    pipeline: str
    base_model: str | None
    task: str
    full: bool
    trained: str
    objective: str
    kl: str | None
    reduction: Reduction
    loading_code: Callable[[str, str], str]
    call: dict[str, Any]
    call_columns: Sequence[str]
    prompts: Sequence[str] | None
    rewards: Sequence[TrainedReward]
    settings: dict[str, Any]
    epochs: int
    updates: int
    images: int | None
    seconds: float
    hardware: str
    run_folder: Path
    evaluation_folder: Path

    @property
    def supervised(self) -> bool:
        return self.objective in card_text.SUPERVISED


@dataclass(frozen=True)
class Evaluated:
    """The newest evaluation of a run, as it is in the file, and when it was made."""

    epoch: int
    step: int
    sets: dict[str, Any]
    over_optimised: bool


def write_model_card(
    folder: str | Path,
    facts: RunFacts,
    *,
    model_name: str,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    online: bool = False,
) -> None:
    """Writes `README.md`, the pictures in it (`card/*.png`) and `dpok_config.json` into `folder`. A card that is there is replaced.

    Args:
        facts ([`RunFacts`])
        model_name (`str`): The repository with its owner, or the name of a folder, which the code on the card looks for under `path/to/`.
        dataset_name (`str`, *optional*): A dataset of the Hub that the prompts are from.
        tags (`Sequence[str]`): Beside those that every card has.
        online (`bool`): Whether the Hub may be asked for the base model's licence, where neither the cache nor its folder has it.
    """
    folder = Path(folder)
    metrics = _metrics(facts)
    evaluation = newest_evaluation(facts.evaluation_folder, metrics)
    base = hub_id(facts.base_model)
    place = model_name if "/" in model_name else f"{LOCAL}{model_name}"  # a bare name is a folder somewhere
    licence = base_licence(facts.base_model, online)
    pictures, gallery = _put_pictures(folder, facts, metrics, evaluation)
    data = _front_matter(facts, model_name, base, licence, dataset_name, tags, gallery, evaluation)
    settings = json.dumps(public_settings(facts.settings), indent=2, default=str, ensure_ascii=False)
    environment = Environment(
        loader=PackageLoader("dpok_trl.results"),
        autoescape=False,  # it is Markdown: `plain` takes out what would be markup
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = card_text.plain
    tables, notes = card_text.scores(facts.rewards, evaluation) if evaluation else ([], [])
    text = environment.get_template("model_card.md.j2").render(
        front_matter=data.to_yaml(),
        model_name=model_name,
        facts=facts,
        evaluation=evaluation,
        summary=card_text.summary(facts, base),
        widget=gallery,
        snippet=_snippet(facts, base, place),
        one_liner=_one_liner(facts, base, place),
        score_tables=tables,
        score_notes=notes,
        training_table=card_text.training_table(facts, metrics, evaluation),
        prompts=None if facts.prompts is None else list(dict.fromkeys(facts.prompts)),
        rewards_table=card_text.rewards_table(facts.rewards),
        command=command_line(),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        commit=git_commit(),
        settings=settings,
        limits=card_text.limits(facts, evaluation),
        licence=card_text.licence(licence, base, facts),
        **pictures,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD_FILE).write_text(str(ModelCard(text)), encoding="utf-8")  # it reads the front matter back
    (folder / CONFIG_FILE).write_text(settings, encoding="utf-8")


# --- where it comes from ----------------------------------------------------------------------------------------------


def hub_id(base_model: str | None) -> str | None:
    """`base_model` if it is a repository of the Hub; `None` for a folder of this machine."""
    if base_model is None or Path(base_model).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base_model):
        return None
    return base_model


def base_licence(base_model: str | None, online: bool = False) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the base model's card has them: from its folder or the Hub's cache, or else from the Hub. Empty where
    it cannot be read or states none; never guessed."""
    if base_model is None:
        return {}
    card: Path | None = Path(base_model) / CARD_FILE
    repository = hub_id(base_model)
    if repository is not None:
        cached = try_to_load_from_cache(repository, CARD_FILE)
        card = Path(cached) if isinstance(cached, str) else None
        if card is None and online:
            try:
                card = Path(hf_hub_download(repository, CARD_FILE))
            except OSError:  # no network, no such file, no access: the card says that it could not be read
                return {}
    if card is None or not card.is_file():
        return {}
    try:
        data = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):  # somebody else's card, with a front matter that is none
        return {}
    names = ("license", "license_name", "license_link")
    return {name: data[name] for name in names if isinstance(data.get(name), str)} if "license" in data else {}


def _metrics(facts: RunFacts) -> list[dict[str, Any]]:
    """What the run has logged. Before its first epoch the folder may hold another run's."""
    if facts.epochs == 0 or not (facts.run_folder / METRICS_FILE).exists():
        return []
    return read_metrics(facts.run_folder)


def newest_evaluation(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> Evaluated | None:
    """The evaluation in a folder, if its numbers are among those that the run has logged. Others are of a future that the run went back behind, when it was
    resumed from an earlier checkpoint."""
    if not (folder / JSON_FILE).exists():
        return None
    sets = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))["sets"]
    numbers = {f"eval/{name}/kl": one["path_kl"]["mean"] for name, one in sets.items()}
    for name, one in sets.items():
        for reward, found in one["rewards"].items():
            numbers |= {f"eval/{name}/{reward}/{part}": found[part]["mean"] for part in ("base", "tuned")}
    finite = {name: number for name, number in numbers.items() if number is not None}
    for line in reversed(metrics):
        if all(line.get(name) == number for name, number in finite.items()):
            return Evaluated(line["epoch"], line["step"], sets, line.get("eval/over_optimisation", 0.0) > 0)
    return None


# --- pictures ---------------------------------------------------------------------------------------------------------


def _put_pictures(
    folder: Path, facts: RunFacts, metrics: Sequence[dict[str, Any]], evaluation: Evaluated | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Puts the card's pictures into its folder. Returns what the template wants to know of them, and the entries of the gallery."""
    target = folder / PICTURES
    target.mkdir(parents=True, exist_ok=True)
    for pattern in ("sample-*.png", "curves.png", "before-after.png", "samples.png"):
        for picture in target.glob(pattern):
            picture.unlink()  # of the card before
    found: dict[str, Any] = dict.fromkeys(("comparison_picture", "grid_picture", "grid_epoch", "curves_picture"))
    samples: list[tuple[str, Image.Image]] = []
    epochs = [epoch for epoch in sampled_epochs(facts.run_folder) if epoch < facts.epochs]  # others are another run's
    if evaluation is not None:
        shutil.copyfile(facts.evaluation_folder / GRID_FILE, target / "before-after.png")
        found["comparison_picture"] = f"{PICTURES}/before-after.png"
        for one in evaluation.sets.values():
            for file, row in one["samples"].items():
                samples.append((one["prompts"][row], Image.open(facts.evaluation_folder / file)))
    elif epochs:
        shutil.copyfile(facts.run_folder / "samples" / f"epoch-{epochs[-1]:04d}.png", target / "samples.png")
        found |= {"grid_picture": f"{PICTURES}/samples.png", "grid_epoch": epochs[-1]}
        samples = [(row["prompt"], row["image"]) for row in read_samples(facts.run_folder, epochs[-1])]
    gallery = []
    for number, (prompt, picture) in enumerate(samples[:GALLERY]):
        place = f"{PICTURES}/sample-{number}.png"
        enlarged(picture).save(folder / place)
        gallery.append({"text": prompt, "output": {"url": place}})
    if any("reward" in line for line in metrics):
        (target / "curves.png").write_bytes(draw_curves(metrics, facts.reduction))
        found["curves_picture"] = f"{PICTURES}/curves.png"
    if not any(target.iterdir()):
        target.rmdir()
    return found, gallery


def enlarged(picture: Image.Image) -> Image.Image:
    """A tiny picture with its pixels as squares: a gallery would blur it."""
    return picture if max(picture.size) >= SMALLEST_CELL else fit_cell(picture)


# --- front matter and code --------------------------------------------------------------------------------------------


def _front_matter(
    facts: RunFacts,
    model_name: str,
    base: str | None,
    licence: Mapping[str, str],
    dataset_name: str | None,
    tags: Sequence[str],
    gallery: list[dict[str, Any]],
    evaluation: Evaluated | None,
) -> ModelCardData:
    kinds = ["diffusers-training", *([] if facts.full else ["lora", "template:sd-lora"])]
    learned = [] if facts.supervised else ["reinforcement-learning"]
    prompts = list(dict.fromkeys(facts.prompts or []))
    results = [] if evaluation is None else eval_results(facts.task, evaluation.sets)
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune" if facts.full else "adapter",
        library_name="diffusers",
        pipeline_tag=facts.task,
        instance_prompt=prompts[0] if len(prompts) == 1 else None,
        widget=gallery or None,
        datasets=dataset_name,
        tags=[facts.task, "diffusers", *kinds, *learned, "trl", *tags],
        model_name=model_name if results else None,  # the results' alone
        eval_results=results or None,
        **licence,
    )


def eval_results(task: str, sets: Mapping[str, Any]) -> list[EvalResult]:
    """Mean rewards of the pretrained and of the tuned model on every set, for the Hub's table of results. What is not finite is left out."""
    results = []
    for name, one in sets.items():
        prompts = one["images"] // one["images_per_prompt"]
        for reward, found in one["rewards"].items():
            for part, label in (("base", "pretrained"), ("tuned", "tuned")):
                if found[part]["mean"] is not None:
                    results.append(
                        EvalResult(
                            task_type=task,
                            dataset_type="prompts",
                            dataset_name=f"{name} ({prompts} prompt{'s' if prompts > 1 else ''}, {one['images']} image{'s' if one['images'] > 1 else ''})",
                            dataset_split=name,
                            metric_type=reward,
                            metric_name=f"{reward}, {label}",
                            metric_value=float(f"{found[part]['mean']:.{DIGITS}g}"),
                        )
                    )
    return results


def _snippet(facts: RunFacts, base: str | None, repository: str) -> str:
    """Python that loads the model into a stock pipeline and draws an image with the settings of the training."""
    prompt = facts.prompts[0] if facts.prompts else "a prompt"
    arguments = [json.dumps(prompt, ensure_ascii=False)]
    arguments += [f"{name}={name}" for name in facts.call_columns]
    arguments += [f"{name}={value!r}" for name, value in facts.call.items() if _is_literal(value)]
    output = "frames" if facts.task.endswith("video") else "images"
    lines = facts.loading_code(base or f"path/to/the/{facts.pipeline}", repository)
    return f"{lines}\n{output.removesuffix('s')} = pipe({', '.join(arguments)}).{output}[0]"


def _one_liner(facts: RunFacts, base: str | None, repository: str) -> str:
    given = "" if base or facts.full else f', base="path/to/the/{facts.pipeline}"'
    return f'dpok_trl.load_tuned("{repository}"{given})'


def _is_literal(value: Any) -> bool:
    """Whether Python reads back what it prints; of NaN and infinity it does not."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False
