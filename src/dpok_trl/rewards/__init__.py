"""The judge: functions of images and prompts. Knows no policy."""

from dpok_trl.rewards.base import RewardError, RewardFunction, reward_name, score


__all__ = ["RewardError", "RewardFunction", "reward_name", "score"]
