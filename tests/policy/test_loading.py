"""Pipelines by name: loaded as they are."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline
from tiny import nudge, stable_diffusion, stable_diffusion_xl
from walks import image

from dpok_trl import DPOKConfig, DPOKTrainer, check_pipeline
from dpok_trl.demo import demo_pipeline_path
from dpok_trl.policy.loading import load_pipeline
from dpok_trl.policy.tuning import tune


@pytest.mark.parametrize(
    "scheduler",
    [PNDMScheduler(skip_prk_steps=True, steps_offset=1), DDPMScheduler(clip_sample=False, steps_offset=1)],
    ids=["pndm", "ddpm"],
)
@pytest.mark.parametrize("as_string", [False, True])
def test_a_pipeline_by_name_keeps_its_scheduler(scheduler, as_string, tmp_path):
    stable_diffusion(scheduler=scheduler).save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path) if as_string else tmp_path).scheduler
    assert type(loaded) is type(scheduler)
    own = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in own} == own


def test_a_pipeline_as_an_object_is_taken_as_it_is():
    pipe = stable_diffusion_xl()
    assert load_pipeline(pipe) is pipe


def test_anything_else_is_refused():
    with pytest.raises(
        ValueError, match="must be a diffusers pipeline, a Hub id or a folder; given: UNet2DConditionModel"
    ):
        load_pipeline(stable_diffusion().unet)


def test_a_dtype_without_a_warning(tmp_path, caplog, recwarn):
    stable_diffusion().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        pipe = load_pipeline(tmp_path, "bf16")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    said = caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert "torch_dtype" not in said and "ignored" not in said


def test_demo_is_the_name_of_the_shipped_pipeline(tmp_path, monkeypatch):
    stable_diffusion().save_pretrained(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert load_pipeline("demo").config["_name_or_path"] == str(demo_pipeline_path())
    for folder in ("./demo", Path("./demo").absolute()):
        assert load_pipeline(folder).config["_name_or_path"] == str(folder)


# --- names that lead nowhere ------------------------------------------------------------------------------------------


class MyPipeline(StableDiffusionPipeline):
    pass


@pytest.mark.parametrize(
    "left", ["checkpoint-3/trainer_state.json", "pytorch_lora_weights.safetensors", "model/dpok_config.json"]
)
def test_what_a_training_left_is_no_pipeline(left, tmp_path):
    with pytest.raises(OSError) as of_an_empty_folder:
        load_pipeline(tmp_path)
    assert "what a training left" not in str(of_an_empty_folder.value)
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    for folder in {tmp_path, (tmp_path / left).parent}:
        with pytest.raises(
            FileNotFoundError, match="is what a training left .* Give the pipeline that it was trained"
        ):
            load_pipeline(str(folder))


def test_a_class_that_is_not_of_diffusers(tmp_path):
    pipe = stable_diffusion()
    MyPipeline(**pipe.components, requires_safety_checker=False).save_pretrained(tmp_path / "own")
    words = r"the class MyPipeline is not diffusers' own: load it yourself \(`MyPipeline.from_pretrained\(...\)`\)"
    config = DPOKConfig(output_dir=str(tmp_path / "run"))
    for load in (load_pipeline, check_pipeline, lambda name: DPOKTrainer(config, lambda *_: None, ["a"], name)):
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path / "own"))
    assert check_pipeline(MyPipeline.from_pretrained(tmp_path / "own"), num_inference_steps=2).ok


def test_another_attribute_error_is_not_explained_away(tmp_path, monkeypatch):
    stable_diffusion().save_pretrained(tmp_path)

    def broken(cls, name, **kwargs):
        raise AttributeError("something else")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(broken))
    with pytest.raises(AttributeError, match="something else"):
        load_pipeline(tmp_path)


def test_a_path_that_could_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def unreachable(cls, name, **kwargs):
        raise OSError(f"{name} is not there")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(unreachable))
    with pytest.raises(OSError, match="^there is no folder m/Nothere here, and as a Hub id: m/Nothere is not there$"):
        load_pipeline("m/Nothere")
    (tmp_path / "m").mkdir()
    with pytest.raises(OSError, match="^m is not there$"):
        load_pipeline("m")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pipeline_class", [StableDiffusionPipeline, MyPipeline])
def test_the_loading_code_of_a_model_card_runs(pipeline_class, full, tmp_path):
    components = stable_diffusion().components
    pipeline_class(**components, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    pipe = pipeline_class(**components, requires_safety_checker=False)
    tuned = tune(pipe, {"unet": pipe.unet}, full=full)
    nudge(pipe.unet)
    tuned.export(pipe, tmp_path / "tuned")
    code = tuned.loading_code(pipe, str(tmp_path / "base"), str(tmp_path / "tuned"))
    namespace = {} if pipeline_class is StableDiffusionPipeline else {"MyPipeline": MyPipeline}
    exec(code, namespace)
    assert type(namespace["pipe"]) is pipeline_class
    assert torch.equal(image(namespace["pipe"]), image(pipe))
