"""The documentation against the code: settings, metrics, names, links and examples."""

import ast
import builtins
import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny import stable_diffusion

import dpok_trl
from dpok_trl import DPOKConfig, DPOKSFTConfig, DPOKTrainer
from dpok_trl.policy.schedulers import _NOT_MARKOV, _READERS, _WALKED_ON
from dpok_trl.results.runlog import read_metrics


REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))

# What TRL v0.23's DDPOConfig does not have; tests/training/test_config.py holds the others to it.
NEW_FIELDS = {
    "reward_weight",
    "train_adv_scale",
    "train_keep_best",
    "train_keep_worst",
    "train_kl_threshold",
    "train_buffer_rounds",
    "kl_gradient",
    "kl_warmup_epochs",
    "target_kl",
    "reference_update_epochs",
    "value_input",
    "value_learning_rate",
    "value_batch_size",
    "value_num_updates",
    "value_gradient_accumulation_steps",
    "value_scale_targets",
    "value_warmup_epochs",
    "output_dir",
    "model_dtype",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "sample_grid_freq",
    "sample_num_images_per_prompt",
    "sample_transition",
    "sample_noise_level",
    "sample_min_std",
    "sample_fp32_latents",
    "sample_sde_window_size",
    "sample_sde_window_schedule",
    "sample_sde_window_start",
    "sample_sde_window_interval",
    "sample_vae_slicing",
    "sample_vae_tiling",
    "sample_offload_encoders",
    "sample_call_columns",
    "sample_call_kwargs",
    "sample_weight_column",
    "sample_category_column",
    "reward_weights",
    "reward_aggregation",
    "reward_on_error",
    "reward_offload",
    "train_adv_type",
    "train_lr_scheduler",
    "train_lr_warmup_steps",
    "train_timesteps_per_update",
    "train_objective",
    "train_log_prob_reduction",
    "train_mixed_timesteps",
    "train_reanchor",
    "train_gradient_checkpointing",
    "train_use_lora",
    "train_text_encoder",
    "train_lora_rank",
    "train_lora_alpha",
    "kl_weight",
    "kl_type",
    "metric_for_best_model",
    "greater_is_better",
    "log_gradient_cosine_freq",
    "eval_freq",
    "eval_num_images_per_prompt",
    "eval_batch_size",
    "eval_num_steps",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
}
OTHER_DEFAULT = {"mixed_precision", "tracker_project_name"}


