"""What a trainer tells of its run, and the card that a real run leaves."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny import stable_diffusion

from dpok_trl import DPOKSFTConfig, DPOKSFTTrainer
from dpok_trl.results.runlog import read_metrics
from dpok_trl.rewards.jpeg import JpegCompressibility
from dpok_trl.training.run_facts import hardware, run_facts, task_of


SIX_DIGITS = 5e-6  # relative, of a number in the Hub's table
SETS = {"training": ["a cat", "two dogs"], "held-out": ["a cow"]}


def green(images, prompts, metadata):
    return images[:, 1].mean((1, 2)), {}


class Still:
    def __call__(self, prompt, image=None):
        """A pipeline that may start from a picture."""


class Moving:
    def __call__(self, prompt, num_frames=16):
        """One that makes videos."""


@pytest.mark.parametrize(
    ("pipe", "given", "task"),
    [
        (Still(), [], "text-to-image"),
        (Still(), ["image", "mask_image"], "image-to-image"),
        (Moving(), ["height"], "text-to-video"),
        (Moving(), ["image"], "image-to-video"),
    ],
)
def test_what_a_pipeline_makes_follows_from_its_call(pipe, given, task):
    assert task_of(pipe, given) == task


def test_the_facts_of_a_run(make_trainer):
    rewards = {"small": JpegCompressibility(), "green": green}
    trainer = make_trainer(
        reward=rewards, reward_weights=[0.5, 2.0], train_lora_rank=2, train_lora_alpha=6, kl_weight=0.5
    )
    before = run_facts(trainer)
    assert (before.epochs, before.updates, before.images, before.seconds) == (0, 0, None, 0.0)
    trainer.train()
    facts = run_facts(trainer)
    count = sum(weight.numel() for weight in trainer.trainable_layers)
    assert facts.trained == f"LoRA of rank 2 and alpha 6 on unet ({count:,} parameters)"
    assert (facts.epochs, facts.updates, facts.images) == (1, 1, 4) and facts.seconds > 0
    assert [(one.name, one.weight, one.info is not None) for one in facts.rewards] == [
        ("small", 0.5, True),
        ("green", 2.0, False),
    ]
    assert facts.prompts == ["a cat", "two dogs", "3 birds"] and facts.task == "text-to-image"
    assert (facts.objective, facts.kl, facts.supervised) == ("dpok", "0.5 × the exact KL of each step", False)
    assert facts.call["num_inference_steps"] == 4 and facts.call["guidance_scale"] == 3.0
    assert facts.hardware.endswith("; float32 weights") and "×" not in facts.hardware  # one process


@pytest.mark.parametrize(
    ("settings", "kl"),
    [
        ({"kl_weight": 0.0}, None),
        ({"kl_type": "noise", "kl_weight": 0.25}, "0.25 × the squared difference of the outputs"),
        ({"target_kl": 12.0}, "the exact KL of each step, weighted to hold 12 nats for a denoising path"),
    ],
)
def test_the_kl_term_in_words(settings, kl, make_trainer):
    assert run_facts(make_trainer(**settings)).kl == kl


def test_all_weights_and_adapters_on_text_encoders(make_trainer):
    full = run_facts(make_trainer(train_use_lora=False))
    assert full.full and full.trained.startswith("all weights of unet (")
    config = {
        "unet": LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]),
        "text_encoder": LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]),
    }
    both = run_facts(make_trainer(peft_config=config, train_text_encoder=True))
    assert both.trained.startswith("LoRA of rank 4 and alpha 8 on unet; LoRA of rank 2 and alpha 2 on text_encoder (")


def test_prompts_of_a_function_are_not_known(make_trainer):
    trainer = make_trainer(prompts=lambda: ("a cat", {}))
    assert run_facts(trainer).prompts is None


@pytest.fixture
def evaluated(make_trainer):
    trainer = make_trainer(
        eval_prompts=SETS, eval_reward_function=green, eval_freq=1, eval_num_images_per_prompt=2, sample_grid_freq=1, num_epochs=2
    )  # fmt: skip
    trainer.train()
    return trainer


def test_the_card_of_a_run_has_the_numbers_of_its_newest_evaluation(evaluated, tmp_path):
    evaluated.save_model(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    numbers = evaluated.evaluate().metrics()
    found = {(one.dataset_split, one.metric_name): one.metric_value for one in card.data.eval_results}
    expected = {
        (name, f"{reward}, {label}"): numbers[f"eval/{name}/{reward}/{part}"]
        for name in SETS
        for reward in ("red", "green")
        for part, label in (("base", "pretrained"), ("tuned", "tuned"))
    }
    assert found == pytest.approx(expected, rel=SIX_DIGITS, abs=0)
    assert "Evaluated after 2 of 2 epochs (optimizer step 2 of 2)." in card.text
    assert "red (trained on)" in card.text and "green (held out)" in card.text
    assert {entry["text"] for entry in card.data.widget} == {"a cat", "two dogs", "a cow"}
    assert all((tmp_path / "model" / entry["output"]["url"]).is_file() for entry in card.data.widget)
    assert str(tmp_path) not in card.content


def test_after_going_back_the_evaluation_of_the_later_epoch_is_not_told(evaluated, tmp_path):
    evaluated.run_log.keep_epochs(1, 1)  # what resuming from a checkpoint of the first epoch does
    evaluated.first_epoch, evaluated.global_step = 1, 1
    assert {line["epoch"] for line in read_metrics(evaluated.output_dir)} == {0}
    evaluated.save_model(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.eval_results is None and "It was not evaluated" in card.text
    assert {entry["text"] for entry in card.data.widget} <= {"a cat", "two dogs", "3 birds"}  # of epoch 0
    assert "in epoch 0 of 1" in card.text


def test_the_card_of_the_supervised_arm(tmp_path):
    config = DPOKSFTConfig(
        output_dir=str(tmp_path / "run"), num_epochs=1, save_freq=0, sample_num_steps=4, sample_batch_size=4, train_batch_size=2,
        sample_num_batches_per_epoch=1, sample_grid_freq=0, sft_kl="kl_d", sft_gamma=2.0, kl_weight=0.02,
    )  # fmt: skip
    trainer = DPOKSFTTrainer(
        config, lambda images, prompts, metadata: images.mean((1, 2, 3)), ["a cat"], stable_diffusion()
    )
    trainer.train()
    facts = run_facts(trainer)
    assert (facts.objective, facts.kl, facts.supervised) == ("reward_weighted", "KL-D, gamma 2", True)
    trainer.save_model(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "supervised learning on images weighted by their rewards" in card.text
    assert "reinforcement-learning" not in card.data.tags and "sft" in card.data.tags
    assert "reinforcement learning" not in card.text.split("## How to use it")[0]
    assert card.data.get("instance_prompt") == "a cat"


def test_several_processes_and_mixed_precision_are_told():
    accelerator = SimpleNamespace(num_processes=8, device=torch.device("cpu"), mixed_precision="bf16")
    network = torch.nn.Linear(1, 1, dtype=torch.float16)
    network.dtype = torch.float16
    trainer = SimpleNamespace(accelerator=accelerator, tuned=SimpleNamespace(denoisers={"unet": network}))
    told = hardware(trainer)
    assert told.startswith("8 × CPU") and told.endswith("; float16 weights, bf16 mixed precision")
