"""What training leaves: an adapter that a stock pipeline loads to the identical image, and that can be trained on."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from tiny import FAMILIES, nudge, stable_diffusion

from dpok_trl.policy.lora import adapter_layers, adapter_name
from dpok_trl.training import publishing


FINITE_DIFFERENCE = 1e-2  # of a log-probability in float32, which is curved


def image(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    output = pipe("a cat", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="np")
    return torch.from_numpy(output.images)


TRAIN = {"num_epochs": 2, "train_learning_rate": 2e-2, "sample_num_steps": 3}


@pytest.mark.parametrize("alpha", [2, 6], ids=["alpha = rank", "alpha = 3 rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_pipeline_loads_it_to_the_identical_image(family, alpha, make_trainer, tmp_path):
    trainer = make_trainer(pipe=FAMILIES[family](), train_lora_rank=2, train_lora_alpha=alpha, **TRAIN)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    stock = FAMILIES[family]()
    base = image(stock)
    stock.load_lora_weights(str(tmp_path / "model"))
    tuned = image(trainer.pipeline)
    assert torch.equal(image(stock), tuned)
    assert not torch.equal(base, tuned)
    stock.unload_lora_weights()
    assert torch.equal(image(stock), base)


def test_a_peft_config_is_used_and_comes_back(make_trainer, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_k", "conv1"], use_rslora=True)
    trainer = make_trainer(peft_config=config, **TRAIN)
    assert any("conv1" in name for name, p in trainer.policy.named_parameters() if p.requires_grad)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    stock = stable_diffusion()
    stock.load_lora_weights(str(tmp_path / "model"))
    assert torch.equal(image(stock), image(trainer.pipeline))


def test_only_the_adapter_is_written(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "pytorch_lora_weights.safetensors", "README.md", "dpok_config.json"
    }  # fmt: skip
    with safe_open(tmp_path / "model" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all("lora" in key for key in file.keys()) and "lora_alpha" in str(file.metadata())  # noqa: SIM118


@pytest.fixture
def saved(make_trainer, tmp_path):
    """A trained adapter whose alpha is not its rank."""
    trainer = make_trainer(output_dir=str(tmp_path / "first"), train_lora_rank=2, train_lora_alpha=6, **TRAIN)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    return trainer, tmp_path / "model"


def test_a_loaded_adapter_is_trained_on(saved, make_trainer, adapter, lines, tmp_path):
    first, folder = saved
    pipe = stable_diffusion()
    pipe.load_lora_weights(str(folder))
    second = make_trainer(pipe=pipe, output_dir=str(tmp_path / "second"), **TRAIN)
    assert {name for layer in adapter_layers(pipe.unet) for name in layer.lora_A} == {adapter_name(pipe.unet)}
    assert {layer.scaling[adapter_name(pipe.unet)] for layer in adapter_layers(pipe.unet)} == {3.0}
    end, start = list(adapter(first).values()), list(adapter(second).values())
    assert len(end) == len(start) and all(torch.equal(a, b) for a, b in zip(end, start, strict=True))
    second.train()
    assert lines(second, "kl")[0]["kl"] > 0  # the reference is the pretrained model, not the loaded adapter
    moved = [not torch.equal(a, b) for a, b in zip(start, adapter(second).values(), strict=True)]
    assert all(moved)
    assert {name for layer in adapter_layers(pipe.unet) for name in layer.lora_A} == {adapter_name(pipe.unet)}
    second.save_model(tmp_path / "again")
    stock = stable_diffusion()
    stock.load_lora_weights(str(tmp_path / "again"))
    assert torch.equal(image(stock), image(pipe))


def test_a_peft_config_beside_a_loaded_adapter_is_refused(saved, make_trainer):
    pipe = stable_diffusion()
    pipe.load_lora_weights(str(saved[1]))
    with pytest.raises(
        ValueError, match=r"already has the adapter 'default_0'.*Leave `peft_config` out.*unload_lora_weights"
    ):
        make_trainer(pipe=pipe, peft_config=LoraConfig(r=2, target_modules=["to_k"]))


def test_two_active_adapters_are_refused(saved, make_trainer):
    pipe = stable_diffusion()
    pipe.load_lora_weights(str(saved[1]), adapter_name="one")
    pipe.load_lora_weights(str(saved[1]), adapter_name="two")
    pipe.set_adapters(["one", "two"])
    with pytest.raises(ValueError, match="2 active adapters.*exactly one can be trained"):
        make_trainer(pipe=pipe)


def test_the_base_is_frozen_and_the_adapter_is_float32_on_a_half_precision_base(make_trainer, adapter):
    pipe = stable_diffusion().to(torch.bfloat16)
    trainer = make_trainer(pipe=pipe)
    trainer.train()
    assert {tensor.dtype for tensor in adapter(trainer).values()} == {torch.float32}
    frozen = {p.dtype for p in pipe.unet.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert not any(p.requires_grad for module in (pipe.vae, pipe.text_encoder) for p in module.parameters())


# ---------------------------------------------------------------- the card and the Hub


def test_the_card(make_trainer, tmp_path):
    pipe = stable_diffusion()
    pipe.register_to_config(_name_or_path="someone/tiny-diffusion")
    trainer = make_trainer(pipe=pipe, hub_model_id="me/rabbit-lora", output_dir=str(tmp_path / "secret"), **TRAIN)
    trainer.train()
    trainer.create_model_card(dataset_name="someone/prompts", tags="rabbits")
    card = ModelCard.load(trainer.output_dir / "README.md")
    assert card.data.base_model == "someone/tiny-diffusion" and card.data.datasets == "someone/prompts"
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"lora", "dpok", "rabbits"} <= set(card.data.tags)
    assert (
        'from_pretrained("someone/tiny-diffusion")' in card.text and 'load_lora_weights("me/rabbit-lora")' in card.text
    )
    assert (
        f" → {trainer.last_metrics['reward']:.2f} |" in card.text
        and "| 2, 2 |" in card.text
        and "**red**" in card.text
    )
    assert "2305.16381" in card.text
    assert card.data.license is None  # the user's to state
    assert "{" not in card.text.split("```json")[0] and "TODO" not in card.content  # no placeholder is left
    assert (trainer.output_dir / "card" / "curves.png").stat().st_size > 1000
    assert (
        str(tmp_path) not in card.content
        and str(tmp_path) not in (trainer.output_dir / "dpok_config.json").read_text()
    )


@pytest.mark.parametrize("kind", ["LoRA", "LoRA and text encoder", "PEFT", "all weights"])
def test_the_code_in_the_card_gives_the_identical_image(kind, make_trainer, tmp_path, monkeypatch):
    if kind == "PEFT":
        monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", None)
    pipe = stable_diffusion()
    pipe.register_to_config(_name_or_path="someone/base")
    settings = {"LoRA and text encoder": {"train_text_encoder": True}, "all weights": {"train_use_lora": False}}
    trainer = make_trainer(pipe=pipe, **settings.get(kind, {}), **{**TRAIN, "train_learning_rate": 1e-3})
    trainer.train()
    trainer.save_model(tmp_path / "rabbit")
    from_pretrained = DiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        DiffusionPipeline,
        "from_pretrained",
        lambda name: stable_diffusion() if name == "someone/base" else from_pretrained(name),
    )
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "rabbit" / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.S | re.M)
    names = {}
    code = code.replace('"path/to/rabbit"', '"rabbit"')  # what the reader fills in
    exec(compile(code, "card", "exec"), names)
    assert torch.equal(image(names["pipe"]), image(trainer.pipeline))
    assert not torch.equal(image(stable_diffusion()), image(trainer.pipeline))


def test_a_card_of_a_local_pipeline_names_no_folder(make_trainer, tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "base")
    trainer = make_trainer(pipe=str(tmp_path / "base"))
    trainer.save_model(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.base_model is None and str(tmp_path) not in card.content


@pytest.fixture
def pushed(monkeypatch):
    """What would be uploaded: (files, repository, private) of each push."""
    pushes = []

    def push(folder, repo_id, *, commit_message, private, checkpoint):
        assert checkpoint is None  # hub_strategy = "end"
        pushes.append(({path.name: path.read_bytes() for path in folder.iterdir()}, repo_id, private))
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(publishing, "push_folder", push)
    return pushes


def test_pushing_names_the_repository_in_the_card(make_trainer, pushed, tmp_path):
    trainer = make_trainer(hub_private_repo=True)
    assert trainer.push_to_hub("me/rabbit-lora").endswith("/me/rabbit-lora/commit/1")
    trainer.push_to_hub("me/other", private=False, dataset_name="someone/prompts")
    (files, repo_id, private), (other_files, other_id, other_private) = pushed
    assert (repo_id, private) == ("me/rabbit-lora", True) and (other_id, other_private) == ("me/other", False)
    assert set(files) == {"pytorch_lora_weights.safetensors", "README.md", "dpok_config.json"}
    assert b'load_lora_weights("me/rabbit-lora")' in files["README.md"]
    assert (
        b'load_lora_weights("me/other")' in other_files["README.md"] and b"someone/prompts" in other_files["README.md"]
    )


def test_pushing_needs_a_repository(make_trainer, pushed):
    with pytest.raises(ValueError, match=r"push_to_hub needs a repository: trainer.push_to_hub\('me/rabbit-lora'\)"):
        make_trainer().push_to_hub()
    assert pushed == []


def test_save_pretrained_is_ddpos_name(make_trainer, pushed, tmp_path):
    trainer = make_trainer()
    trainer.save_pretrained(tmp_path / "rabbit")
    assert (tmp_path / "rabbit" / "pytorch_lora_weights.safetensors").exists() and pushed == []
    trainer.save_pretrained(
        tmp_path / "rabbit", push_to_hub=True
    )  # the folder's name, as huggingface_hub's mixin has it
    trainer.save_pretrained(tmp_path / "rabbit", repo_id="me/hare", push_to_hub=True)
    configured = make_trainer(hub_model_id="me/configured", output_dir=str(tmp_path / "configured"))
    configured.save_pretrained(tmp_path / "rabbit", push_to_hub=True)
    assert [repo_id for _, repo_id, _ in pushed] == ["rabbit", "me/hare", "me/configured"]


def test_a_family_without_a_lora_file_is_saved_for_peft(make_trainer, tmp_path, monkeypatch):
    """`peft.PeftModel` puts the adapter back on a stock denoiser: the identical image, alpha != rank included."""
    pipe = stable_diffusion()
    monkeypatch.setattr(type(pipe), "save_lora_weights", None)
    trainer = make_trainer(pipe=pipe, train_lora_rank=2, train_lora_alpha=6, **TRAIN)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"unet", "README.md", "card", "dpok_config.json"}
    stock = stable_diffusion()
    base = image(stock)
    stock.unet = PeftModel.from_pretrained(stock.unet, tmp_path / "model" / "unet").base_model.model
    tuned = image(trainer.pipeline)
    assert torch.equal(image(stock), tuned)
    assert not torch.equal(base, tuned)


def test_an_adapter_in_pefts_layout_is_resumed_bit_for_bit(make_trainer, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", None)
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **TRAIN)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "parts"), **TRAIN).train(epochs=1)
    second = make_trainer(output_dir=str(tmp_path / "parts"), **TRAIN)
    second.train(resume_from_checkpoint=True)
    end = adapter(whole)
    assert all(torch.equal(value, end[name]) for name, value in adapter(second).items())


# ---------------------------------------------------------------- text encoders


TEXT = {"sd": {"text_encoder"}, "sdxl": {"text_encoder", "text_encoder_2"}, "sd3": {"text_encoder", "text_encoder_2"}}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_text_encoders_are_trained_and_a_stock_pipeline_loads_them(
    family, make_trainer, adapter, lines, tmp_path
):
    trainer = make_trainer(
        pipe=FAMILIES[family](), train_text_encoder=True, train_lora_rank=2, train_lora_alpha=6, **TRAIN
    )
    assert set(trainer.tuned.text_encoders) == TEXT[family]
    start = adapter(trainer)
    trainer.train()
    first, second = lines(trainer, "loss")
    assert first["policy/ratio_deviation_max"] == 0.0 and first["kl"] == 0.0 < second["kl"]
    for encoder in TEXT[family]:
        own = [name for name in start if name.startswith(f"networks.{encoder}.")]
        moved = [name for name in own if not torch.equal(start[name], adapter(trainer)[name])]
        # CLIP's pooled output is the penultimate layer's in SDXL and SD3, so that the last layer of an encoder may have no gradient
        assert len(own) > 0 and len(moved) >= len(own) / 2
    trainer.save_model(tmp_path / "model")
    stock = FAMILIES[family]()
    base = image(stock)
    stock.load_lora_weights(str(tmp_path / "model"))
    for encoder in TEXT[family]:
        assert adapter_layers(getattr(stock, encoder))
    tuned = image(trainer.pipeline)
    assert torch.equal(image(stock), tuned)
    assert not torch.equal(base, tuned)


def test_the_gradient_of_a_text_encoder_is_the_whole_one(make_trainer):
    """Against finite differences of the log-probability, in one direction of the text encoder's adapter alone."""
    trainer = make_trainer(train_text_encoder=True, sample_min_std=0.1, sample_batch_size=2, train_batch_size=2)
    nudge(trainer.policy.networks)
    trajectory = trainer.sample(0)[0][0].trajectory
    layers = [p for p in trainer.tuned.text_encoders["text_encoder"].parameters() if p.requires_grad]
    torch.manual_seed(7)
    direction = [torch.randn_like(p) for p in layers]

    start = [p.detach().clone() for p in layers]

    def log_prob(step):
        with torch.no_grad():
            for parameter, value, d in zip(layers, start, direction, strict=True):
                parameter.copy_(value + step * d)
        (replayed,) = trainer.policy(trajectory, None, [1])
        return replayed.log_prob.sum()

    gradients = torch.autograd.grad(log_prob(0.0), layers)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    with torch.no_grad():
        measured = (log_prob(3e-4) - log_prob(-3e-4)).item() / 6e-4
    assert abs(slope) > 1e-3
    assert slope == pytest.approx(measured, rel=FINITE_DIFFERENCE)


