"""The supervised arm around its losses: which images are kept, files and resume, a dataset, two processes, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from test_docs import tables
from tiny import stable_diffusion, stable_diffusion_3
from trl import TrlParser

from dpok_trl import DPOKConfig, DPOKSFTConfig, DPOKSFTTrainer, DPOKTrainer, RewardError
from dpok_trl.demo import load_demo_pipeline


HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PROMPTS = ["a cat", "two dogs", "3 birds"]
SMALL = {
    "num_epochs": 1,
    "save_freq": 0,
    "sample_grid_freq": 0,
    "sample_num_steps": 3,
    "sample_guidance_scale": 1.0,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 4,
    "train_learning_rate": 1e-2,
}
# VAE-encoded pictures of the demo against the latents that they were decoded from, relative: 0.083 was measured
VAE_LOSS = 0.15


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


@pytest.fixture
def make_sft(tmp_path):
    def make(reward=red, prompts=PROMPTS, pipe=None, dataset=None, hook=None, **kwargs) -> DPOKSFTTrainer:
        config = DPOKSFTConfig(**{"output_dir": str(tmp_path / "run"), **SMALL, **kwargs})
        pipe = stable_diffusion() if pipe is None else pipe
        return DPOKSFTTrainer(config, reward, prompts, pipe, hook, train_dataset=dataset)

    return make


def rewarded(*values):
    """Hands these rewards out, in the order of the images."""
    left = list(values)

    def reward(images, prompts, metadata):
        return [left.pop(0) for _ in prompts]

    return reward


def rows_trained_on(trainer, inner_epoch=0):
    """Of each forward pass of a pass over the images: which images."""
    rows = []
    for update in trainer._updates(0, inner_epoch):
        for item in update:
            grid = item.trajectory.recording.grid
            levels = grid.levels(item.steps[0])
            x0 = (item.trajectory.latents[0] - levels.sigma.float() * item.target) / levels.alpha.float()
            distances = (x0[:, None] - trainer.data.x0[None]).abs().amax((2, 3, 4))
            assert distances.amin(1).max() < 1e-4
            rows.append(distances.argmin(1).tolist())
    return rows


# ---------------------------------------------------------------- which images


def test_the_best_half_is_kept(make_sft):
    trainer = make_sft(rewarded(0.1, 0.9, 0.3, 0.8, 0.5, 0.2, 0.7, 0.4), sft_loss="filtered")
    trainer.data = trainer._draw(0, 0)
    rows = rows_trained_on(trainer)
    assert [sorted(one) for one in rows] == [[1, 3, 4, 6]] * 2  # at two steps


def test_the_best_of_each_group_are_kept(make_sft):
    trainer = make_sft(
        rewarded(0.1, 0.9, 0.3, 0.8, -5.0, -7.0, float("nan"), -6.0),
        sft_loss="filtered",
        sample_num_images_per_prompt=4,
    )
    trainer.data = trainer._draw(0, 0)
    assert trainer.data.prompts[0] == trainer.data.prompts[3] != trainer.data.prompts[4]
    assert [sorted(one) for one in rows_trained_on(trainer)] == [[1, 3, 4, 7]] * 2


def test_what_fills_no_batch_is_left_out_of_a_pass_and_comes_in_another(make_sft):
    trainer = make_sft(sample_num_batches_per_epoch=3, train_batch_size=4, sft_loss="filtered", sft_keep_fraction=0.92)
    trainer.data = trainer._draw(0, 0)
    passes = [{row for rows in rows_trained_on(trainer, inner) for row in rows} for inner in range(4)]
    assert [len(rows) for rows in passes] == [8] * 4  # 11 are kept
    assert len(set.union(*passes)) == 11


def test_an_image_without_a_reward_has_no_weight(make_sft):
    trainer = make_sft(rewarded(0.5, float("nan"), 0.25, 1.0, *[0.5] * 4), sft_kl="kl_d", sft_gamma=2.0)
    trainer.train()
    weights, _ = trainer._weights(trainer.data.rewards)
    assert weights.tolist() == [2.5, 0.0, 2.25, 3.0, 2.5, 2.5, 2.5, 2.5]
    assert trainer.last_metrics["sft/weight_mean"] == pytest.approx(17.75 / 7)
    assert trainer.last_metrics["images_left_out"] == 1


# ---------------------------------------------------------------- files and resume


class Interrupted(Exception):
    pass


def interrupt(trainer, calls):
    """Raises in the update after `calls` of them."""
    update, done = trainer._update, []

    def interrupted(item):
        if len(done) == calls:
            raise Interrupted
        done.append(1)
        return update(item)

    trainer._update = interrupted


def timeless(line):
    return {key: value for key, value in line.items() if not key.startswith("time/") and not key.endswith("/seconds")}


@pytest.mark.parametrize("redraw", [None, 2], ids=["offline", "online"])
def test_interrupted_and_resumed_is_uninterrupted(redraw, make_sft, lines, adapter, tmp_path):
    def trainer(name):
        settings = {"num_epochs": 4, "save_freq": 1, "train_lr_scheduler": "cosine", "train_num_inner_epochs": 2}
        return make_sft(output_dir=str(tmp_path / name), sft_kl="kl_o", sft_redraw_epochs=redraw, **settings)

    whole = trainer("whole")
    whole.train()
    first = trainer("parts")
    interrupt(first, 3 * 4 + 1)  # in the fourth epoch, after two draws if online
    with pytest.raises(Interrupted):
        first.train()
    torch.manual_seed(99)
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(whole).items())
    assert [timeless(line) for line in lines(whole)] == [timeless(line) for line in lines(resumed)]
    assert [line["images"] for line in lines(whole, "images")] == ([8] if redraw is None else [8, 16])
    one, two = (load_file(one.output_dir / "sft_data" / "process-0.safetensors") for one in (whole, resumed))
    assert torch.equal(one["x0"], two["x0"]) and torch.equal(one["rewards"], two["rewards"])
    assert resumed.data.epoch == (0 if redraw is None else 2)
    # in another folder too, from a checkpoint in the middle, which has the images of its own time
    other = trainer("other")
    other.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-8")
    assert all(torch.equal(value, adapter(other)[name]) for name, value in adapter(whole).items())


def test_images_are_drawn_once(make_sft, watch):
    pipe = stable_diffusion()
    trainer = make_sft(pipe=pipe, num_epochs=3)
    drawn = []
    rollout = trainer.policy.rollout
    trainer.policy.rollout = lambda *args: drawn.append(args[0]) or rollout(*args)
    trainer.train()
    assert len(drawn) == 3  # two batches, and one for the shapes of a training batch
    start = trainer.data.x0.clone()
    online = make_sft(num_epochs=2, sft_redraw_epochs=1, output_dir=str(trainer.output_dir / "online"))
    online.train(epochs=1)
    assert torch.equal(online.data.x0, start)  # the pretrained model's
    online.train()
    assert not torch.equal(online.data.x0, start)


@pytest.fixture
def saved(make_sft):
    """The newest checkpoint of a run of two epochs."""
    trainer = make_sft(num_epochs=2, save_freq=1)
    trainer.train()
    return trainer.output_dir / "checkpoint-4"


def test_a_checkpoint_without_its_images_is_not_whole(saved, make_sft, caplog):
    (saved / "sft_data" / "process-0.safetensors").unlink()
    trainer = make_sft(num_epochs=3)
    trainer.train(resume_from_checkpoint=True)
    assert "sft_data/process-0.safetensors is missing" in caplog.text
    assert "checkpoint-2 instead" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"x0": torch.zeros(1), "rewards": torch.zeros(1)}, {"prompts": ["a"], "seeds": [1], "epoch": 0, "process": 1}, "holds the images of process 1, and this is process 0"),
        ({"y": torch.zeros(1)}, {}, "holds y and is not the data of a supervised run"),
        (None, None, "cannot be read"),
    ],
)  # fmt: skip
def test_another_file_in_the_place_of_the_images_is_refused(tensors, about, message, saved, make_sft):
    path = saved / "sft_data" / "process-0.safetensors"
    path.unlink()
    if tensors is None:
        path.write_bytes(b"torn")
    else:
        save_file(tensors, path, {"data": json.dumps(about)})
    state = json.loads((saved / "trainer_state.json").read_text())
    state["files"]["sft_data/process-0.safetensors"] = path.stat().st_size
    (saved / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        make_sft(num_epochs=3).train(resume_from_checkpoint=saved)


def test_a_run_of_the_other_trainer_has_no_images(make_trainer, make_sft, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "rl"))
    trainer.train()
    with pytest.raises(ValueError, match="process-0.safetensors is missing: the images that this run was trained on"):
        make_sft().train(resume_from_checkpoint=tmp_path / "rl")


def test_images_of_another_size_are_refused(saved, make_sft):
    trainer = make_sft(num_epochs=3, sample_call_kwargs={"height": 32, "width": 32})
    with pytest.raises(
        ValueError, match=r"latents of shape \(4, 8, 8\), and those of the pipeline have \(4, 16, 16\)"
    ):
        trainer.train(resume_from_checkpoint=saved)


# ---------------------------------------------------------------- a dataset


def picture(seed, size=16):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def dataset_of(count=9, size=16, **columns):
    rows = {
        "image": [picture(seed, size) for seed in range(count)],
        "prompt": [f"number {row}" for row in range(count)],
    }
    return datasets.Dataset.from_dict({**rows, **columns}).cast_column("image", datasets.Image())


def test_a_dataset_of_images_is_trained_on(make_sft, lines):
    hooked = []
    dataset = dataset_of()
    trainer = make_sft(prompts=None, dataset=dataset, hook=lambda data, *_: hooked.append(data))
    trainer.train()
    pipe = trainer.pipeline
    assert trainer.data.prompts == dataset["prompt"][:] and len(trainer.data) == 9
    pixels = torch.from_numpy(np.stack([np.asarray(picture(seed)) for seed in range(9)])).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(trainer.data.rewards, pixels[:, 0].mean((1, 2)))
    with torch.no_grad():
        moments = pipe.vae.encode(pixels * 2 - 1).latent_dist.mean
    torch.testing.assert_close(trainer.data.x0, moments * pipe.vae.config.scaling_factor, rtol=1e-5, atol=1e-6)
    assert len(lines(trainer, "loss")) == 2  # two batches of 4; the ninth picture is left out of this pass
    assert lines(trainer, "reward")[0]["images"] == 9
    assert len(hooked[0]) == 1 and len(hooked[0][0][0]) == 4  # the pictures of the first batch


def test_shift_and_scale_of_the_vae(make_sft):
    trainer = make_sft(
        prompts=None, pipe=stable_diffusion_3(), dataset=dataset_of(4), sample_call_kwargs={"height": 16, "width": 16}
    )
    trainer.train()
    vae = trainer.pipeline.vae
    with torch.no_grad():
        back = vae.decode(trainer.data.x0 / vae.config.scaling_factor + vae.config.shift_factor).sample
        pixels = torch.from_numpy(np.stack([np.asarray(picture(seed)) for seed in range(4)])).permute(0, 3, 1, 2) / 255
        mode = vae.encode(pixels * 2 - 1).latent_dist.mode()
        torch.testing.assert_close(back, vae.decode(mode).sample, rtol=1e-4, atol=1e-5)


def test_encoded_pictures_are_the_latents_that_they_were_drawn_from(make_sft):
    """On a real VAE: the demo's own pictures, through a dataset, are the latents of the rollout."""
    drawn = make_sft(
        lambda images, prompts, metadata: [1.0] * len(images),
        ["a red circle"],
        load_demo_pipeline(),
        sample_num_steps=5,
    )
    batches, _ = drawn.sample(0)
    latents = torch.cat([batch.trajectory.latents[-1] for batch in batches])
    pixels = (
        (torch.cat([batch.trajectory.images for batch in batches]) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    )
    rows = {"image": [Image.fromarray(one) for one in pixels], "prompt": ["a red circle"] * 8, "reward": [0.5] * 8}
    given = make_sft(
        None, None, load_demo_pipeline(), datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    )
    given.train()
    assert (given.data.x0 - latents).norm() < VAE_LOSS * latents.norm()
    assert given.data.rewards.tolist() == [0.5] * 8


def test_the_reward_column_is_the_reward(make_sft, lines):
    rewards = [row / 8 for row in range(8)]
    trainer = make_sft(None, None, dataset=dataset_of(8, reward=rewards), sft_loss="filtered")
    trainer.train()
    assert trainer.data.rewards.tolist() == rewards
    assert lines(trainer, "reward")[0]["reward"] == pytest.approx(3.5 / 8)
    assert trainer._rows_kept(trainer.data.rewards).tolist() == [4, 5, 6, 7]
    with pytest.raises(RewardError, match='column "reward" of train_dataset, and other images have none'):
        trainer.compute_rewards([[torch.zeros(1, 3, 16, 16), ("a cat",), ({},)]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": PROMPTS, "dataset": dataset_of()}, "give prompt_function=None"),
        ({"dataset": dataset_of(), "sft_redraw_epochs": 1}, "Leave one of the two out"),
        ({"dataset": dataset_of(), "sample_weight_column": "weight"}, "says how often a prompt is drawn"),
        ({"dataset": dataset_of(), "reward": None}, 'has no column "reward": give either'),
        ({"dataset": dataset_of(reward=[1.0] * 9)}, "a reward_function was given too: give either"),
        ({"dataset": dataset_of().remove_columns("image")}, "train_dataset has no column image; its columns are prompt"),
        ({"dataset": dataset_of(3)}, "the 3 images of a process are fewer than train_batch_size = 4"),
        ({"dataset": dataset_of(size=24)}, "row 0 of train_dataset is a picture of 24x24 pixels, and the pipeline draws 16x16"),
        ({"dataset": dataset_of().map(lambda row: {"image": 1}, features=datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Value("int64")}))},
         'row 0 of the column "image" is of type int, and must be a PIL image'),
    ],
)  # fmt: skip
def test_datasets_that_cannot_be_used(arguments, message, make_sft):
    with pytest.raises(ValueError, match=message):
        make_sft(**{"prompts": None, **arguments}).train()


