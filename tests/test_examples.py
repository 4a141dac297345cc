"""Each example runs with tiny settings, and each recipe is one of a run."""

import json
import math
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from dpok_trl import DPOKConfig, DPOKParser, DPOKSFTConfig, ScriptArguments, cli
from dpok_trl.prompts.datasets import HUB_PROMPTS, shipped_lists
from dpok_trl.results.runlog import read_metrics
from dpok_trl.rewards.demo import DemoGreenness
from dpok_trl.rewards.registry import SHIPPED
from dpok_trl.rewards.server import RewardServer, about, reward_scorer


FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
NOT_RUN = "# Not run: we had no GPU."
TINY = ["--epochs", "2", "--batch-size", "4", "--steps", "2"]
# likewise, for those that take the settings themselves
TINY_SETTINGS = ["--num_epochs", "2", "--sample_num_steps", "2", "--sample_batch_size", "4", "--train_batch_size", "4"]
TINY_SETTINGS += ["--sample_num_batches_per_epoch", "1", "--eval_num_images_per_prompt", "2"]
LONGEST = 100  # lines


def run(name, folder, *arguments):
    """What it prints, and the metrics of its rounds of sampling."""
    [script] = [path for path in EXAMPLES if path.stem == name]
    command = [sys.executable, script, *TINY, "--output", "out", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rounds = [line for line in read_metrics(folder / "out") if "reward" in line]
    assert len(rounds) == 2 and all(math.isfinite(line["reward"]) for line in rounds)
    return result.stdout, rounds


def test_custom_reward(tmp_path):
    printed, rounds = run("custom_reward", tmp_path)
    assert printed.startswith("mean_colour: ok\n")
    assert rounds[0]["reward"] == rounds[0]["rewards/mean_colour/mean"] <= 1
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_multi_reward(tmp_path):
    printed, rounds = run("multi_reward", tmp_path, "--group-size", "2")
    for name in ("right", "clean", "diverse"):
        values = [line[f"rewards/{name}/mean"] for line in rounds]
        assert f"{name}: {values[0]:.3f} -> {values[1]:.3f}\n" in printed
    assert all(line["rewards/clean/mean"] <= -0.9 + 1e-6 for line in rounds)


def test_remote_reward(tmp_path):
    printed, rounds = run("remote_reward", tmp_path)
    assert printed.startswith("remote: ok\n")
    assert 0 <= rounds[0]["rewards/remote/mean"] <= 1 and rounds[0]["rewards/remote/nonfinite"] == 0


def test_remote_reward_elsewhere(tmp_path):
    reward = DemoGreenness()
    with RewardServer(("127.0.0.1", 0), reward_scorer(reward), about(reward)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run("remote_reward", tmp_path, "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


# --- in this process, which has imported everything already -------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """`here(name, *arguments)`: an example as its own command, in an empty folder."""

    def forget():
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def start(name, *arguments):
        forget()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")

    yield start
    forget()


def test_train_without_arguments_is_the_demo_by_accelerate_launch(tmp_path):
    """The whole command, as the README has it, but for the sizes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", FOLDER / "train.py", *TINY_SETTINGS]
    result = subprocess.run([*command, "--output_dir", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Model: out/model\n" in result.stdout
    assert "rewards/demo-soft/mean" in read_metrics(tmp_path / "out")[0]
    assert (tmp_path / "out" / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_train_by_a_recipe(here, tmp_path):
    here("train", "--config", FOLDER / "recipes" / "demo.yaml", *TINY_SETTINGS, "--output_dir", "out")
    metrics = read_metrics(tmp_path / "out")
    assert "eval/held-out/demo-exact/tuned" in metrics[-1]
    assert sum("reward" in line for line in metrics) == 2


def test_train_tells_a_mistake(here, capsys):
    with pytest.raises(SystemExit) as stop:
        here("train", "--num_epoch", "3")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: error: there is no setting --num_epoch. Did you mean --num_epochs?\n"


def test_dataset_then_evaluate_then_load(here, tmp_path, capsys):
    here("train_dataset", *TINY, "--eval-images", "1", "--output", "out")
    metrics = read_metrics(tmp_path / "out")
    drawn = [name for name in metrics[0] if re.fullmatch(r"reward/\w+", name)]
    assert drawn and "eval/held-out/demo-exact/tuned" in metrics[-1]
    assert (tmp_path / "out" / "evaluation" / "evaluation.md").is_file()
    here("evaluate", "out/lora", "--base", "demo", "--prompts", "a red square", "--steps", "2", "--images", "2")
    assert "| demo-soft " in capsys.readouterr().out and (tmp_path / "evaluation" / "grid.png").is_file()
    here("load_from_hub", "out/lora", "--base", "demo", "--steps", "2")
    assert "Largest difference from a stock pipeline: 0.0\n" in capsys.readouterr().out
    assert (tmp_path / "tuned.png").is_file()


@pytest.mark.parametrize(
    "settings", [[], ["--config", FOLDER / "recipes" / "demo-sft.yaml"]], ids=["defaults", "recipe"]
)
def test_sft_baseline(here, tmp_path, capsys, settings):
    here("sft_baseline", *settings, *TINY_SETTINGS, "--output_dir", "out")
    assert "demo-exact (held out)" in capsys.readouterr().out
    assert any(line.get("loss", 0) > 0 for line in read_metrics(tmp_path / "out"))


def test_the_recipe_of_sft_is_what_the_script_does_without(here):
    defaults = runpy.run_path(str(FOLDER / "sft_baseline.py"))["DEFAULTS"]
    (read,) = DPOKParser((DPOKSFTConfig,)).parse(["--config", str(FOLDER / "recipes" / "demo-sft.yaml")])
    assert read == DPOKSFTConfig(**{**defaults, "output_dir": "runs/demo-sft"})


def test_notebook(here, tmp_path, capsys):
    notebook = json.loads((FOLDER / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 6 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    sources = ["".join(cell["source"]) for cell in cells]
    sizes = "EPOCHS, IMAGES, STEPS = 20, 64, 10"
    assert sources[0].startswith(sizes)
    sources[0] = sources[0].replace(sizes, "EPOCHS, IMAGES, STEPS = 1, 4, 2")
    names = {}
    for source in sources:
        exec(compile(source, "quickstart.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("greenness: ok") and "| demo-exact (held out)" in printed
    assert (tmp_path / "quickstart" / "lora" / "pytorch_lora_weights.safetensors").is_file()


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_form(path):
    text = path.read_text()
    assert text.count("\n") < LONGEST
    header = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", text)
    assert header and 'dependencies = ["dpok-trl"]' in header[1] and "requires-python" in header[1]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "demo-sft"], ids=lambda path: path.stem)
def test_a_recipe_is_one_of_a_run(path):
    script, config = DPOKParser((ScriptArguments, DPOKConfig)).parse(["--config", str(path)])
    assert script.model == "demo" or re.fullmatch(r"[\w.-]+/[\w.-]+", script.model)
    assert {*script.reward, *script.eval_reward} <= set(SHIPPED) and not {*script.reward} & {*script.eval_reward}
    lists = [item for item in [*script.prompts, *script.eval_prompts] if " " not in item]
    assert set(lists) <= {*shipped_lists(), *HUB_PROMPTS}
    assert config.output_dir == f"runs/{path.stem}"
    images = config.sample_batch_size * config.sample_num_batches_per_epoch
    updates = images / (config.train_batch_size * config.train_gradient_accumulation_steps)
    assert updates in (1, 2, 4, 5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_whether_it_was_run_and_how_to_launch_it(path):
    text = path.read_text()
    assert (NOT_RUN in text) == (not path.stem.startswith("demo")) and ("# Run in the tests" in text) != (
        NOT_RUN in text
    )
    assert NOT_RUN not in text or "# Memory, by the sums of docs/configuration.md#memory" in text
    lines = re.findall(r"^#   (?:dpok-trl train|accelerate launch|python) .*", text, re.M)
    assert lines and all(f"examples/recipes/{path.name}" in line for line in lines)
    for line in lines:
        words = line.removeprefix("#   ").split()
        if words[0] == "dpok-trl":
            assert cli.build_parser().parse_args(words[1:]).command == "train"
        else:
            assert {word for word in words if word.endswith(".py")} <= {
                "examples/train.py",
                "examples/sft_baseline.py",
            }


def test_recipes_do_not_repeat_their_preset():
    for path in RECIPES:
        given = yaml.safe_load(path.read_text())
        if "preset" not in given:
            continue
        base = DPOKConfig.preset(given["preset"])
        _, config = DPOKParser((ScriptArguments, DPOKConfig)).parse(["--config", str(path)])
        settings = [name for name in given if name in DPOKConfig.__dataclass_fields__]
        assert [name for name in settings if getattr(config, name) == getattr(base, name)] == [], path.name
