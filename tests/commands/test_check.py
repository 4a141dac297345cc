"""`dpok-trl check`: what it prints, its exit codes, and the settings that it recommends."""

import re

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    WanImageToVideoPipeline,
)
from PIL import Image
from zoo import build

from dpok_trl import DPOKConfig, check_pipeline, cli
from dpok_trl.commands import check
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.policy.check import PipelineReport, StepReport


QUICK = ["--steps", "3", "--device", "cpu"]


def next_config(printed):
    """The settings of the line that says what to do next."""
    return eval(re.search(r"^Next: DPOKTrainer\((DPOKConfig\(.*?\)), reward, ", printed, re.M)[1])


@pytest.fixture
def saved(tmp_path):
    """A tiny Stable Diffusion as a folder."""
    folder = tmp_path / "pipeline"
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


# --- pipelines that can be tuned --------------------------------------------------------------------------------------


def test_the_demo_pipeline_passes_and_the_numbers_are_those_of_check_pipeline(capsys):
    argv = ["--guidance-scale", "2", "--prompt", "a red square", "--prompt", "four circles"]
    assert cli.main(["check", "demo", *QUICK, *argv, "--debug"]) == 0
    printed = capsys.readouterr().out
    prompts = ["a red square", "four circles"]
    report = check_pipeline(load_demo_pipeline(), prompts=prompts, num_inference_steps=3, guidance_scale=2.0)
    table = [line.split() for line in printed.splitlines() if re.match(r" +\d", line)]
    assert [int(row[0]) for row in table] == [step.step_index for step in report.steps]
    assert [row[3:5] for row in table] == [["0", "1"]] * 3
    # the gradient of an adapter's B depends on its random A, so only what does not is compared
    assert [row[1:3] for row in table] == [[f"{s.timestep:.4g}", f"{s.std:.4g}"] for s in report.steps]
    assert "It can be tuned: each of the 3 stochastic steps" in printed
    assert "demo_pipeline_path()" in printed
    config = next_config(printed)
    assert (config.sample_num_steps, config.sample_guidance_scale) == (3, 2.0)


def test_every_option_reaches_the_check(saved, capsys, monkeypatch):
    seen = {}

    def spy(pipe, **kwargs):
        seen.update(kwargs, dtype=pipe.unet.dtype, scheduler=type(pipe.scheduler).__name__)
        return check_pipeline(pipe, **kwargs)

    monkeypatch.setattr("dpok_trl.policy.check.check_pipeline", spy)
    argv = [
        "--height",
        "16",
        "--width",
        "32",
        "--eta",
        "0.5",
        "--transition",
        "cps",
        "--fp32-latents",
        "--dtype",
        "bf16",
    ]
    argv += ["--noise-level", "0.6", "--set", "guidance_rescale=0.5", "--set", "negative_prompt=a dog"]
    assert cli.main(["check", str(saved), *QUICK, *argv, "--debug"]) == 0
    assert str(seen.pop("dtype")) == "torch.bfloat16"
    assert seen == {
        "prompts": check.PROMPTS,
        "num_inference_steps": 3,
        "height": 16,
        "width": 32,
        "guidance_rescale": 0.5,
        "negative_prompt": "a dog",
        "kind": "cps",
        "eta": 0.5,
        "noise_level": 0.6,
        "fp32_latents": True,
        "scheduler": "DDIMScheduler",
    }
    config = next_config(capsys.readouterr().out)
    assert config == DPOKConfig(
        exp_name=config.exp_name,
        sample_num_steps=3,
        sample_transition="cps",
        sample_eta=0.5,
        sample_noise_level=0.6,
        sample_fp32_latents=True,
        model_dtype="bf16",
        negative_prompts="a dog",
        sample_call_kwargs={"height": 16, "width": 32, "guidance_rescale": 0.5},
    )


def test_another_scheduler_on_the_settings_of_the_first(saved, capsys):
    for name in ("EulerAncestralDiscrete", "eulerancestraldiscretescheduler"):
        assert cli.main(["check", str(saved), *QUICK, "--scheduler", name]) == 0
        printed = capsys.readouterr().out
        assert "StableDiffusionPipeline with EulerAncestralDiscreteScheduler: ok" in printed
        line = "pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)"
        assert f"With this scheduler: {line}\nNext: " in printed and "reward, prompts, pipe)" in printed


