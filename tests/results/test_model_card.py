"""The card: its front matter read back by huggingface_hub, its sections, its numbers, and what must not stand on it."""

import dataclasses
import json
import re

import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image

from dpok_trl.demo import demo_pipeline_path
from dpok_trl.results import model_card
from dpok_trl.results.card_text import METHODS, plain
from dpok_trl.results.hub import card_for
from dpok_trl.results.model_card import RunFacts, TrainedReward, base_licence, hub_id, write_model_card
from dpok_trl.results.provenance import command_line, git_commit, public_model, public_settings, versions
from dpok_trl.results.runlog import RunLog, read_metrics
from dpok_trl.results.samples import Samples, write_samples
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.registry import SHIPPED, shipped_rewards


SIX_DIGITS = 5e-6  # relative, of a number in the Hub's table
TOKEN = "hf_aVeryFakeTokenOfTests"
NASTY = [
    'a "quoted" cat, 50% | off',
    "title: *bold* _cat_ `code` # no heading",
    "<script>alert(1)</script> & <b>bold</b> [link](http://x) ![](y)",
    "first line\n---\nsecond: line\n```\n# heading",
    "- item: {a: [1, 2]} 'single' \\ back\\slash {{ 7 * 7 }} {% raw %}",
    "日本の猫 🐇 ¡é!",
]
INFO = RewardInfo(
    "taste", "what people like", "image", "[0, 1]", "someone/taste", "CC-BY 4.0", "nothing", "It overlooks hands."
)
SECTIONS = ["How to use it", "Before and after", "Scores", "Training", "Limits", "Licence", "Citation"]


def estimate(mean, error=0.05):
    return {"mean": mean, "standard_error": error, "images": 4, "prompts": 2}


def reward_entry(base, tuned, held_out=False):
    return {
        "held_out": held_out,
        "base": estimate(base),
        "tuned": estimate(tuned),
        "difference": estimate(None if None in (base, tuned) else tuned - base),
        "best_of": {"2": estimate(base)},
        "equivalent_n": None,
        "nonfinite": {"base": 0, "tuned": 0},
    }


def set_entry(name, prompts, rewards):
    return {
        "images": 2 * len(prompts),
        "images_per_prompt": 2,
        "prompts": [prompt for prompt in prompts for _ in range(2)],
        "seeds": list(range(2 * len(prompts))),
        "rewards": rewards,
        "path_kl": estimate(7.5),
        "diversity": {"base": estimate(0.3), "tuned": estimate(0.2), "difference": estimate(-0.1)},
        "samples": {f"samples/{name}-{row:04d}.png": row for row in (0, 2 * len(prompts) - 1)},
    }


SETS = {
    "training": set_entry("training", ["a cat", "a dog"], {"taste": reward_entry(0.123456789, 0.75), "sharp": reward_entry(1.5, 1.25, True)}),
    "held-out": set_entry("held-out", ["a cow", "a hen"], {"taste": reward_entry(0.5, 0.625), "sharp": reward_entry(None, 2.0, True)}),
}  # fmt: skip


def evaluated(run, sets=SETS, epoch=1, step=4):
    """Puts an evaluation into a run's folder, and its numbers into the log."""
    folder = run / "evaluation"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"call": {}, "sets": sets}))
    Image.new("RGB", (40, 30), "red").save(folder / "grid.png")
    line = {}
    for name, one in sets.items():
        line[f"eval/{name}/kl"] = one["path_kl"]["mean"]
        for reward, found in one["rewards"].items():
            line |= {f"eval/{name}/{reward}/{part}": found[part]["mean"] for part in ("base", "tuned")}
        for file in one["samples"]:
            Image.new("RGB", (16, 16), "blue").save(folder / file)
    RunLog(run).log({"epoch": epoch, **{key: value for key, value in line.items() if value is not None}}, step)


