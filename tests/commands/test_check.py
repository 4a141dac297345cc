"""`dpok-trl check`: what it prints, its exit codes, and the settings that it recommends."""

import dataclasses
import inspect
import json
import re

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionUpscalePipeline,
    WanImageToVideoPipeline,
)
from PIL import Image
from zoo import build

from dpok_trl import DPOKConfig, DPOKTrainer, check_pipeline, cli
from dpok_trl.commands import check
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.policy.check import PipelineReport, StepReport


QUICK = ["--steps", "3", "--device", "cpu"]


def next_config(printed):
    """The settings of the line that says what to do next."""
    return eval(re.search(r'^Next: DPOKTrainer\((DPOKConfig\(.*?\)), (?:reward|"demo-soft"), ', printed, re.M)[1])


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
    assert f"\n{report}\n" in printed
    table = [line.split() for line in printed.splitlines() if re.match(r" +\d", line)]
    assert [row[3:5] for row in table] == [["0", "1"]] * 3
    assert "It can be tuned: each of the 3 stochastic steps" in printed
    config = next_config(printed)
    assert (config.sample_num_steps, config.sample_guidance_scale) == (3, 2.0)


def test_the_run_after_a_check_of_the_demo(tmp_path, capsys, fresh_accelerate):
    assert cli.main(["check", "demo", *QUICK]) == 0
    printed = capsys.readouterr().out
    imports = re.search(r"In Python: (from dpok_trl import .*)", printed)[1]
    namespace = {}
    exec(imports, namespace)
    [line] = re.findall(r"^Next: (DPOKTrainer\(.*\))\.train\(\)$", printed, re.M)
    trainer = eval(line.replace("DPOKConfig(", f"DPOKConfig(output_dir={str(tmp_path)!r}, ", 1), namespace)
    trainer.train(1)
    assert trainer.last_metrics["images"] > 0 and trainer.rewards.names == ["demo-soft"]


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
    argv += ["--set", "guidance_rescale=0.5", "--set", "negative_prompt=a dog"]
    assert cli.main(["check", str(saved), *QUICK, *argv, "--debug"]) == 0
    assert str(seen.pop("dtype")) == "torch.bfloat16"
    assert seen == {
        "prompts": check.PROMPTS,
        "arguments": {},
        "call_kwargs": {
            "num_inference_steps": 3,
            "guidance_scale": 7.5,
            "height": 16,
            "width": 32,
            "guidance_rescale": 0.5,
            "negative_prompt": "a dog",
        },
        "kind": "cps",
        "eta": 0.5,
        "noise_level": 0.7,
        "fp32_latents": True,
        "scheduler": "DDIMScheduler",
    }
    config = next_config(capsys.readouterr().out)
    assert config == DPOKConfig(
        exp_name=config.exp_name,
        sample_num_steps=3,
        sample_guidance_scale=7.5,
        sample_transition="cps",
        sample_eta=0.5,
        sample_fp32_latents=True,
        model_dtype="bf16",
        negative_prompts="a dog",
        sample_call_kwargs={"height": 16, "width": 32, "guidance_rescale": 0.5},
    )


def test_the_noise_level_reaches_the_check(saved, monkeypatch, capsys):
    seen = {}

    def spy(pipe, **kwargs):
        seen.update(kwargs)
        return check_pipeline(pipe, **kwargs)

    monkeypatch.setattr("dpok_trl.policy.check.check_pipeline", spy)
    assert cli.main(["check", str(saved), *QUICK, "--noise-level", "0.6"]) == 0
    assert seen["noise_level"] == 0.6 and "sample_noise_level=0.6" in capsys.readouterr().out


def test_another_scheduler_on_the_settings_of_the_first(saved, capsys):
    for name in ("EulerAncestralDiscrete", "eulerancestraldiscretescheduler", "EulerAncestral"):
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


def test_the_shift_of_a_flow_has_two_names():
    pipe = build(SanaPipeline)
    pipe.scheduler.register_to_config(flow_shift=2.5)
    line = check.change_scheduler(pipe, "FlowMatchEuler")
    assert line == "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=2.5)"
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and pipe.scheduler.config.shift == 2.5


