"""`dpok-trl train`: what it trains, what it hands to Accelerate's launcher, and what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from dpok_trl import DPOKConfig, ScriptArguments, cli
from dpok_trl.commands import train as command
from dpok_trl.results.runlog import read_metrics


TINY = ["--num_epochs", "1", "--sample_num_steps", "2", "--sample_batch_size", "4", "--train_batch_size", "4"]
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "_is_configured", lambda: False)

    def forget():
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.fixture
def launched(monkeypatch):
    """What Accelerate's launcher would start: its arguments."""
    import accelerate.commands.launch as launcher

    calls = []
    monkeypatch.setattr(launcher, "launch_command", calls.append)
    return calls


# --- training ---------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(trained):
    _, output = trained
    metrics = read_metrics(output)
    assert "rewards/jpeg-incompressibility/mean" in metrics[0]
    assert (output / "model" / "pytorch_lora_weights.safetensors").is_file() and (output / "checkpoint-1").is_dir()


def test_without_a_model_the_demo_is_trained_and_evaluated(tmp_path, capsys):
    argv = [
        *TINY,
        "--output_dir",
        str(tmp_path / "run"),
        "--eval_prompts",
        "four circles",
        "--eval_reward",
        "demo-exact",
    ]
    assert cli.main(["train", *argv, "--eval_num_images_per_prompt", "2", "--debug"]) == 0
    printed = capsys.readouterr().out
    assert "demo: 121,728 trained parameters, 1 process on cpu\n" in printed  # rank 8 on all that the demo tunes
    assert "Reward demo-soft; 1 prompt; 1 epochs of 4 images in 2 steps; kl_weight 0.02; preset demo\n" in printed
    assert f"Model: {tmp_path / 'run' / 'model'}\n" in printed
    script, config = command.make_parser().parse(["--config", str(tmp_path / "run" / "config.yaml")])
    assert script == ScriptArguments(eval_prompts=["four circles"], eval_reward=["demo-exact"])
    assert (config.num_epochs, config.sample_batch_size, config.eval_freq) == (1, 4, 1)
    last = read_metrics(tmp_path / "run")[-1]
    assert "eval/held-out/demo-exact/tuned" in last and (tmp_path / "run" / "evaluation" / "grid.png").is_file()


