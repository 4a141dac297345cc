"""The command line: its errors and exit codes, and the demo from end to end."""

import importlib
import json
import os
import pty
import re
import shlex
import subprocess
import sys

import pytest
import torch
from tiny import stable_diffusion

import dpok_trl
from dpok_trl import cli
from dpok_trl.demo import command, demo_pipeline_path
from dpok_trl.results.runlog import read_metrics
from dpok_trl.rewards.base import RewardError


def exit_code(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code


# --- arguments --------------------------------------------------------------------------------------------------------


def test_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"dpok-trl {dpok_trl.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "arguments are required: command"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (
            ["demo", "--epoch", "3"],
            "unrecognized arguments: --epoch 3. Did you mean --epochs?",
        ),  # no abbreviations: they break when options are added
        (["demo", "--num_epochs", "3"], "unrecognized arguments: --num_epochs 3. Did you mean --epochs?"),
        (["demo", "--zzz", "3", "--epochs", "1"], "unrecognized arguments: --zzz 3\n"),
        (["demo", "--reward", "nice"], "invalid choice: 'nice'"),
        (["demo", "--epochs", "0"], "argument --epochs: 0 is not at least 1"),
        (["demo", "--images", "two"], "argument --images: invalid"),
        (["demo", "--kl-weight", "-1"], "argument --kl-weight: -1.0 is not a number of at least 0"),
        (["demo", "--kl-weight", "nan"], "argument --kl-weight: nan is not a number of at least 0"),
    ],
)
def test_wrong_arguments_are_refused(capsys, argv, words):
    assert exit_code(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option"),
    [("demo", "--kl-weight"), ("check", "--scheduler"), ("train", "--kl_weight"), ("sample", "--seeds")],
)
def test_help_imports_nothing_heavy(name, option):
    code = (
        f"import sys\nfrom dpok_trl import cli\ntry: cli.main(['{name}', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'matplotlib', 'PIL'}\nprint(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n") and option in result.stdout and result.stderr == ""