@pytest.fixture
def run(tmp_path):
    """The folder of a run of three epochs."""
    folder = tmp_path / "run"
    log = RunLog(folder)
    for epoch in range(3):
        log.log({"epoch": epoch, "reward": 0.25 + epoch / 4, "reward_std": 0.1}, 2 * epoch)
        log.log({"epoch": epoch, "kl": 1e-3, "kl_path": 1.5 + epoch}, 2 * epoch + 2)
    return folder


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """What is drawn, without the second that it takes: test_report.py looks at curves."""
    drawn = []
    monkeypatch.setattr(
        model_card, "draw_curves", lambda metrics, reduction: drawn.append((metrics, reduction)) or b"a PNG"
    )
    return drawn


@pytest.fixture
def facts(run):
    return RunFacts(
        pipeline="StableDiffusionPipeline",
        base_model="someone/base",
        task="text-to-image",
        full=False,
        trained="LoRA of rank 4 and alpha 8 on unet (1,234 parameters)",
        objective="dpok",
        kl="0.02 × the exact KL of each step",
        reduction="mean",
        loading_code=lambda base, repository: f'pipe = load("{base}")\npipe.load_lora_weights("{repository}")',
        call={"num_inference_steps": 20, "guidance_scale": 7.5, "generator": object()},
        call_columns=(),
        prompts=["a cat", "a dog"],
        rewards=[TrainedReward("taste", 1.0, INFO)],
        settings={"seed": 0, "kl_weight": 0.02, "output_dir": str(run)},
        epochs=3,
        updates=6,
        images=192,
        seconds=3723.4,
        hardware="2 × GPU; bfloat16 weights",
        run_folder=run,
        evaluation_folder=run / "evaluation",
    )


@pytest.fixture
def write(facts, tmp_path):
    def make(
        online=False, dataset_name=None, tags=("dpok-trl", "dpok"), model_name="me/my_rabbit", **changes
    ) -> ModelCard:
        changed = dataclasses.replace(facts, **changes)
        write_model_card(
            tmp_path / "model", changed, model_name=model_name, dataset_name=dataset_name, tags=tags, online=online
        )
        return ModelCard.load(tmp_path / "model" / "README.md")

    return make


def outside_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def headings(card):
    return re.findall(r"^## (.*)$", outside_code(card.text), re.M)


