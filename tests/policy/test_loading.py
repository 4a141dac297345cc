"""Pipelines by name: loaded as they are."""

import pytest
from diffusers import DDPMScheduler, PNDMScheduler
from tiny import stable_diffusion, stable_diffusion_xl

from dpok_trl.policy.loading import load_pipeline


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
