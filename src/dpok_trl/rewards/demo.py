"""The demo world's rewards by name; what they compute is in `dpok_trl.demo.world`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dpok_trl.demo.world import REWARDS
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import refuse_videos


class _DemoReward:
    info: RewardInfo
    image_type = "pt"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Any]]:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): In [0, 1].
            prompts (`Sequence[str]` of length `B`)

        Returns:
            `tuple[torch.Tensor, dict]`: The rewards `(B,)`, and what the function of the demo world says besides.
        """
        refuse_videos(self.info.name, images)
        return REWARDS[self.info.name.removeprefix("demo-")](images, prompts, None)


class DemoExact(_DemoReward):
    """1 where the picture shows what a sentence of the demo grammar asks for, all of it and nothing else, otherwise 0."""

    info = RewardInfo(
        name="demo-exact",
        summary="the demo world's checker: 1 if the picture is right, else 0",
        input="image, prompt of the demo grammar",
        range="0 or 1",
        weights="none",
        licence="Apache-2.0 (this package)",
        needs="nothing more",
        overlooks="Reads sentences of the demo grammar only; it is 0 or 1, so a prompt that is never right gives no signal.",
    )


class DemoSoft(_DemoReward):
    """Partial credit for right colours, shapes, numbers and places; 1 exactly where [`DemoExact`] is 1."""

    info = RewardInfo(
        name="demo-soft",
        summary="the demo world's checker with partial credit",
        input="image, prompt of the demo grammar",
        range="[0, 1]",
        weights="none",
        licence="Apache-2.0 (this package)",
        needs="nothing more",
        overlooks="Reads sentences of the demo grammar only.",
    )


class DemoGreenness(_DemoReward):
    """How green the picture is, whatever the prompt: made to be hacked."""

    info = RewardInfo(
        name="demo-greenness",
        summary="how green the picture is, whatever was asked: a reward made to be hacked",
        input="image",
        range="[0, 1]",
        weights="none",
        licence="Apache-2.0 (this package)",
        needs="nothing more",
        overlooks="Does not look at the prompt: a green canvas is the best picture.",
    )