def test_a_run_with_text_encoders_is_resumed_bit_for_bit(make_trainer, adapter, tmp_path):
    settings = {**TRAIN, "num_epochs": 3, "train_text_encoder": True}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "parts"), **settings).train(epochs=2)
    second = make_trainer(output_dir=str(tmp_path / "parts"), **settings)
    second.train(resume_from_checkpoint=True)
    end = adapter(whole)
    assert all(torch.equal(value, end[name]) for name, value in adapter(second).items())


def test_a_peft_config_for_each_component(make_trainer, adapter):
    configs = {
        "unet": LoraConfig(r=2, target_modules=["conv1"]),
        "text_encoder": LoraConfig(r=3, target_modules=["q_proj"]),
    }
    trainer = make_trainer(train_text_encoder=True, peft_config=configs, **TRAIN)
    shapes = {name: tuple(value.shape) for name, value in adapter(trainer).items()}
    assert all(("conv1" in name) if name.startswith("networks.unet") else ("q_proj" in name) for name in shapes)
    assert {s[0] for n, s in shapes.items() if "lora_A" in n and "text_encoder" in n} == {3}
    trainer.train()


def test_a_peft_config_for_what_is_not_trained_is_refused(make_trainer):
    config = {"unet": LoraConfig(target_modules=["to_k"]), "text_encoder": LoraConfig(target_modules=["q_proj"])}
    with pytest.raises(ValueError, match="peft_config has entries for text_encoder, but what is trained is unet"):
        make_trainer(peft_config=config)


def test_another_rank_than_a_loaded_adapters_is_refused(saved, make_trainer):
    pipe = stable_diffusion()
    pipe.load_lora_weights(str(saved[1]))
    with pytest.raises(
        ValueError, match="`unet` has the adapter 'default_0' of rank 2 already, and train_lora_rank = 8"
    ):
        make_trainer(pipe=pipe, train_lora_rank=8)


def test_a_family_whose_lora_file_has_no_place_for_a_text_encoder(make_trainer, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", None)
    with pytest.raises(
        ValueError,
        match="LoRA file of StableDiffusionPipeline has no place for an adapter of a text encoder. Set train_",
    ):
        make_trainer(train_text_encoder=True)