def heads():
    """The parsers of the commands, by name."""
    [action] = [action for action in cli.build_parser()._actions if action.dest == "command"]
    return action.choices


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_an_example_that_parses(name, capsys):
    example = cli.EXAMPLES[name]
    words = shlex.split(re.search(r"dpok-trl [^)]*", example)[0])
    assert words[1] == name
    if name == "train":  # which reads its own
        words[words.index("--config") :] = words[words.index("--config") + 2 :]
        command_of("train").make_parser().parse(words[2:])
    else:
        cli.build_parser().parse_args(words[1:])
    assert exit_code([name, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (f"example: {example}" in printed and "--debug" in printed) or name == "train"


def command_of(name):
    return importlib.import_module(cli.COMMANDS[name])


def test_examples_are_of_commands():
    assert set(cli.EXAMPLES) >= set(cli.COMMANDS) == set(heads())


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_no_colour_on_a_terminal_that_has_none(environment):
    ours, its = pty.openpty()
    code = "import sys\nfrom dpok_trl import cli\nsys.exit(cli.main(['env', '--help']))"
    result = subprocess.run([sys.executable, "-c", code], stdout=its, stderr=its, env={**os.environ, **environment})
    printed = os.read(ours, 10000)
    os.close(ours)
    os.close(its)
    assert result.returncode == 0 and b"--json" in printed and b"\x1b" not in printed


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_prompt_of_another_world_is_one_line_on_stderr(capsys, tmp_path):
    assert cli.main(["demo", "--prompt", "a photo of a cat", "--output", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dpok-trl demo: error: Cannot read the prompt 'a photo of a cat'")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(capsys, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} holds other files. Give a new folder with --output" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} holds another run." in capsys.readouterr().err
    assert cli.main(["demo", "--output", str(tmp_path / "notes.txt")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_debug_gives_the_traceback(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FileExistsError):
        cli.main(["demo", "--output", str(tmp_path), "--debug"])


@pytest.mark.parametrize(
    ("error", "code"), [(RewardError("server down"), 2), (FloatingPointError("NaN"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes_of_a_command(monkeypatch, capsys, error, code):
    def run(args):
        raise error

    monkeypatch.setattr(command, "run", run)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err.count("\n") == (2 if code == 130 else 1)


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupted_demo_does_not_advise_a_resume(monkeypatch, capsys, tmp_path, begun):
    def stopped(args, started):
        if begun:
            args.output.mkdir()
        raise KeyboardInterrupt("stopped after epoch 1 of 2. To go on: dpok-trl train --resume_from ...")

    monkeypatch.setattr(command, "_run", stopped)
    assert cli.main(["demo", "--output", str(tmp_path / "run")]) == 130
    again = ". The demo cannot be resumed: start it again with another --output" if begun else ""
    assert capsys.readouterr().err == f"\ndpok-trl demo: interrupted{again}\n"


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(command, "run", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["demo"])


# --- small parts of the demo ------------------------------------------------------------------------------------------


def test_the_command_that_is_printed_gives_the_same_arguments():
    argv = ["demo", "--prompt", "a red square and a blue circle", "--kl-weight", "0", "--seed", "3", "--output", "a b"]
    args = cli.build_parser().parse_args(argv)
    words = shlex.split(shlex.join(command.command_line(args)))
    assert cli.build_parser().parse_args(words[1:]) == args


@pytest.mark.parametrize(("text", "cores"), [("200000 100000", 2), ("150000 100000\n", 2), ("50000 100000", 1)])
def test_a_container_s_quota_counts(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert command.cpu_quota(tmp_path / "cpu.max") == cores


def test_without_a_quota_every_core_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(command.os, "cpu_count", lambda: 6)
    (tmp_path / "cpu.max").write_text("max 100000")
    assert command.cpu_quota(tmp_path / "cpu.max") == command.cpu_quota(tmp_path / "missing") == 6


def test_threads_follow_the_environment(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command.limit_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(command, "cpu_quota", lambda: 1)
    try:
        assert command.limit_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_other_libraries_speak_again_afterwards():
    from transformers.utils import logging

    before = logging.get_verbosity()
    with pytest.raises(ZeroDivisionError), command.only_errors():
        assert logging.get_verbosity() == logging.ERROR
        1 / 0  # noqa: B018
    assert logging.get_verbosity() == before


# --- the demo ---------------------------------------------------------------------------------------------------------


def check_what_a_demo_leaves(output, epochs, images):
    metrics = read_metrics(output)
    assert len([line for line in metrics if "reward" in line]) == epochs
    assert all(line["policy/ratio_deviation_max"] == 0 for line in metrics if line["step"] == 1 and "kl" in line)
    comparison = json.loads((output / "evaluation.json").read_text())["sets"]["training"]
    assert comparison["images"] == images and set(comparison["rewards"]) >= {"exact", "soft", "fidelity"}
    assert comparison["path_kl"]["mean"] > 0
    assert {path.name for path in (output / "lora").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "README.md",
        "card",
        "dpok_config.json",
    }
    card = (output / "lora" / "README.md").read_text()
    assert "Apache-2.0 (this package)" in card and "overlooks: " in card and "not one that dpok-trl ships" not in card
    for name in ("report.html", "grid.png", "curves.png", "samples/epoch-0000.png"):
        assert (output / name).stat().st_size > 1000
    assert "kl_weight" in (output / "report.html").read_text()


def test_the_demo_with_a_tiny_untrained_pipeline(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dpok_trl.demo, "load_demo_pipeline", stable_diffusion)
    monkeypatch.setattr(command, "IMAGES_PER_EPOCH", 4)
    output = tmp_path / "run"
    argv = ["demo", "--prompt", "four circles", "--reward", "greenness", "--epochs", "2", "--images", "3"]
    assert cli.main([*argv, "--output", str(output), "--debug"]) == 0
    check_what_a_demo_leaves(output, epochs=2, images=3)
    printed = capsys.readouterr().out
    assert "| training: 1 prompt × 3, same seeds |" in printed and "| greenness" in printed
    assert "draws the same pictures: largest difference of a pixel 0.0." in printed
    assert str(output / "report.html") in printed
    assert cli.main(["demo", "--output", str(output)]) == 2


@pytest.mark.slow
def test_the_demo_with_the_shipped_pipeline(tmp_path):
    assert demo_pipeline_path().is_dir()
    output = tmp_path / "run"
    argv = ["dpok-trl", "demo", "--epochs", "3", "--images", "64", "--output", str(output)]
    result = subprocess.run([sys.executable, "-m", "dpok_trl.cli", *argv[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torchvision" not in result.stderr and "Warning" not in result.stderr
    assert "largest difference of a pixel 0.0." in result.stdout
    check_what_a_demo_leaves(output, epochs=3, images=64)
