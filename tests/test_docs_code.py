"""The code on the pages: every Python block runs, and every command line is understood by the program that it is for.

A page is one program: its blocks run from top to bottom in one namespace and one folder. What a reader has and this machine has not is substituted, and nothing else:

* pipelines of the Hub are a tiny Stable Diffusion with random weights (`HUB`),
* rewards with a network judge the brightness of a picture; their names, parameters and settings are their own,
* runs are short and pictures small (`shortened`): one epoch of two steps,
* names that a page's text introduces (`BEFORE`) are defined before its first block.
"""

import math
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline
from tiny import stable_diffusion
from torch.distributed.run import get_args_parser

from dpok_trl import DPOKConfig, DPOKTrainer, cli
from dpok_trl.commands.train import make_parser
from dpok_trl.rewards.weights import ModelReward


REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
HUB = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "owner/model")

# Pages that have a test of their own which runs them whole.
ELSEWHERE = {
    "bring-your-own-pipeline": "tests/commands/test_bring_your_own.py",
    "hub": "tests/hub/test_page.py",
}

TRAINED = """
from dpok_trl import DPOKConfig, DPOKTrainer

def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))

trainer = DPOKTrainer(DPOKConfig(output_dir="run"), brightness, ["a red circle", "four circles"], "owner/model")
"""
PIPE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("owner/model")
"""
GENEVAL = """
from pathlib import Path

Path("geneval/prompts").mkdir(parents=True)
Path("geneval/prompts/evaluation_metadata.jsonl").write_text('{"tag": "single_object", "include": [], "prompt": "a photo of a bench"}\\n')
"""
CALLBACKS = """
from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.demo import load_demo_pipeline

config = DPOKConfig(output_dir="run")
prompts, held_out, pipeline = ["a red circle"], ["four circles"], load_demo_pipeline()
"""
BEFORE = {
    "README": PIPE,
    "how-it-works": TRAINED + PIPE,
    "checkpoints": TRAINED + "trainer.train()\n",
    "remote-rewards": GENEVAL,
    "callbacks": CALLBACKS,
}
# page -> what a page has for an example, and what stands for it here
INSTEAD = {"checkpoints": {"checkpoint-120": "checkpoint-2"}}


def named(page: Path) -> str:
    return page.stem


def blocks_of(page: Path, *languages: str) -> list[str]:
    """Code of the blocks in one of these languages, in their order; those in lists are indented."""
    found = re.findall(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(rf"^{indent}", "", code, flags=re.M) for indent, language, code in found if language in languages]


WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python", "py")]
WITH_COMMANDS = [page for page in PAGES if blocks_of(page, "bash", "console", "sh")]


# --- Python -----------------------------------------------------------------------------------------------------------


def shortened(config: DPOKConfig) -> DPOKConfig:
    """One epoch of two steps, a few images of 16 pixels, and an evaluation of two images for each prompt."""
    batches = min(config.sample_num_batches_per_epoch, 2)
    while (batches * config.sample_batch_size) % (config.train_batch_size * config.train_gradient_accumulation_steps):
        batches += 1
    value = {"value_batch_size": 2} if config.train_adv_type == "value" else {}
    sizes = {name: 16 for name in ("height", "width") if name in config.sample_call_kwargs}
    return replace(
        config,
        num_epochs=1,
        sample_num_steps=max(2, math.ceil(1 / config.train_timestep_fraction)),
        sample_num_batches_per_epoch=batches,
        sample_call_kwargs={**config.sample_call_kwargs, **sizes},
        eval_freq=min(config.eval_freq, 1),
        eval_num_images_per_prompt=2,
        **value,
    )


@pytest.fixture
def substitutes(monkeypatch, tmp_path):
    """The reader's machine, as far as it is not this one."""
    load = DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls, name, **kwargs):
        if Path(name).is_dir():
            return load(cls, name, **kwargs)
        assert name in HUB, f"{name} is no pipeline of the Hub that a page may name; add it to HUB"
        return stable_diffusion()

    build, evaluate = DPOKTrainer.__init__, DPOKTrainer.evaluate

    def init(self, config, *args, **kwargs):
        build(self, shortened(config), *args, **kwargs)

    def few(self, *args, **kwargs):
        return evaluate(self, *args, **{**kwargs, "images_per_prompt": 2})

    def bright(self, images, prompts):
        return [sum(image.convert("L").resize((1, 1)).getdata()) / 255 for image in images]

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(DPOKTrainer, "__init__", init)
    monkeypatch.setattr(DPOKTrainer, "evaluate", few)
    monkeypatch.setattr(ModelReward, "__call__", bright)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page.stem not in ELSEWHERE], ids=named)
def test_the_page_runs(page, substitutes):
    namespace = {"__name__": "page"}
    exec(BEFORE.get(page.stem, ""), namespace)
    for number, code in enumerate(blocks_of(page, "python", "py")):
        for example, real in INSTEAD.get(page.stem, {}).items():
            code = code.replace(example, real)
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_the_other_test_reads_the_page(page):
    assert f'"{page}.md"' in (REPOSITORY / ELSEWHERE[page]).read_text()