def test_a_reward_of_the_current_folder(trained, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def dark(images, prompts, metadata):\n    return -images.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    argv = ["--model", str(trained[0]), "--reward", "mine:dark", "--prompts", "a cat", "--output_dir", "run", *TINY]
    assert cli.main(["train", *argv, "--sample_num_batches_per_epoch", "1", "--debug"]) == 0
    assert read_metrics(tmp_path / "run")[0]["reward"] < 0


def test_the_file_that_a_run_leaves_starts_the_same(trained):
    _, output = trained
    written = yaml.safe_load((output / "config.yaml").read_text())
    parser = command.make_parser()
    script, config = parser.parse(["--config", str(output / "config.yaml")])
    assert script == ScriptArguments(str(trained[0]), ["jpeg-incompressibility"], ["a cat"])
    assert not {"preset", "eval_prompts", "eval_reward"} & set(written)  # no preset: its settings are there
    assert (config.train_learning_rate, config.train_lora_rank) == (0.1, 2)
    assert config.sample_batch_size == written.get("sample_batch_size") == 4


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_epoch", "3"], "there is no setting --num_epoch. Did you mean --num_epochs?"),
        (["--num_proceses", "2"], "there is no setting --num_proceses. Did you mean --num_processes?"),
        (["rabbits"], "'rabbits' stands there without a setting"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--reward", "image-rewrd"], "there is no reward named 'image-rewrd'. Did you mean 'image-reward'?"),
        (["--model", "nothing/here", "--reward", "ocr", "--prompts", "x"], "nothing/here"),
        (["--resume_from", "nowhere"], "nothing to resume from at 'nowhere': there is no such folder"),
        (["--cpu", "--num_processes", "2"], "would start one process instead of 2"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, argv, words):
    argv = ["train", "--output_dir", str(tmp_path / "run"), *argv]
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("dpok-trl train: error: ")]
    assert len(error) == 1 and words in error[0] and "Traceback" not in captured.err


def test_what_to_resume_from_is_looked_for_before_a_model_is_loaded(capsys):
    argv = ["--model", "nothing/here", "--reward", "ocr", "--prompts", "x", "--resume_from", "nowhere"]
    assert cli.main(["train", *argv]) == 2
    assert "nothing to resume from at 'nowhere'" in capsys.readouterr().err


def test_a_run_is_no_pipeline(trained, capsys, tmp_path):
    argv = ["--model", str(trained[1]), "--reward", "ocr", "--prompts", "x", "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *argv]) == 2
    assert f"error: {trained[1]} is what a training left (a run, a checkpoint" in capsys.readouterr().err


def test_a_wrong_file_is_named_and_debug_shows_where(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("num_epoch: 3\n")
    argv = ["train", "--config", str(tmp_path / "recipe.yaml")]
    assert cli.main(argv) == 2
    said = f"{tmp_path / 'recipe.yaml'}: there is no setting 'num_epoch'. Did you mean num_epochs? (--debug shows where)\n"
    assert capsys.readouterr().err == f"dpok-trl train: error: {said}"
    with pytest.raises(ValueError, match="there is no setting 'num_epoch'"):
        cli.main([*argv, "--debug"])


def test_a_tracker_that_cannot_start_is_one_line(trained, monkeypatch, capsys, tmp_path):
    def fail(self):
        raise ConnectionError("no route")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", fail)
    argv = ["--model", str(trained[0]), "--reward", "jpeg-incompressibility", "--prompts", "a cat", *TINY]
    assert cli.main(["train", *argv, "--log_with", "tensorboard", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert (
        "train: error: a tracker could not be started (log_with = 'tensorboard'): ConnectionError: no route." in error
    )
    assert "Traceback" not in error


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(script, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert "dpok-trl train: interrupted" in capsys.readouterr().err


def test_help_has_every_setting_and_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert (
        all(re.search(rf"^  --{name}[ ,]", printed, re.M) for name in DPOKConfig.__dataclass_fields__)
        and "dpok-trl train --config" in printed
    )


# --- the launcher -----------------------------------------------------------------------------------------------------


def test_flags_are_dealt_out(launched):
    own = ["--num_epochs", "2", "--prompts", "a red square", "2", "--seed", "3"]
    argv = [
        "--num_epochs",
        "2",
        "--num_processes",
        "2",
        "--prompts",
        "a red square",
        "2",
        "--multi_gpu",
        "--seed",
        "3",
    ]
    assert cli.main(["train", *argv, "--debug"]) == 0
    [args] = launched
    assert (args.num_processes, args.multi_gpu, args.module) == (2, True, True)
    assert args.training_script == "dpok_trl.cli"
    assert args.training_script_args == ["train", "--launched", *own, "--debug"]


def test_accelerate_s_own_configuration_is_asked(launched, monkeypatch):
    config = SimpleNamespace(num_processes=4, use_cpu=False, distributed_type=DistributedType.MULTI_GPU)
    monkeypatch.setattr(command, "_is_configured", lambda: True)
    monkeypatch.setattr("accelerate.commands.config.config_args.load_config_from_file", lambda file: config)
    assert cli.main(["train"]) == 0 and len(launched) == 1
    config.distributed_type = DistributedType.MULTI_CPU  # Accelerate starts one process
    assert cli.main(["train"]) == 2 and len(launched) == 1


@pytest.mark.parametrize("where", ["flag", "environment"])
def test_what_was_launched_trains(launched, monkeypatch, where):
    trained = []
    monkeypatch.setattr(command, "train", lambda script, config: trained.append(config) or 0)
    monkeypatch.setattr(command, "_is_configured", lambda: True)
    if where == "environment":
        monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["train", *(["--launched"] if where == "flag" else []), "--num_epochs", "3"]) == 0
    assert [config.num_epochs for config in trained] == [3] and not launched


def test_several_gpus_need_no_flag(monkeypatch, launched):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert cli.main(["train", "--num_processes", "2"]) == 0 and len(launched) == 1
    assert cli.main(["train", "--num_processes", "2", "--cpu"]) == 2 and len(launched) == 1


def test_the_exit_code_is_that_of_the_process(monkeypatch):
    def failed(args):
        raise subprocess.CalledProcessError(7, "train")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", failed)
    assert cli.main(["train", "--num_processes", "1"]) == 7


@pytest.mark.slow
def test_two_processes_as_the_refusal_says(tmp_path):
    """What `refuse_one_process` recommends on CPUs."""
    argv = ["-m", "dpok_trl.cli", "train", *TWO_PROCESSES, *TINY, "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 processes on cpu" in result.stdout
    assert read_metrics(tmp_path / "run")[0]["images"] == 8
    assert Path(tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors").is_file()