def test_latents_in_an_order_of_their_own_are_refused(make_sft, monkeypatch):
    trainer = make_sft(prompts=None, dataset=dataset_of())
    monkeypatch.setattr(DiagonalGaussianDistribution, "mode", lambda self: self.mean.flatten(2).transpose(1, 2))
    with pytest.raises(
        ValueError,
        match=r"latents of shape \(64, 4\), and those of StableDiffusionPipeline have \(4, 8, 8\): it packs or arranges",
    ):
        trainer.train()


# ---------------------------------------------------------------- what is refused


def test_negative_weights_are_refused_and_kl_d_is_the_way_out(make_sft):
    rewards = (0.5, -0.25, 0.75, -1.5, 0.0, 0.5, 0.25, 1.0)
    for kl in ({}, {"sft_kl": "kl_o"}):
        trainer = make_sft(rewarded(*rewards), **kl)
        with pytest.raises(ValueError, match=r"2 of 8 rewards are negative, the smallest is -1.5.*sft_gamma >= 1.5"):
            trainer.train()
    trainer = make_sft(rewarded(*rewards), sft_kl="kl_d", sft_gamma=0.5, output_dir=str(trainer.output_dir / "out"))
    trainer.train()
    assert trainer.last_metrics["sft/clipped_fraction"] == 1 / 8
    assert trainer._weights(trainer.data.rewards)[0].tolist() == [1.0, 0.25, 1.25, 0.0, 0.5, 1.0, 0.75, 1.5]