def test_arguments_of_the_call_that_are_named_like_options(tmp_path, capsys, monkeypatch):
    seen = []
    original = StableDiffusionUpscalePipeline.__call__

    def call(self, *args, noise_level=20, **kwargs):
        seen.append(noise_level)
        return original(self, *args, noise_level=noise_level, **kwargs)

    call.__signature__ = inspect.signature(original)
    build(StableDiffusionUpscalePipeline).save_pretrained(tmp_path / "pipeline")
    Image.new("RGB", (16, 16), "green").save(tmp_path / "green.png")
    monkeypatch.setattr(StableDiffusionUpscalePipeline, "__call__", call)
    argv = ["check", str(tmp_path / "pipeline"), *QUICK, "--picture", f"image={tmp_path / 'green.png'}"]
    assert cli.main([*argv, "--set", "noise_level=30"]) == 0
    assert set(seen) == {30}
    config = next_config(capsys.readouterr().out)
    assert config.sample_call_kwargs == {"noise_level": 30} and config.sample_noise_level == 0.7


@pytest.mark.parametrize(
    ("pipeline_class", "argv", "scale"),
    [
        (FluxPipeline, [], 3.5),  # the default of its call
        (FluxPipeline, ["--guidance-scale", "2"], 2.0),
        (FluxPipeline, ["--set", "guidance_scale=2.5"], 2.5),
        (QwenImagePipeline, [], DPOKConfig.sample_guidance_scale),  # its default is None, which a run cannot say
    ],
)
def test_the_guidance_of_the_check_is_that_of_the_run(tmp_path, capsys, monkeypatch, pipeline_class, argv, scale):
    seen = {}

    def spy(pipe, **kwargs):
        seen.update(kwargs["call_kwargs"])
        return PipelineReport(True, "", "", "", [StepReport(0, 0.0, 1.0, 0.0, 1.0, 1.0)])

    monkeypatch.setattr("dpok_trl.policy.check.check_pipeline", spy)
    build(pipeline_class).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), *QUICK, *argv]) == 0
    assert seen["guidance_scale"] == next_config(capsys.readouterr().out).sample_guidance_scale == scale


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def green(tmp_path):
    """A picture in a file, with an alpha channel."""
    Image.new("RGBA", (16, 16), "green").save(tmp_path / "green.png")
    return tmp_path / "green.png"


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons, and remembers mixed precision in the environment."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def train_what_was_printed(printed, folder, prompts):
    """Executes the lines that say what to do next, for one epoch."""
    namespace = {"DPOKConfig": DPOKConfig, "prompts": prompts}
    for code in re.findall(r"^(?:Pictures are opened with|Prompts come with their pictures): (.*)", printed, re.M):
        exec(code, namespace)
    source, model = re.search(
        r"^Next: DPOKTrainer\((DPOKConfig\(.*\)), reward, prompts, (\".*\")\)\.train\(\)", printed, re.M
    ).groups()
    config = dataclasses.replace(eval(source, namespace), output_dir=str(folder), num_epochs=1)
    trainer = DPOKTrainer(config, lambda images, *_: images.flatten(1).mean(dim=1), namespace["prompts"], eval(model))
    trainer.train()
    return trainer


def test_the_run_after_a_check_with_a_picture(tmp_path, green, capsys, fresh_accelerate):
    build(StableDiffusionImg2ImgPipeline).save_pretrained(tmp_path / "pipeline")
    argv = ["check", str(tmp_path / "pipeline"), *QUICK, "--picture", f"image={green}", "--set", "strength=1.0"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    trainer = train_what_was_printed(printed, tmp_path / "run", None)
    assert trainer.config.sample_call_columns == ["image"] and trainer.config.sample_call_kwargs == {"strength": 1.0}
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) > 1