def test_ddim_on_a_scheduler_without_its_settings_does_not_clamp():
    pipe = tiny.stable_diffusion(tiny.EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    line = check.change_scheduler(pipe, "DDIM")
    assert type(pipe.scheduler) is DDIMScheduler and pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert not pipe.scheduler.config.clip_sample and not pipe.scheduler.config.set_alpha_to_one
    assert line.endswith("(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)")


def test_pictures_of_the_call(tmp_path, capsys):
    build(StableDiffusionImg2ImgPipeline).save_pretrained(tmp_path / "pipeline")
    Image.new("RGBA", (16, 16), "green").save(tmp_path / "green.png")
    argv = ["check", str(tmp_path / "pipeline"), *QUICK]
    assert cli.main([*argv, "--picture", f"image={tmp_path / 'green.png'}", "--set", "strength=1.0"]) == 0
    assert "It can be tuned" in capsys.readouterr().out
    assert cli.main([*argv, "--picture", f"image={tmp_path / 'none.png'}"]) == cli.USER_ERROR
    assert "none.png" in capsys.readouterr().err


def report_of(*stds_and_norms):
    steps = [StepReport(i, 0.0, std, 0.0, 1.0, norm) for i, (std, norm) in enumerate(stds_and_norms)]
    return PipelineReport(True, "", "", "", steps)


@pytest.mark.parametrize(
    ("steps", "floor"),
    [
        ([(0.8, 1.0), (0.5, 1.2), (0.2, 2.0)], None),
        ([(0.8, 1.0), (0.5, 1.2), (0.0063, 90.0)], 0.0064),
        ([(0.8, 1.0), (0.5, 1.2), (0.4, 1.3), (0.02, 50.0), (0.01, 90.0)], 0.02),
        ([(0.8, 1.0), (0.5, 1.2), (0.02, 90.0), (0.01, 1.0)], None),  # no floor parts them
    ],
)
def test_a_floor_for_steps_that_would_decide_an_update(steps, floor):
    assert check.dominant_steps(report_of(*steps)) == (None if floor is None else pytest.approx(floor, rel=0.05))


# --- pipelines that cannot, and errors --------------------------------------------------------------------------------


def test_a_refused_scheduler_is_exit_code_1(tmp_path, capsys):
    tiny.stable_diffusion(HeunDiscreteScheduler()).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), *QUICK]) == check.NOT_USABLE
    captured = capsys.readouterr()
    assert "with HeunDiscreteScheduler: not usable. " in captured.out
    assert "EulerAncestralDiscreteScheduler" in captured.out and "It cannot be tuned as it is" in captured.out
    assert "Next:" not in captured.out


def test_a_grid_that_repeats_a_level_is_not_usable(tmp_path, capsys):
    build(FluxPipeline, scheduler=FlowMatchEulerDiscreteScheduler(shift=1e9)).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), *QUICK]) == check.NOT_USABLE
    assert (
        "FlowMatchEulerDiscreteScheduler cannot be walked as it is set: the scheduler repeats"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Euler", "no scheduler 'Euler'. Did you mean one of: EulerAncestralDiscrete, EulerDiscrete"),
        ("DIM", "Did you mean one of: DDIM"),
        ("xyzw", "diffusers has no scheduler 'xyzw'. (--debug"),
    ],
)
def test_unknown_schedulers(saved, capsys, name, words):
    assert cli.main(["check", str(saved), *QUICK, "--scheduler", name]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert words in error and error.splitlines()[-1].startswith("dpok-trl check: error: ")


def test_what_is_no_pipeline(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    for model, words in [
        (tmp_path / "missing", "there is no folder"),
        ("sd15", "there is no folder sd15, and a Hub id has the form owner/name"),
        (tmp_path, "holds no model_index.json"),
        (tmp_path / "model.safetensors", "is a single file"),
    ]:
        assert cli.main(["check", str(model)]) == cli.USER_ERROR
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--set", "no_such_argument=1"], "takes no 'no_such_argument'"),
        (["--set", "num_images_per_prompt=2"], "repeat the prompt instead"),
        (["--transition", "flow_sde"], "needs a flow-matching scheduler"),
        (["--eta", "0"], "eta"),
    ],
)
def test_arguments_that_do_not_fit(saved, capsys, argv, words):
    assert cli.main(["check", str(saved), *QUICK, *argv]) == cli.USER_ERROR
    assert words in capsys.readouterr().err


def test_a_picture_that_is_missing(tmp_path, capsys):
    build(WanImageToVideoPipeline).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), *QUICK]) == cli.USER_ERROR
    error = capsys.readouterr().err.splitlines()[-1]
    assert "missing 1 required positional argument: 'image'" in error and "--picture NAME=FILE" in error


def test_too_little_memory(saved, capsys, monkeypatch):
    def check_pipeline(pipe, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")

    monkeypatch.setattr("dpok_trl.policy.check.check_pipeline", check_pipeline)
    assert cli.main(["check", str(saved), *QUICK]) == cli.USER_ERROR
    assert "cpu has too little memory. Try --dtype bf16" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["height", "=3", "a b=3", "image="])
def test_assignments_without_a_name_or_a_value(capsys, text):
    with pytest.raises(SystemExit):
        cli.main(["check", "demo", "--set", text])
    assert "is not of the form name=value" in capsys.readouterr().err