def text_of(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def tables(text: str, first_header: str) -> dict[str, list[str]]:
    """The rows of all tables whose first column has this header: the name in the first cell -> the other cells."""
    rows: dict[str, list[str]] = {}
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == first_header:
            inside = True
        elif inside and not set(cells[0]) <= {"-", ":"}:
            name = cells[0].strip("`")
            assert name not in rows, f"{name} is documented twice"
            rows[name] = cells[1:]
    return rows


def section(text: str, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons, and remembers mixed precision in the environment."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def forget():
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()

    forget()
    yield
    forget()


# --- settings ---------------------------------------------------------------------------------------------------------


SETTINGS = tables(text_of("configuration"), "field")


def test_every_setting_is_documented_and_in_the_order_of_the_source():
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(DPOKConfig)]


@pytest.mark.parametrize("field", dataclasses.fields(DPOKConfig), ids=lambda field: field.name)
def test_type_default_and_origin_of_a_setting(field):
    kind, default, origin, meaning = SETTINGS[field.name]
    assert kind == " or ".join(f"`{name}`" for name in DPOKConfig.__annotations__[field.name].split(" | "))
    if field.name == "exp_name":
        assert default == "name of the script, without `.py`"
    else:
        expected = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        written = ast.literal_eval(default.strip("`"))
        assert (written, type(written)) == (expected, type(expected))
    known = "default" if field.name in OTHER_DEFAULT else "same"
    assert origin == ("new" if field.name in NEW_FIELDS else known)
    for choice in field.metadata.get("choices", ()):
        assert choice is None or f"`{choice}`" in meaning


def test_settings_named_anywhere_exist():
    """A word in backticks that looks like a setting is one, or a choice of one, or a metric."""
    names = {field.name for field in dataclasses.fields(DPOKSFTConfig)}
    names |= {choice for field in dataclasses.fields(DPOKSFTConfig) for choice in field.metadata.get("choices", ())}
    names |= set(tables(text_of("metrics"), "metric")) | {"kl_o"}  # a metric of supervised training
    names |= {"train_dataloader"}  # an argument of transformers' callbacks
    for page in PAGES:
        words = re.findall(r"`((?:sample|train|kl|hub|per_prompt)_\w+)(?==|`)", page.read_text(encoding="utf-8"))
        assert set(words) <= names, page.name


@pytest.mark.parametrize("page", ["how-it-works", "configuration"])
def test_the_unit_of_the_clip_range(page):
    # latents of 4 channels at an eighth of the image's size
    for size, nats in ((512, "1.64"), (1024, "6.55")):
        dimensions = 4 * (size // 8) ** 2
        assert f"{1e-4 * dimensions:.2f}" == nats
        assert str(dimensions) in text_of(page)
        assert nats in text_of(page)


# --- metrics ----------------------------------------------------------------------------------------------------------


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def test_the_metrics_of_settings_are_those_of_a_run(tmp_path):
    config = DPOKConfig(
        output_dir=str(tmp_path),
        num_epochs=1,
        save_freq=0,
        sample_num_steps=2,
        sample_guidance_scale=1.0,
        sample_num_batches_per_epoch=1,
        sample_batch_size=2,
        train_batch_size=2,
        train_objective="kl_mask",
        train_adv_type="value",
        value_batch_size=2,
    )
    DPOKTrainer(config, brightness, ["a cat"], stable_diffusion()).train()
    lines = read_metrics(tmp_path)
    written = {name for line in lines for name in line}
    documented = tables(text_of("metrics"), "metric"), tables(text_of("metrics"), "metric of a setting")
    assert written - {re.sub("<name>", "brightness", name) for name in documented[0]} == set(documented[1])
    assert "policy/clip_fraction" not in written
    # The lines that the page says they are in.
    assert all("value/loss" in line and "kl_path" in line for line in lines if "time/update" in line)
    assert all("value/explained_variance" in line for line in lines if "reward" in line)


def test_the_documented_metrics_are_those_of_a_run(tmp_path):
    config = DPOKConfig(
        output_dir=str(tmp_path),
        num_epochs=1,
        save_freq=0,
        sample_grid_freq=0,
        sample_num_steps=2,
        sample_guidance_scale=1.0,
        sample_num_batches_per_epoch=1,
        sample_batch_size=2,
        train_batch_size=2,
        kl_weight=0.02,
        sample_category_column="kind",
        log_gradient_cosine_freq=1,
    )
    prompts = [(prompt, {"kind": "an animal"}) for prompt in ("a cat", "a dog")]
    DPOKTrainer(config, brightness, prompts, stable_diffusion()).train()
    lines = read_metrics(tmp_path)
    written = {re.sub(r"^rewards/\w+/", "rewards/<name>/", name) for line in lines for name in line}
    written = {re.sub(r"^reward/.+", "reward/<category>", name) for name in written}
    assert set(tables(text_of("metrics"), "metric")) == written
    # The three kinds of lines that the page tells of, and the step they say.
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert ["reward" in line for line in lines] == [True, False, False]
    assert ["loss" in line for line in lines] == [False, True, False]
    assert ["time/update" in line for line in lines] == [False, False, True]
    # "0 on the first update of every epoch"
    assert lines[1]["policy/ratio_mean"] == 1.0
    assert [lines[1][f"policy/{name}"] for name in ("ratio_deviation_max", "clip_fraction", "approx_kl")] == [0, 0, 0]
    assert lines[1]["kl"] == 0.0  # and of a run with a fresh adapter


def test_renamed_metrics_of_ddpo_lead_to_documented_ones():
    rows = tables(section(text_of("migrating-from-ddpo"), "Metrics"), "TRL v0.23")
    documented = set(tables(text_of("metrics"), "metric"))
    new_names = {name for cells in rows.values() for name in re.findall(r"^`([\w/]+)`$", cells[0])}
    assert new_names == {"reward", "reward_std", "policy/approx_kl", "policy/clip_fraction"}
    assert new_names <= documented


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: (dpok_trl[\w.]+)\.(\w+)$", text_of("api"), re.M)
    assert {name: module for module, name in shown} == dpok_trl._MODULE_OF


def test_the_schedulers_that_work_are_those_that_can_be_read():
    table = re.search(r"^### Schedulers\n(.*?)^## ", text_of("how-it-works"), re.S | re.M)[1]
    named = set(re.findall(r"`(\w+Scheduler)`", "\n".join(line for line in table.splitlines() if line[:1] == "|")))
    parallel = {name for name in _READERS if "Parallel" in name}
    assert named == set(_READERS) - parallel
    assert {name.replace("Parallel", "") for name in parallel} == {"DDIMScheduler", "DDPMScheduler"}


def test_the_refused_schedulers_are_named():
    refused = section(text_of("how-it-works"), "What is refused")
    for name in _NOT_MARKOV.keys() - _WALKED_ON.keys():
        family = re.match(r"(?:FlowMatch)?(IPNDM|Heun|KDPM2|DPMSolverSDE|SASolver)", name)[1]
        assert re.search(rf"\b{family}\b", refused), name


def test_the_schedulers_that_are_walked_as_another_are_named():
    schedulers = re.search(r"^### Schedulers\n(.*?)^## ", text_of("how-it-works"), re.S | re.M)[1]
    for name, (replacement, _) in _WALKED_ON.items():
        assert re.search(
            rf"`{name}`.*`{replacement.__name__}`|`{replacement.__name__}` for `{name}`", schedulers, re.S
        )


def test_methods_of_the_trainer_exist():
    rows = tables(section(text_of("migrating-from-ddpo"), "Trainer"), "TRL v0.23")
    for old, (here, *_) in rows.items():
        if here.startswith("gone"):
            continue
        for name in re.findall(r"`(\w+)\(", f"`{old}` {here}"):
            assert callable(getattr(DPOKTrainer, name, None)), f"{old}: {here}"
    gone = [
        name for old, (here, *_) in rows.items() if here.startswith("gone") for name in re.findall(r"\b_?\w+", old)
    ]
    assert {"from_pretrained", "_config_check"} <= set(gone)
    assert not [name for name in gone if hasattr(DPOKTrainer, name)]


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown and GitHub both make them of plain headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    pages = [
        page for part in config["nav"] for entries in part.values() for entry in entries for page in entry.values()
    ]
    assert sorted(pages) == [page.name for page in PAGES]
    for file in [*config["extra_css"], *(Path(hook).name for hook in config["hooks"])]:
        assert (DOCS / file).is_file()


def test_the_first_page_is_a_map_of_all():
    linked = set(re.findall(r"^\| \[[^]]+\]\(([\w-]+\.md)\)", section(text_of("index"), "Where to read on"), re.M))
    assert linked == {page.name for page in PAGES} - {"index.md"}


def test_the_picture_of_the_loop_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import draw_loop

    assert draw_loop.picture() == (DOCS / "images" / "loop.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(draw_loop.picture())


def test_the_metrics_of_troubleshooting_exist():
    documented = {
        name
        for first in ("metric", "metric of a setting", "evaluation metric")
        for name in tables(text_of("metrics"), first)
    }
    documented |= {f"gradient/{name}" for name in ("prompts", "cosine_mean", "cosine_min", "norm_ratio")}
    for page in ("troubleshooting", "faq"):
        named = set(re.findall(r"`((?:policy|rewards|value|time|eval|gradient)/[\w/<>]+)`", text_of(page)))
        assert named <= documented, named - documented
        assert page == "faq" or len(named) > 8


def test_what_troubleshooting_quotes_is_said_somewhere():
    """Its exceptions exist, and the symptoms of its headings are all there."""
    text = text_of("troubleshooting")
    for name in re.findall(r"`(\w+Error)`", text):
        assert name in dpok_trl.__all__ or hasattr(builtins, name), name
    assert len(re.findall(r"^## ", text, re.M)) == 12


def test_the_memory_that_the_questions_name_is_that_of_the_table():
    sizes = [row.split("|")[-2].strip() for row in text_of("configuration").splitlines() if "10⁹ |" in row]
    assert len(sizes) == 3
    answer = section(text_of("faq"), r"Which GPU do I need\?")
    assert all(re.search(rf"\b{re.escape(size)}\b", answer) for size in sizes)


def test_files_named_in_the_docs_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:benchmarks|examples|tests|src)/[\w./-]+)`", page.read_text(encoding="utf-8")):
            assert (REPOSITORY / path).exists(), f"{page.name} names {path}"


# --- README ---------------------------------------------------------------------------------------------------------


def test_the_readme_is_finished():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\(((?:docs|CHANGELOG)[^)#]*)\)", text):
        assert (REPOSITORY / target).exists(), target


def test_the_readme_counts_pipelines_as_the_scan_does():
    told = re.search(
        r"of the (\d+) classes of diffusers that take a prompt (\d+) pass", (REPOSITORY / "README.md").read_text()
    )
    counted = re.search(r"\d+ classes, (\d+) take a prompt; of these (\d+) pass", text_of("pipelines"))
    assert told.groups() == counted.groups()