RL_ONLY = {
    "reward_weight": 2.0,
    "sample_min_std": 0.1,
    "sample_sde_window_size": 2,
    "train_cfg": False,
    "train_objective": "ppo",
    "train_clip_range": 0.1,
    "train_kl_threshold": 0.1,
    "train_buffer_rounds": 2,
    "train_log_prob_reduction": "sum",
    "train_reanchor": True,
    "train_adv_type": "group",
    "train_adv_scale": False,
    "train_adv_clip_max": 1.0,
    "train_keep_best": 1,
    "train_keep_worst": 1,
    "per_prompt_stat_tracking": True,
    "kl_weight": 0.5,
    "kl_type": "noise",
    "kl_gradient": "exact",
    "kl_warmup_epochs": 1,
    "target_kl": 1.0,
    "reference_update_epochs": 1,
    "value_input": "latents",
    "value_learning_rate": 1.0,
    "log_gradient_cosine_freq": 1,
}


@pytest.mark.parametrize("name", RL_ONLY)
def test_settings_of_the_policy_gradient_are_refused(name):
    value = RL_ONLY[name]
    with pytest.raises(
        ValueError, match=rf"^{name} = {value!r} would do nothing: the supervised trainer has no policy gradient"
    ):
        DPOKSFTConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sft_loss": "weighted"}, "sft_loss = 'weighted', but it must be one of reward_weighted, filtered. Did you mean 'reward_weighted'?"),
        ({"sft_kl": "gaussian"}, "sft_kl = 'gaussian', but it must be one of none, kl_d, kl_o"),
        ({"sft_gamma": 2.0}, "sft_gamma = 2.0 would do nothing: sft_kl = 'none'"),
        ({"sft_gamma": -1.0, "sft_kl": "kl_d"}, "sft_gamma = -1.0, but it must be finite and not negative"),
        ({"sft_keep_fraction": 0.25}, "sft_keep_fraction = 0.25 would do nothing: sft_loss = 'reward_weighted' keeps all"),
        ({"sft_loss": "filtered", "sft_keep_fraction": 0.0}, r"sft_keep_fraction = 0.0, but it must be in \(0, 1\]"),
        ({"sft_loss": "filtered", "sft_kl": "kl_d"}, "would only scale the loss"),
        ({"sft_redraw_epochs": 0}, "sft_redraw_epochs = 0, but it must be at least 1"),
        ({"sft_redraw_epochs": 1.5}, "sft_redraw_epochs = 1.5 is of type float"),
        ({"sample_num_steps": 1}, "sample_num_steps = 1, but the supervised trainer needs at least 2"),
        ({"sample_num_steps": 3, "train_timestep_fraction": 0.4}, "of the 2 steps that are trained on .* Give at least 0.5"),
        ({"sample_call_columns": ["image"]}, "keeps latents, prompts and rewards"),
        ({"sample_offload_encoders": True}, "encodes prompts just then"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOKSFTConfig(**settings)


def test_a_filter_that_keeps_less_than_a_batch_is_refused_at_once(make_sft):
    with pytest.raises(
        ValueError,
        match=r"the 2 images of a process that sft_keep_fraction = 0.25 keeps of 8 are fewer than train_batch_size = 4",
    ):
        make_sft(sft_loss="filtered", sft_keep_fraction=0.25)


def test_each_trainer_has_its_config(make_sft, tmp_path):
    with pytest.raises(TypeError, match="DPOKSFTTrainer needs a DPOKSFTConfig, given: DPOKConfig"):
        DPOKSFTTrainer(DPOKConfig(output_dir=str(tmp_path)), red, PROMPTS, stable_diffusion())
    with pytest.raises(TypeError, match="DPOKTrainer needs a DPOKConfig, given: DPOKSFTConfig"):
        DPOKTrainer(DPOKSFTConfig(output_dir=str(tmp_path)), red, PROMPTS, stable_diffusion())
    with pytest.raises(TypeError, match=r"given: str. A preset is one by DPOKConfig.preset\(name\)"):
        DPOKTrainer("paper-single", red, PROMPTS, stable_diffusion())


def test_images_that_all_have_weight_0_teach_nothing_and_are_refused(make_sft):
    trainer = make_sft(reward=lambda images, prompts, metadata: [-1.0] * len(images), sft_kl="kl_d", sft_gamma=0.5)
    with pytest.raises(ValueError, match=r"all 8 images have weight 0 \(rewards from -1 to -1, sft_gamma = 0.5\)"):
        trainer.train()


def test_fractions_are_not_rounded_down_twice():
    config = DPOKSFTConfig(sft_loss="filtered", sft_keep_fraction=0.29)
    assert int(100 * 0.29) == 28  # what binary fractions do
    assert config.images_kept(100) == 29


def test_flags():
    [config] = TrlParser((DPOKSFTConfig,)).parse_args_and_config(
        ["--sft_loss", "filtered", "--sft_kl", "kl_o", "--sft_gamma", "0.3", "--sft_redraw_epochs", "5", "--num_epochs", "7"]
    )  # fmt: skip
    assert (config.sft_loss, config.sft_kl, config.sft_gamma, config.sft_redraw_epochs, config.num_epochs) == ("filtered", "kl_o", 0.3, 5, 7)  # fmt: skip


# ---------------------------------------------------------------- the rest of the run


def test_the_schedule_of_the_learning_rate_ends_with_the_run(make_sft, lines):
    """Filtered, accumulated, in parts: as many steps are planned as are done."""
    trainer = make_sft(
        num_epochs=2,
        sample_num_batches_per_epoch=6,
        sample_num_steps=4,
        train_lr_scheduler="linear",
        train_gradient_accumulation_steps=2,
        train_timesteps_per_update=2,
        sft_loss="filtered",
    )
    trainer.train()
    # 12 of 24 images: 3 batches, 2 at a time and then 1, each at 3 steps in two parts
    assert trainer.global_step == 2 * 2 * 2 == 2 * trainer._updates_per_pass()
    assert [line["learning_rate"] for line in lines(trainer, "loss")] == pytest.approx(
        [0.01 * (1 - i / 8) for i in range(8)]
    )


@pytest.mark.parametrize("settings", [{"train_use_lora": False}, {"train_text_encoder": True}], ids=["full", "text"])
def test_other_networks_are_trained_too(settings, make_sft, adapter, lines):
    trainer = make_sft(sft_kl="kl_o", train_learning_rate=1e-3, num_epochs=2, **settings)
    start = adapter(trainer)
    trainer.train()
    moved = [name for name, value in adapter(trainer).items() if not torch.equal(value, start[name])]
    assert len(moved) > 0.9 * len(start)
    updates = lines(trainer, "loss")
    assert updates[0]["kl_o"] == 0.0 < updates[-1]["kl_o"]


def test_evaluations_are_guided(make_sft, watch):
    pipe = stable_diffusion()
    trainer = make_sft(pipe=pipe, sample_guidance_scale=3.0)
    trainer.train()
    calls = watch(pipe.unet)
    trainer.evaluate(["a house"], images_per_prompt=2)
    assert set(calls.rows) == {4}  # both halves of guidance


def test_a_model_is_saved_and_loaded(make_sft, tmp_path):
    trainer = make_sft()
    trainer.train()
    trainer.save_model(tmp_path / "lora")
    pipe = stable_diffusion()
    pipe.load_lora_weights(str(tmp_path / "lora"))
    pictures = [
        one(["a cat"], generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images
        for one in (trainer.pipeline, pipe)
    ]
    assert torch.equal(*pictures)


# ---------------------------------------------------------------- the documentation


def test_the_documented_settings_are_those_of_the_config():
    rows = tables((DOCS / "sft.md").read_text(encoding="utf-8"), "sft field")
    own = [item for item in dataclasses.fields(DPOKSFTConfig) if item.name not in DPOKConfig.__dataclass_fields__]
    assert list(rows) == [item.name for item in own]
    for item in own:
        kind, default, meaning = rows[item.name]
        assert kind == " or ".join(f"`{name}`" for name in DPOKSFTConfig.__annotations__[item.name].split(" | "))
        assert default == f"`{json.dumps(item.default) if isinstance(item.default, str) else item.default}`"
        assert item.metadata["help"]
        for choice in item.metadata.get("choices", ()):
            assert f"`{choice}`" in meaning or f'"{choice}"' in meaning


def test_the_documented_metrics_are_those_of_a_run(make_sft, make_trainer, lines, tmp_path):
    written = set()
    for kl in ("kl_d", "kl_o"):
        trainer = make_sft(sft_kl=kl, output_dir=str(tmp_path / kl))
        trainer.train()
        written |= {name for line in lines(trainer) for name in line}
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    own = set(tables(page, "supervised metric"))
    assert own <= written
    known = set(tables(page, "metric")) | {name.replace("<name>", "red") for name in tables(page, "metric")}
    assert written - own <= known
    assert not any(name.startswith("policy/") or name == "kl" for name in written)


# ---------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_have_one_model(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, str(HERE / "two_supervised.py"), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-6000:]
    zero, one = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1))
    for run in ("whole", "parts", "dataset"):
        assert zero[run]["end"].keys() == one[run]["end"].keys()
        assert all(torch.equal(value, one[run]["end"][name]) for name, value in zero[run]["end"].items())
    assert all(
        torch.equal(value, zero["parts"]["end"][name]) for name, value in zero["whole"]["end"].items()
    )  # resumed
    assert any(not torch.equal(value, zero["whole"]["end"][name]) for name, value in zero["start"].items())
    assert not set(zero["whole"]["seeds"]) & set(one["whole"]["seeds"])
    assert zero["whole"]["metrics"]["images"] == 16 and one["whole"]["metrics"]["images"] == 16
    assert zero["whole"]["metrics"]["loss"] == one["whole"]["metrics"]["loss"]
    # 9 rows: each process has every other one of the first 8
    assert zero["dataset"]["prompts"] == [f"number {row}" for row in (0, 2, 4, 6)]
    assert one["dataset"]["prompts"] == [f"number {row}" for row in (1, 3, 5, 7)]
    # a negative reward of process 1 stops both
    assert zero["negative"] == one["negative"] and zero["negative"].startswith("8 of 16 rewards are negative")
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-12" / "sft_data").iterdir()}
    assert names == {"process-0.safetensors", "process-1.safetensors"}