def test_a_call_that_takes_one_picture_for_all(tmp_path, green, capsys, fresh_accelerate):
    build(WanImageToVideoPipeline).save_pretrained(tmp_path / "pipeline")
    argv = ["check", str(tmp_path / "pipeline"), *QUICK, "--height", "16", "--width", "16"]
    argv += ["--set", "num_frames=5", "--set", "max_sequence_length=16"]
    assert cli.main([*argv, "--picture", f"image={green}"]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert "raised ValueError: `image` has to be of type" in error and "--same-picture NAME=FILE" in error
    assert cli.main([*argv, "--same-picture", f"image={green}"]) == 0
    trainer = train_what_was_printed(capsys.readouterr().out, tmp_path / "run", ["a photo of a cat"])
    assert trainer.config.sample_call_kwargs["image"].mode == "RGB"


def test_a_file_that_is_no_picture_is_noticed_before_the_model(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (("none.png", "No such file"), ("text.png", "cannot identify image file")):
        for option in ("--picture", "--same-picture"):
            assert cli.main(["check", "nobody/nothing", option, f"image={tmp_path / name}"]) == cli.USER_ERROR
            captured = capsys.readouterr()
            assert words in captured.err and captured.err.count("\n") == 1 and "Loading" not in captured.out


# --- small steps ------------------------------------------------------------------------------------------------------


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
        ("Eulr", "no scheduler 'Eulr'. Did you mean one of: EulerDiscrete"),
        ("EulerAnc", "Did you mean one of: EulerAncestralDiscrete"),
        ("DIM", "Did you mean one of: DDIM"),
        ("xyzw", "diffusers has no scheduler 'xyzw'. (--debug"),
    ],
)
def test_unknown_schedulers_are_noticed_before_the_model(capsys, name, words):
    assert cli.main(["check", "nobody/nothing", *QUICK, "--scheduler", name]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("dpok-trl check: error: ") and captured.out == ""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Euler", "EulerDiscreteScheduler"),
        ("Heun", "HeunDiscreteScheduler"),
        ("FlowMatchEuler", "FlowMatchEulerDiscreteScheduler"),
        ("DDIM", "DDIMScheduler"),
        ("ddimScheduler", "DDIMScheduler"),
    ],
)
def test_names_of_schedulers(name, found):
    assert check.find_scheduler(name) == found


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "--steps 0: a call takes at least one step"),
        (["--device", "gpu"], "--device gpu cannot be used here: "),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here: "),
    ],
)
def test_what_is_wrong_whatever_the_model(capsys, argv, words):
    assert cli.main(["check", "nobody/nothing", *argv]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda:1 may be there")
def test_no_cuda_here(capsys):
    assert cli.main(["check", "demo", "--device", "cuda:1"]) == cli.USER_ERROR
    assert "--device cuda:1 cannot be used here: " in capsys.readouterr().err


def test_what_is_no_pipeline(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    tiny.stable_diffusion().save_pretrained(tmp_path / "own")
    index = tmp_path / "own" / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"MyPipeline"'))
    capsys.readouterr()  # transformers' progress bars
    for model, words in [
        (tmp_path / "own", "the class MyPipeline is not diffusers' own: load it yourself"),
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
        (["--set", "eta=0.5"], "'eta' cannot be an argument of the call: the noise of the steps is the policy's own"),
        (["--set", "hooks=1"], "takes no 'hooks'"),
        (["--set", "prompt_embeds=[1]"], "StableDiffusionPipeline raised ValueError: Cannot forward both `prompt`"),
        (["--transition", "flow_sde"], "needs a flow-matching scheduler"),
        (["--eta", "0"], "eta"),
    ],
)
def test_arguments_that_do_not_fit(saved, capsys, argv, words):
    assert cli.main(["check", str(saved), *QUICK, *argv]) == cli.USER_ERROR
    error = capsys.readouterr().err.splitlines()[-1]  # after transformers' progress bars
    assert words in error and error.startswith("dpok-trl check: error: ")
    assert ("raised" in error) == ("--picture NAME=FILE" in error)


def test_a_picture_that_is_missing(tmp_path, capsys):
    build(WanImageToVideoPipeline).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), *QUICK]) == cli.USER_ERROR
    error = capsys.readouterr().err.splitlines()[-1]
    assert "WanImageToVideoPipeline raised TypeError: " in error
    assert "missing 1 required positional argument: 'image'" in error and "--picture NAME=FILE" in error


def test_a_strength_that_leaves_no_step(tmp_path, green, capsys):
    build(StableDiffusionImg2ImgPipeline).save_pretrained(tmp_path / "pipeline")
    argv = ["--picture", f"image={green}", "--set", "strength=0.1"]
    assert cli.main(["check", str(tmp_path / "pipeline"), *QUICK, *argv]) == cli.USER_ERROR
    assert "StableDiffusionImg2ImgPipeline raised RuntimeError: " in capsys.readouterr().err


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


@pytest.mark.parametrize(("value", "spelling"), [("True", "true"), ("False", "false"), ("None", "null")])
def test_words_of_python_are_no_json(capsys, value, spelling):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "demo", "--set", f"clean_caption={value}"])
    assert stop.value.code == cli.USER_ERROR and f"write clean_caption={spelling}" in capsys.readouterr().err


def test_an_unknown_option_shows_the_usage_of_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "demo", "--stepps", "3"])
    error = capsys.readouterr().err
    assert stop.value.code == cli.USER_ERROR
    assert error.startswith("usage: dpok-trl check ") and error.endswith(
        "unrecognized arguments: --stepps 3. Did you mean --steps?\n"
    )
