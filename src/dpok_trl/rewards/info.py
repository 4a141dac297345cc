"""What a shipped reward says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardInfo:
    """One row of the table of rewards."""

    name: str  # "image-reward"
    summary: str  # one line
    input: str  # "image, prompt"
    range: str  # "about N(0, 1)"
    weights: str  # Hub id and file, or "none"
    licence: str  # of the weights
    needs: str  # extras, or "nothing more"
    overlooks: str = ""  # one sentence for model cards: what a model tuned on it gets wrong