def test_the_training_that_is_shown_trains(substitutes):
    """Of the first page and the README: the files that the text promises."""
    for page in (REPOSITORY / "README.md", REPOSITORY / "docs" / "index.md"):
        [code] = [code for code in blocks_of(page, "python") if "trainer.train()" in code and "def brightness" in code]
        exec(compile(code.replace("bright-rabbit", page.stem), page.name, "exec"), {"__name__": "page"})
        files = {path.relative_to(page.stem).as_posix() for path in Path(page.stem).rglob("*") if path.is_file()}
        assert {"metrics.jsonl", "samples/epoch-0000.png", "model/pytorch_lora_weights.safetensors"} <= files


# --- commands ---------------------------------------------------------------------------------------------------------

# Programs that are not ours, of which nothing is installed here: what they are for.
NOT_HERE = {
    "git": "clones GenEval",
    "conda": "GenEval's environment",
    "mim": "an installer of OpenMMLab's packages, in GenEval's environment",
    "./evaluation/download_models.sh": "GenEval's own script",
    "nvidia-smi": "the driver's own program",
    "sbatch": "Slurm's own program",
    "srun": "Slurm's own program",
    "huggingface-cli": "the Hub's older client",
    "tensorboard": "serves until it is stopped",
    "trackio": "serves until it is stopped",
    "wandb": "asks for an account",
    "swanlab": "asks for an account",
}
SHELL = {"cd", "export", "eval", ".", "source", "cat", "mkdir", "ls", "tail"}
# Scripts of the reader's own that the pages speak of.
OWN_SCRIPTS = {"train.py"}


def lines_of(code: str) -> list[str]:
    """The commands of a block: of a console those after the prompt, without comments; broken lines joined; each part of a chain by itself."""
    lines = code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    parts = [part for line in lines for part in re.split(r" && | \| (?=\w)", line.split("  #")[0].strip().strip("()"))]
    return [part.strip() for part in parts if part.strip() and not part.strip().startswith("#")]


COMMANDS = [
    pytest.param(line, id=f"{page.stem}: {line[:60]}")
    for page in WITH_COMMANDS
    for code in blocks_of(page, "bash", "console", "sh")
    for line in lines_of(code)
]
SERVERS = REPOSITORY / "docs" / "reward_servers"


def understood(words: list[str]) -> None:
    """Raises, or ends as the program itself would, if a command line is wrong."""
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words = words[1:]  # variables of the environment
    program, *argv = words
    if program == "dpok-trl":
        our_own(argv)
    elif program == "accelerate" and argv[0] == "launch":
        launched = launch_command_parser().parse_args(argv[1:])
        a_script([launched.training_script, *launched.training_script_args])
    elif program == "accelerate":
        assert argv in (["config"], ["env"], ["test"])
    elif program == "torchrun":
        launched = get_args_parser().parse_args(argv)
        a_script([launched.training_script, *launched.training_script_args])
    elif program in ("python", "python3"):
        if argv[:2] not in (["-m", "venv"], ["-m", "build"]):
            a_script(argv)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
        assert next(word for word in argv if "=" not in word) in targets
    elif program == "pip":
        assert argv[0] == "install"
        extras = re.findall(r"dpok-trl\[([\w,]+)\]", " ".join(argv))
        known = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.M)
        assert {name for one in extras for name in one.split(",")} <= set(known)
    elif program == "hf":
        assert argv[:2] == ["auth", "login"] or argv[0] in ("download", "upload")
    elif program.startswith("benchmarks/"):
        assert os.access(REPOSITORY / program, os.X_OK)  # a script of the repository
    else:
        assert program in NOT_HERE.keys() | SHELL, f"no program known here: {program}"


def our_own(argv: list[str]) -> None:
    if argv[0] == "train":
        words = [str(REPOSITORY / word) if (REPOSITORY / word).is_file() else word for word in argv[1:]]
        if "--config" in words and not Path(words[(at := words.index("--config")) + 1]).is_file():
            del words[at : at + 2]  # the reader's own file
        *_, unknown = make_parser().parse_known(words)
        launch_command_parser().parse_args([*unknown, "script.py"])
        return
    if argv[-1] in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            cli.build_parser().parse_args(argv)
        assert stop.value.code == 0
        return
    assert cli.build_parser().parse_args(argv).command == argv[0]


def a_script(words: list[str]) -> None:
    """A script that is there, or one of the reader's own with settings that exist."""
    path, *flags = words
    if path in OWN_SCRIPTS:
        *_, unknown = make_parser().parse_known(flags)
        assert unknown == []
        return
    assert (REPOSITORY / path).is_file() or (SERVERS / path).is_file(), f"there is no {path}"


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_is_understood(line):
    words = shlex.split(line, comments=True)
    if words:
        understood(words)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_the_shell_reads_the_blocks(page):
    for code in blocks_of(page, "bash", "sh"):
        result = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert result.returncode == 0, f"{page.name}: {result.stderr}\n{code}"


@pytest.mark.parametrize(
    "line",
    [
        "dpok-trl demo --epoch 3",
        "dpok-trl evalate rabbit",
        "dpok-trl train --num_epoch 3",
        "accelerate launch --numprocesses 2 train.py",
        "make demonstration",
        "pip install dpok-trl[tracker]",
        "python examples/missing.py",
        "python train.py --kl_wieght 1",
        "dpok_trl demo",
    ],
)
def test_a_wrong_command_is_found(line, capsys):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        understood(shlex.split(line))


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "yaml")], ids=named)
def test_yaml_blocks_are_yaml(page):
    for code in blocks_of(page, "yaml"):
        assert isinstance(yaml.safe_load(code), (dict, list))