def section(card, name):
    return card.text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def rows(text):
    """The cells of all tables, header and rule included."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# --- what stands on it ------------------------------------------------------------------------------------------------


def test_the_sections_and_their_order(write, run):
    evaluated(run)
    card = write()
    assert headings(card) == SECTIONS
    assert card.text.startswith("\n# me/my_rabbit\n")
    assert card.text.index("<Gallery />") < card.text.index("## How to use it")
    assert "\n\n\n" not in card.text
    for forbidden in ("TODO", "None", "N/A", "nan", "{{", "{%"):
        assert forbidden not in card.text.split("<details>")[0] + card.text.split("</details>")[1]


def test_the_front_matter_comes_back(write, run):
    evaluated(run)
    data = write(dataset_name="someone/prompts", tags=["rabbits"]).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("someone/base", "adapter", "diffusers")
    assert (data.pipeline_tag, data.datasets, data.model_name) == ("text-to-image", "someone/prompts", "me/my_rabbit")
    assert {"text-to-image", "diffusers", "lora", "reinforcement-learning", "trl", "rabbits"} <= set(data.tags)
    assert data.license is None
    assert data.get("instance_prompt") is None  # two prompts
    assert [entry["text"] for entry in data.widget] == ["a cat", "a dog", "a cow", "a hen"]


def test_the_results_of_the_hub_are_those_of_the_evaluation(write, run):
    evaluated(run)
    found = {
        (one.dataset_split, one.metric_type, one.metric_name): one.metric_value for one in write().data.eval_results
    }
    expected = {
        (name, reward, f"{reward}, {label}"): entry[part]["mean"]
        for name, one in SETS.items()
        for reward, entry in one["rewards"].items()
        for part, label in (("base", "pretrained"), ("tuned", "tuned"))
        if entry[part]["mean"] is not None
    }
    assert len(expected) == 7  # one mean is not finite, and stands nowhere
    assert found == pytest.approx(expected, rel=SIX_DIGITS, abs=0)


def test_the_tables_have_the_numbers_of_the_evaluation(write, run):
    evaluated(run)
    scores = section(write(), "Scores")
    assert "Evaluated after 2 of 3 epochs (optimizer step 4 of 6)." in scores
    table = rows(scores)
    assert table[0] == ["training: 2 prompts × 2, seeds 0–3", "pretrained", "tuned", "difference", "images"]
    assert table[2] == ["taste (trained on)", "0.123 ± 0.050", "0.750 ± 0.050", "+0.627 ± 0.050", "4"]
    assert table[3] == ["sharp (held out)", "1.500 ± 0.050", "1.250 ± 0.050", "-0.250 ± 0.050", "4"]
    assert table[9] == ["sharp (held out)", "–", "2.000 ± 0.050", "–", "4"]


def test_the_pictures_it_shows_are_there(write, run, tmp_path):
    evaluated(run)
    card = write()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text) + [one["output"]["url"] for one in card.data.widget]
    assert len(shown) == len(set(shown)) == 2 + 4
    assert {f"card/{path.name}" for path in (tmp_path / "model" / "card").iterdir()} == set(shown)
    sample = Image.open(tmp_path / "model" / card.data.widget[0]["output"]["url"])
    assert sample.size == (128, 128) and sample.getpixel((0, 0)) == (0, 0, 255)  # sixteen pixels, enlarged


def test_a_second_card_is_a_new_one(write, run, tmp_path):
    evaluated(run)
    write()
    (run / "evaluation" / "evaluation.json").unlink()
    card = write(model_name="me/other")
    assert "me/my_rabbit" not in card.content and card.data.eval_results is None
    assert [path.name for path in (tmp_path / "model" / "card").iterdir()] == ["curves.png"]


def test_the_curves_are_those_of_the_log(write, run, curves, tmp_path):
    assert "](card/curves.png)" in section(write(reduction="sum"), "Training")
    assert (tmp_path / "model" / "card" / "curves.png").read_bytes() == b"a PNG"
    assert curves == [(read_metrics(run), "sum")]


def test_the_training_is_told(write):
    text = section(write(), "Training")
    told = dict(row for row in rows(text) if len(row) == 2)
    assert told["trained"] == "LoRA of rank 4 and alpha 8 on unet (1,234 parameters)"
    assert told["epochs, optimizer steps"] == "3, 6" and told["images"] == "192"
    assert told["mean reward of the images, first → last epoch"] == "0.25 → 0.75"
    assert told["path KL, mean over the updates of the last epoch"] == "3.5 nats"
    assert (told["time"], told["hardware"]) == ("1:02:03", "2 × GPU; bfloat16 weights")
    assert "* “a cat”\n* “a dog”\n" in text
    assert ["taste", "what people like", "CC-BY 4.0"] in rows(text)
    assert all(f"{name} {version}" in text for name, version in versions().items())


def test_the_path_kl_stands_once(write, run):
    evaluated(run)
    card = write()
    assert "path KL (nats)" in section(card, "Scores") and "3.5 nats" not in card.text


@pytest.mark.parametrize(
    ("kept", "label", "value"),
    [
        ([0, 1, 2], "mean reward of the images, first → last epoch", "0.25 → 0.75"),
        ([0], "mean reward of the images", "0.25"),
        (
            [1, 2],
            "mean reward of the images, epoch 1 → 2 (the first is 0; earlier ones are not in this folder)",
            "0.50 → 0.75",
        ),
        ([2], "mean reward of the images, epoch 2 (the first is 0; earlier ones are not in this folder)", "0.75"),
    ],
)
def test_the_epochs_of_a_resumed_run_are_those_that_are_known(kept, label, value, write, run):
    lines = [line for line in read_metrics(run) if line["epoch"] in kept]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = {name: found for name, found in (row for row in rows(section(write(), "Training")) if len(row) == 2)}
    assert {name: found for name, found in told.items() if "reward of" in name} == {label: value}


def test_the_code_of_a_local_model_has_a_path_to_it(write):
    card = write(model_name="model")
    assert card.text.startswith("\n# model\n")
    assert 'load_lora_weights("path/to/model")' in card.text and 'dpok_trl.load_tuned("path/to/model")' in card.text
    pushed = card_for(card.content, "me/rabbit")
    assert 'load_lora_weights("me/rabbit")' in pushed and 'load_tuned("me/rabbit")' in pushed
    assert "\n# me/rabbit\n" in pushed and "path/to/model" not in pushed


def test_one_is_no_plural(write, run):
    one = set_entry("training", ["a cat"], {"taste": reward_entry(0.5, 0.75)})
    evaluated(run, {"training": one | {"images": 1, "images_per_prompt": 1, "diversity": None}}, epoch=0, step=2)
    card = write(epochs=1)
    assert "after 1 of 1 epoch (optimizer step 2 of 6)" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"training (1 prompt, 1 image)"}


def test_ten_prompts_of_many_are_told(write):
    text = section(write(prompts=[f"prompt {number}" for number in range(12)] * 2), "Training")
    assert "Trained on 12 prompts, the first ten of them:" in text
    assert re.findall(r"^\* “(.*)”$", text, re.M) == [f"prompt {number}" for number in range(10)]
    assert "The prompts came from a function." in section(write(prompts=None), "Training")


def test_the_limits_name_the_reward_and_what_was_not_asked(write, run):
    evaluated(run)
    limits = section(write(), "Limits")
    assert "**taste**" in limits and "What taste overlooks: It overlooks hands." in limits
    assert "No reward that was not trained on" not in limits and "on others is not known" not in limits
    alone = {"training": set_entry("training", ["a cat"], {"taste": reward_entry(0.5, 0.75)})}
    evaluated(run, alone)
    limits = section(write(), "Limits")
    assert "No reward that was not trained on" in limits and "on others is not known" in limits


def test_over_optimisation_is_told(write, run):
    evaluated(run)
    assert "over-optimisation" not in section(write(), "Limits")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "\n".join([*lines[:-1], lines[-1][:-1] + ', "eval/over_optimisation": 1.0}', ""])
    )
    assert "over-optimisation" in section(write(), "Limits")


@pytest.mark.parametrize(
    ("changes", "sentence", "relation", "tags"),
    [
        ({}, "A LoRA adapter for [someone/base]", "adapter", {"lora", "reinforcement-learning"}),
        ({"full": True}, "All weights of the denoiser of [someone/base]", "finetune", {"reinforcement-learning"}),
        ({"objective": "reward_weighted"}, "supervised learning on images weighted by their rewards", "adapter", {"lora"}),
        ({"objective": "filtered"}, "supervised learning on the images with the best rewards", "adapter", {"lora"}),
        ({"objective": "ppo"}, "the clipped objective of [DDPO]", "adapter", {"lora", "reinforcement-learning"}),
        ({"task": "text-to-video"}, "tuned for text-to-video", "adapter", {"lora", "text-to-video", "reinforcement-learning"}),
    ],
)  # fmt: skip
def test_what_it_is_in_a_sentence(changes, sentence, relation, tags, write):
    card = write(**changes)
    assert sentence in card.text and card.data.base_model_relation == relation
    known = {"lora", "reinforcement-learning", "text-to-video"}
    assert known & set(card.data.tags) == tags
    assert card.data.pipeline_tag == changes.get("task", "text-to-image")
    assert "2305.16381" in section(card, "Citation")
    assert ("black2024ddpo" in card.text) == (changes.get("objective") == "ppo")
    assert ("reinforcement" in card.text.split("## How to use it")[0]) == ("reinforcement-learning" in tags)
    assert (".frames[0]" in card.text) == ("video" in card.data.pipeline_tag)


def test_every_objective_has_a_sentence(write):
    for objective in METHODS:
        assert METHODS[objective] in write(objective=objective).text


# --- what does not ----------------------------------------------------------------------------------------------------


def test_without_an_evaluation_there_are_no_numbers_of_one(write, run, tmp_path):
    card = write()
    assert card.data.eval_results is None and "model-index" not in card.content and card.data.get("widget") is None
    assert "model_name" not in card.content
    assert headings(card) == [name for name in SECTIONS if name != "Before and after"]
    assert "\n\n\n" not in card.text
    assert "It was not evaluated against the pretrained model." in card.text and "<Gallery />" not in card.text
    assert "±" not in card.text and rows(section(card, "Scores")) == []


def test_without_an_evaluation_the_pictures_are_those_of_the_newest_epoch(write, run):
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for epoch in (1, 2, 5):  # the last is of a future that was given up
        prompts = [f"cat {epoch}", "dog"]
        write_samples(
            run, Samples(pictures, prompts, [1.0, 2.0], {"taste": [1.0, 2.0]}, [0, 1], [None, None], epoch, epoch)
        )
        (run / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (epoch, 0, 0)).save(run / "samples" / f"epoch-{epoch:04d}.png")
    card = write()
    assert [entry["text"] for entry in card.data.widget] == ["cat 2", "dog"]
    assert "Drawn in training, in epoch 2 of 3" in section(card, "Pictures")


def test_an_evaluation_of_a_future_that_was_given_up_is_not_told(write, run):
    evaluated(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))  # what resuming from an earlier checkpoint does
    card = write()
    assert card.data.eval_results is None and "It was not evaluated" in card.text


def test_before_the_first_epoch_nothing_of_the_folder_is_told(write, run):
    evaluated(run)
    card = write(epochs=0, updates=0, images=None, seconds=0.0)
    assert card.data.eval_results is None and "![" not in card.text
    told = dict(row for row in rows(section(card, "Training")) if len(row) == 2)
    assert "time" not in told and "images" not in told and not any("reward" in name for name in told)


def test_nothing_private_stands_in_the_files(write, run, tmp_path, monkeypatch):
    evaluated(run)
    monkeypatch.setattr(
        "sys.argv", [str(tmp_path / "train.py"), "--logdir", str(tmp_path), "--hub_token", TOKEN, "--seed", "3"]
    )
    private = {
        "output_dir": str(run),
        "tracker_kwargs/wandb/entity": "a-team",
        "sample_call_kwargs/cache": f"{tmp_path}/x",
        "notes": TOKEN,
    }
    card = write(settings={"seed": 3, **private}, base_model=str(tmp_path))
    written = card.content + (tmp_path / "model" / "dpok_config.json").read_text()
    for secret in (str(tmp_path), tmp_path.name, TOKEN, "a-team", "entity"):
        assert secret not in written
    assert json.loads((tmp_path / "model" / "dpok_config.json").read_text()) == {"seed": 3}
    assert "python train.py --hub_token *** --seed 3" in card.text


@pytest.mark.parametrize("prompt", NASTY)
def test_no_prompt_breaks_the_card(prompt, write, run):
    sets = {"training": set_entry("training", [prompt], {prompt: reward_entry(0.5, 0.75)})}
    evaluated(run, sets)
    card = write(prompts=[prompt], rewards=[TrainedReward(prompt, 1.0, None)])
    assert card.data.get("instance_prompt") == prompt and card.data.widget[0]["text"] == prompt
    assert {one.metric_type for one in card.data.eval_results} == {prompt}
    assert headings(card) == SECTIONS
    outside = outside_code(card.text)
    assert "<script" not in outside.replace("\\<", "") and "<b>" not in outside.replace("\\<", "")
    assert all(len(row) in (2, 3, 5) for row in rows(outside))
    (code,) = re.findall(r"^```python\n(.*?)^```", card.text, re.S | re.M)
    called = []
    exec(code, {"load": lambda base: Pipe(called)})
    assert called == [((prompt,), {"num_inference_steps": 20, "guidance_scale": 7.5})]


class Pipe:
    """Takes down how it is called."""

    def __init__(self, called):
        self.called = called
        self.images = ["picture"]

    def load_lora_weights(self, repository):
        assert repository == "me/my_rabbit"

    def __call__(self, *args, **kwargs):
        self.called.append((args, kwargs))
        return self


def test_where_a_model_is_from(tmp_path):
    (tmp_path / "base").mkdir()
    assert public_model(str(demo_pipeline_path())) == "the shipped demo pipeline"
    assert public_model(str(tmp_path / "base")) == public_model(str(tmp_path / "gone" / "base")) == "base"
    assert public_model("someone/base") == "someone/base"


def test_plain_text():
    assert plain("soft_reward of\n my_cats") == "soft_reward of my_cats"
    assert plain("_a_ *b* | `c` <d> [e] #f \\") == r"\_a\_ \*b\* \| \`c\` \<d\> \[e\] \#f \\"


# --- where it comes from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/base", "someone/base"),
        ("some-one/base_1.5", "some-one/base_1.5"),
        (None, None),
        ("/home/me/base", None),
        ("./base", None),
        ("~/base", None),
        ("runs/a/b", None),
        ("base", None),
    ],
)
def test_only_a_repository_is_a_base_that_is_named(name, expected):
    assert hub_id(name) == expected


def test_a_folder_that_is_named_like_a_repository_is_none(tmp_path, monkeypatch):
    (tmp_path / "someone" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("someone/base") is None


LICENCE = {"license": "other", "license_name": "rabbit-1.0", "license_link": "https://example.org/rabbit"}


def base_card(folder, front="license: other\nlicense_name: rabbit-1.0\nlicense_link: https://example.org/rabbit\n"):
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{front}---\n# base\n")
    return folder


def test_the_licence_is_that_of_the_base(write, tmp_path, monkeypatch):
    card = write(base_model=str(base_card(tmp_path / "base")))
    assert (card.data.license, card.data.license_name) == ("other", "rabbit-1.0") and card.data.base_model is None
    assert "The licence `rabbit-1.0` is that of the pretrained model" in card.text

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert base_licence("someone/base") == {}
    repository = tmp_path / "cache" / "models--someone--base"
    base_card(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert base_licence("someone/base") == LICENCE
    assert "is that of [someone/base](https://huggingface.co/someone/base)" in section(write(), "Licence")


@pytest.mark.parametrize("front", ["", "tags: [a]\n", "license: [unclosed\n", "license_name: only\n", "- a list\n"])
def test_a_licence_that_cannot_be_read_is_not_guessed(front, write, tmp_path):
    card = write(base_model=str(base_card(tmp_path / "base", front)))
    assert card.data.license is None and "No licence is stated here" in card.text


def test_without_a_network_the_licence_is_left_out(write):
    """The tests are offline: huggingface_hub refuses to ask."""
    assert base_licence("someone/base-that-is-not-cached", online=True) == {}
    assert "No licence is stated here: that of [someone/base]" in write(online=True).text


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["/home/me/train.py", "--seed", "1"], "python train.py --seed 1"),
        (["/usr/bin/dpok-trl", "demo", "--prompt", "a green triangle"], "dpok-trl demo --prompt 'a green triangle'"),
        (["train.py", "--config", "/home/me/recipe.yaml", "--data=C:\\x\\y.csv"], "python train.py --config recipe.yaml --data=y.csv"),
        (["train.py", "--output_dir", "runs/a", "--output-dir=b", "go"], "python train.py go"),
        (["train.py", "--tracker_kwargs", '{"entity": "me"}', "--hub_token=abc"], "python train.py '--hub_token=***'"),
        (["train.py", "--api-key", "abc", TOKEN, "x"], "python train.py --api-key *** *** x"),
        (["train.py", "--reward", "http://10.0.0.7:8000", "taste"], "python train.py --reward 'http://***' taste"),
        (["/env/ipykernel_launcher.py", "-f", "/run/kernel.json"], None),
        (["-c"], None),
        ([""], None),
    ],
)  # fmt: skip
def test_the_command(typed, told):
    assert command_line(typed) == told


def test_settings_of_the_machine_are_not_public():
    settings = {
        "seed": 0,
        "reward_weights": [1.0, 2.0],
        "logdir": "logs",
        "a": "/x",
        "b": ["y", "~/z"],
        "c": "http://h",
        "d": "1/2",
    }
    assert public_settings(settings) == {"seed": 0, "reward_weights": [1.0, 2.0], "d": "1/2"}


def test_a_folder_without_a_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_shipped_rewards_say_what_they_overlook():
    said = {info.name: info.overlooks for info in shipped_rewards()}
    assert said.keys() == SHIPPED.keys()
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in said.values())
