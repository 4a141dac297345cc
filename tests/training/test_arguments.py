"""Arguments of the pipeline's call that come with the prompts, one for each image."""

import datasets
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from tiny import SIZE, stable_diffusion

from dpok_trl.policy.hooks import PipelineHooks


def image_to_image():
    pipe = StableDiffusionImg2ImgPipeline(**stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def colour(red: int) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), (red, 40, 200))


REDS = [0, 80, 160, 240]
PAIRS = [(f"number {i}", {"image": colour(red), "red": red}) for i, red in enumerate(REDS)]
DATASET = datasets.Dataset.from_list([{"prompt": prompt, **entry} for prompt, entry in PAIRS]).cast_column(
    "image", datasets.Image()
)
SETTINGS = {
    "sample_call_columns": ["image"],
    "sample_call_kwargs": {"strength": 0.75},
    "train_num_inner_epochs": 2,
    "train_learning_rate": 1e-2,
}


@pytest.mark.parametrize("prompts", [PAIRS, DATASET], ids=["metadata", "dataset"])
@pytest.mark.parametrize("train_batch_size", [4, 2])
def test_every_prompt_starts_from_its_own_picture(prompts, train_batch_size, make_trainer, lines):
    seen = {}

    def reward(images, prompts, metadata):
        for prompt, entry in zip(prompts, metadata, strict=True):
            seen[prompt] = entry["red"]
        return images[:, 0].mean((1, 2))

    trainer = make_trainer(
        reward,
        prompts=prompts,
        pipe=image_to_image(),
        train_batch_size=train_batch_size,
        train_gradient_accumulation_steps=4 // train_batch_size,
        **SETTINGS,
    )
    trainer.train()
    assert seen == {f"number {i}": red for i, red in enumerate(REDS)}
    first, second = lines(trainer, "loss")
    assert first["policy/ratio_deviation_max"] == 0.0 < second["policy/ratio_deviation_max"]

    trajectory = trainer.sample(1)[0][0].trajectory
    given = {prompt: entry["image"] for prompt, entry in PAIRS}
    pictures = trajectory.arguments["image"]
    assert [picture.getpixel((3, 3)) for picture in pictures] == [
        given[p].getpixel((3, 3)) for p in trajectory.prompts
    ]


def test_a_rollout_starts_where_the_untouched_pipeline_does(make_trainer):
    """x_T of image-to-image is the noised picture: compared with a stock call for each sample alone."""
    trainer = make_trainer(prompts=PAIRS, pipe=image_to_image(), **SETTINGS)
    trajectory = trainer.sample(0)[0][0].trajectory
    inputs = []
    trainer.pipeline.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for row, prompt in enumerate(trajectory.prompts):
        inputs.clear()
        trainer.pipeline(
            prompt,
            image=dict(PAIRS)[prompt]["image"],
            strength=0.75,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(trajectory.seeds[row]),
        )
        torch.testing.assert_close(trajectory.latents[0][row], inputs[0][0], rtol=0, atol=BATCH_TOLERANCE)


BATCH_TOLERANCE = 1e-5  # the VAE's kernels depend on the batch shape


def test_inpainting_with_a_mask_for_each_image(make_trainer, lines):
    left = Image.new("L", (SIZE, SIZE), 0)
    left.paste(255, (0, 0, SIZE // 2, SIZE))
    right = Image.new("L", (SIZE, SIZE), 255)
    right.paste(0, (0, 0, SIZE // 2, SIZE))
    prompts = [(f"number {i}", {"image": colour(120), "mask_image": mask}) for i, mask in enumerate([left, right] * 2)]
    pipe = StableDiffusionInpaintPipeline(**stable_diffusion().components, requires_safety_checker=False)
    trainer = make_trainer(
        prompts=prompts,
        pipe=pipe,
        sample_call_columns=["image", "mask_image"],
        sample_call_kwargs={"height": SIZE, "width": SIZE},
        train_num_inner_epochs=2,
        train_learning_rate=1e-2,
    )
    trainer.train()
    first, second = lines(trainer, "loss")
    assert first["policy/ratio_deviation_max"] == 0.0 < second["policy/ratio_deviation_max"]


def test_a_column_that_the_metadata_lacks_is_named(make_trainer):
    with pytest.raises(
        ValueError,
        match=r"sample_call_columns names mask_image, which the metadata of a prompt does not have \(it has image, red\)",
    ):
        make_trainer(prompts=PAIRS, pipe=image_to_image(), sample_call_columns=["image", "mask_image"]).train()


def test_metadata_that_is_no_dict_is_named(make_trainer):
    with pytest.raises(
        ValueError, match=r"sample_call_columns names image, which .* does not have \(it has no dict: 'red'\)"
    ):
        make_trainer(prompts=[("a cat", "red")], pipe=image_to_image(), sample_call_columns=["image"]).train()


def test_a_column_that_is_no_argument_of_the_call_is_refused(make_trainer):
    with pytest.raises(
        ValueError,
        match=r"the call of StableDiffusionImg2ImgPipeline takes no 'red'.*It takes: prompt, image, strength",
    ):
        make_trainer(prompts=PAIRS, pipe=image_to_image(), sample_call_columns=["image", "red"]).train()


# ---------------------------------------------------------------- guidance and hooks


class Unguided(PipelineHooks):
    """A call that takes other arguments, and images that stand elsewhere in the output."""

    def __init__(self):
        self.calls = []

    def call(self, pipe, arguments):
        self.calls.append(sorted(arguments))
        return {"pictures": super().call(pipe, {**arguments, "guidance_scale": 1.0})}

    def images(self, output):
        return super().images(output["pictures"])


class TakesNoGuidance(type(stable_diffusion())):
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        return super().__call__(
            prompt, num_inference_steps=num_inference_steps, guidance_scale=1.0, generator=generator,
            output_type=output_type, return_dict=return_dict,
        )  # fmt: skip


def test_a_call_without_guidance_scale_goes_without(make_trainer, watch, lines):
    pipe = TakesNoGuidance(**stable_diffusion().components, requires_safety_checker=False)
    calls = watch(pipe.unet)
    trainer = make_trainer(pipe=pipe, sample_guidance_scale=5.0)
    trainer.train()
    assert set(calls.rows) == {4}
    assert lines(trainer, "loss")[0]["policy/ratio_deviation_max"] == 0.0


def test_a_guidance_scale_that_the_call_does_not_take_is_refused(make_trainer):
    pipe = TakesNoGuidance(**stable_diffusion().components, requires_safety_checker=False)
    with pytest.raises(
        ValueError,
        match="sample_guidance_scale = 3.0, but the call of TakesNoGuidance takes no guidance_scale. Leave it",
    ):
        make_trainer(pipe=pipe, sample_guidance_scale=3.0)


def test_pipeline_hooks_reach_the_policy(make_trainer, watch, lines):
    pipe, hooks = stable_diffusion(), Unguided()
    calls = watch(pipe.unet)
    trainer = make_trainer(pipe=pipe, pipeline_hooks=hooks)
    trainer.train()
    assert set(calls.rows) == {4}  # of guidance_scale = 3, which the hook takes away
    assert len(hooks.calls) > 2 and all("guidance_scale" in names for names in hooks.calls)
    assert lines(trainer, "loss")[0]["policy/ratio_deviation_max"] == 0.0
