"""What training leaves: an adapter that a stock pipeline loads to the identical image, and that can be trained on."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors import safe_open
from tiny import FAMILIES, stable_diffusion

from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.lora import adapter_layers, adapter_name
from dpok_trl.training import publishing


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
        f"| {trainer.last_metrics['reward']:.4g} |" in card.text and "| 2, 2 |" in card.text and "`red`" in card.text
    )
    assert "2305.16381" in card.text
    assert card.data.license is None  # the user's to state
    assert "{" not in card.text.split("```json")[0] and "TODO" not in card.content  # no placeholder is left
    assert (
        str(tmp_path) not in card.content
        and str(tmp_path) not in (trainer.output_dir / "dpok_config.json").read_text()
    )


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

    def push(folder, repo_id, *, commit_message, private):
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


def test_a_family_that_cannot_store_a_lora_is_refused_before_training(make_trainer, monkeypatch):
    pipe = stable_diffusion()
    monkeypatch.setattr(type(pipe), "save_lora_weights", None)
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no `save_lora_weights`"):
        make_trainer(pipe=pipe)
    assert all(adapter_name(module) is None for module in PipelineHooks().denoisers(pipe).values())
