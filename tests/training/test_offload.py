"""What is moved off the device while it is not needed, and that it comes back whatever happens."""

import pytest
import torch
from tiny import FAMILIES, stable_diffusion

from dpok_trl import RewardError
from dpok_trl.policy.errors import ReplayError


CPU = torch.device("cpu")


class Judge(torch.nn.Module):
    """A reward with a weight, as a scoring model has."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.fails = fails

    def forward(self, images, prompts, metadata):
        if self.fails:
            raise ConnectionError("no route to host")
        return (images.mean((2, 3)) * self.weight).sum(1).detach()


# ---------------------------------------------------------------- the reward


def test_the_reward_is_on_the_device_while_it_scores_only(make_trainer, record_to):
    judge = Judge()
    sent = record_to(judge)
    log = []
    judge.register_forward_pre_hook(lambda module, args: log.append(len(sent)))
    trainer = make_trainer(judge, num_epochs=2, sample_num_batches_per_epoch=2, reward_offload=True)
    device = trainer.accelerator.device
    assert sent == [CPU]
    trainer.train()
    assert sent == [CPU, device, CPU, device, CPU]
    assert log == [2, 2, 4, 4]  # scored between the way there and the way back


def test_the_reward_leaves_the_device_also_after_it_failed(make_trainer, record_to):
    judge = Judge(fails=True)
    sent = record_to(judge)
    trainer = make_trainer(judge, reward_offload=True)
    with pytest.raises(RewardError, match="no route to host"):
        trainer.train()
    assert sent == [CPU, trainer.accelerator.device, CPU]


def test_without_offload_the_reward_is_left_where_it_is(make_trainer, record_to):
    judge = Judge()
    sent = record_to(judge)
    make_trainer(judge).train()
    assert sent == []


def test_a_reward_that_cannot_be_moved_is_refused(make_trainer):
    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))

    with pytest.raises(
        ValueError,
        match=r"reward_offload = True needs a reward that can be moved \(a torch.nn.Module.*given: brightness. Set it",
    ):
        make_trainer(brightness, reward_offload=True)


# ---------------------------------------------------------------- the text encoders


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_encoders_are_away_during_the_update(family, make_trainer, record_to, lines, adapter, tmp_path):
    trainer = make_trainer(pipe=FAMILIES[family](), num_epochs=2, sample_offload_encoders=True)
    names = [name for name in trainer.pipeline.components if name.startswith("text_encoder")]
    encoders = [part for name in names if (part := getattr(trainer.pipeline, name)) is not None]
    sent = [record_to(encoder) for encoder in encoders]
    encoded, during_updates, positions = [], [], []
    for encoder in encoders:
        encoder.register_forward_pre_hook(lambda module, args: encoded.append(1))
    update = trainer._update

    def watched(transitions):
        before = len(encoded)
        metrics = update(transitions)
        during_updates.append(len(encoded) - before)
        positions.append([len(journeys) for journeys in sent])
        return metrics

    trainer._update = watched
    trainer.train()
    device = trainer.accelerator.device
    assert all(journeys == [CPU, device, CPU, device] for journeys in sent)
    assert positions == [[1] * len(sent), [3] * len(sent)]  # away, and not yet back
    assert during_updates == [0, 0] and len(encoded) > 0
    assert not trainer.policy.offloaded

    plain = make_trainer(pipe=FAMILIES[family](), num_epochs=2, output_dir=str(tmp_path / "plain"))
    plain.train()
    assert all(torch.equal(value, adapter(plain)[name]) for name, value in adapter(trainer).items())


def test_the_text_encoders_come_back_after_an_exception(make_trainer, record_to):
    trainer = make_trainer(sample_offload_encoders=True)
    sent = record_to(trainer.pipeline.text_encoder)

    def fails(update):
        raise KeyboardInterrupt

    trainer._update = fails
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sent == [CPU, trainer.accelerator.device]
    assert not trainer.policy.offloaded
    trainer.sample(1)  # and it samples on


class EncodesByItself(type(stable_diffusion())):
    """Asks its text encoder in the call, beside `encode_prompt`."""

    def __call__(self, prompt=None, num_inference_steps=4, guidance_scale=1.0, generator=None, output_type="pil",
                 return_dict=True):  # fmt: skip
        self.text_encoder(torch.zeros(1, 4, dtype=torch.long))
        return super().__call__(
            prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generator,
            output_type=output_type, return_dict=return_dict,
        )  # fmt: skip


def test_a_pipeline_that_asks_its_text_encoder_in_a_replay_is_told_so(make_trainer):
    pipe = EncodesByItself(**stable_diffusion().components, requires_safety_checker=False)
    make_trainer(pipe=pipe, sample_guidance_scale=1.0).sample(0)
    with pytest.raises(
        ReplayError,
        match="calls `text_encoder` in a replay, and it is off the device.*Set sample_offload_encoders = False",
    ):
        make_trainer(pipe=pipe, sample_guidance_scale=1.0, sample_offload_encoders=True).train()
