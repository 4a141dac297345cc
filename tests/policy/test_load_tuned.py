"""`load_tuned`: from what a training left to a pipeline that draws the trained one's images."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, WanPipeline
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from tiny import nudge, stable_diffusion
from walks import image
from zoo import build, call_arguments
from zoo.wan import wan_transformer

from dpok_trl import load_tuned
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.saved import base_model, find_model
from dpok_trl.policy.tuning import tune


def trained(pipe, folder, **kwargs):
    """Nudges what `tune` makes trainable, and saves it as a checkpoint does."""
    if "full" not in kwargs:
        kwargs["peft_config"] = {
            name: LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"])
            for name in PipelineHooks().denoisers(pipe)
        }
    tuned = tune(pipe, PipelineHooks().denoisers(pipe), **kwargs)
    for module in tuned.modules.values():
        nudge(module, 0.02 if tuned.full else 0.3)
    folder.mkdir(exist_ok=True)
    tuned.save(pipe, folder)
    return pipe


def card(folder, base):
    ModelCard(f"---\n{ModelCardData(base_model=base).to_yaml()}\n---\n").save(folder / "README.md")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["lora", "text encoders", "peft", "all weights"])
def test_every_kind_draws_the_identical_image(kind, base, tmp_path, monkeypatch):
    if kind == "peft":
        monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", None)
    kwargs = {"text encoders": {"text_encoders": True}, "all weights": {"full": True}}.get(kind, {})
    pipe = trained(stable_diffusion(), tmp_path, **kwargs)
    card(tmp_path, str(base))
    loaded = load_tuned(tmp_path, device="cpu")
    assert torch.equal(image(loaded), image(pipe))
    assert not torch.equal(image(loaded), image(stable_diffusion()))
    assert torch.equal(image(load_tuned(str(tmp_path), base=stable_diffusion())), image(pipe))


def test_a_second_expert(tmp_path):
    def make():
        torch.manual_seed(1)
        return build(WanPipeline, transformer_2=wan_transformer(), boundary_ratio=0.875)

    def frames(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", generator=generator, output_type="pt", **call_arguments(pipe)).frames

    pipe = trained(make(), tmp_path)
    assert (tmp_path / "pytorch_lora_weights_transformer_2.safetensors").is_file()
    loaded = load_tuned(tmp_path, base=make())
    assert torch.equal(frames(loaded), frames(pipe))
    (tmp_path / "pytorch_lora_weights_transformer_2.safetensors").unlink()
    assert not torch.equal(frames(load_tuned(tmp_path, base=make())), frames(pipe))  # it takes part


def test_a_whole_pipeline_needs_no_base(tmp_path):
    pipe = stable_diffusion()
    nudge(pipe.unet, 0.02)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(image(load_tuned(tmp_path)), image(pipe))


def test_dtype_and_device(base, tmp_path):
    trained(stable_diffusion(), tmp_path)
    loaded = load_tuned(tmp_path, "bf16", "cpu", base)
    assert loaded.vae.dtype == loaded.text_encoder.dtype == torch.bfloat16 and loaded.device.type == "cpu"
    with pytest.raises(ValueError, match="dtype = 'half', but it must be one of fp32, bf16, fp16"):
        load_tuned(tmp_path, "half", base=base)


def test_a_run_gives_its_newest_whole_checkpoint_on_the_base_that_it_names(base, tmp_path):
    pipe = trained(stable_diffusion(), tmp_path / "checkpoint-20")
    trained(stable_diffusion(), tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-100").mkdir()  # half-written
    for step in (3, 20):
        state = {"files": {}, "config": {}, "base_model": str(base)}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert find_model(tmp_path) == tmp_path / "checkpoint-20"
    assert torch.equal(image(load_tuned(tmp_path)), image(pipe))


def test_the_shipped_pipeline_as_the_base(tmp_path):
    from dpok_trl.demo import load_demo_pipeline

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a red square", num_inference_steps=2, generator=generator, output_type="pt").images

    pipe = trained(load_demo_pipeline(), tmp_path)
    expected = picture(pipe)
    assert torch.equal(picture(load_tuned(tmp_path, base="demo", device="cpu")), expected)
    # a checkpoint of it, from a machine where this package lies elsewhere
    for folder in ("/opt/lib/dpok_trl/demo/assets/pipeline", "C:\\lib\\dpok_trl\\demo\\assets\\pipeline"):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"base_model": folder}))
        assert base_model(tmp_path) == "demo"
    assert torch.equal(picture(load_tuned(tmp_path, device="cpu")), expected)
    assert not torch.equal(picture(load_demo_pipeline()), expected)


@pytest.mark.parametrize(
    ("in_the_card", "expected"), [("a/b", "a/b"), (["a/b"], "a/b"), (["a/b", "c/d"], None), (None, None)]
)
def test_the_base_in_a_card(in_the_card, expected, tmp_path):
    card(tmp_path, in_the_card)
    assert base_model(tmp_path) == expected


def test_errors_say_the_way_out(base, tmp_path):
    trained(stable_diffusion(), tmp_path / "lora")
    with pytest.raises(
        ValueError,
        match=r"neither a model card nor .*Give it: load_tuned\('.*lora', base='owner/name'\), or base='demo' for",
    ):
        load_tuned(tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="there is no folder ./nowhere, and a Hub id has the form owner/name"):
        load_tuned("./nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder me/rabbit here, and as a Hub id: "):
        load_tuned("me/rabbit")  # HF_HUB_OFFLINE
    with pytest.raises(FileNotFoundError, match="holds no model: no pytorch_lora_weights.safetensors, no model_index"):
        load_tuned(tmp_path)
