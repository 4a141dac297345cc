"""What the KL between two distributions is at least, of which there are samples only."""

from __future__ import annotations

import math

import torch
from scipy.stats import beta
from torch import nn


CONFIDENCE = 0.95


def kl_from_below(first: torch.Tensor, second: torch.Tensor, seed: int, epochs: int = 40) -> float:
    """What KL(first || second) is at least, with 95 % confidence.

    For any set A, KL(first || second) is at least the KL between
    Bernoulli(first(A)) and Bernoulli(second(A)) (data processing). A is where a classifier between the two scores above a threshold: the classifier is
    trained on half of the samples, stops and takes its threshold where an eighth of them says, and the two probabilities are bounded by what the
    remaining three eighths show (Clopper-Pearson, 97.5 % each). It holds whatever was learned; a classifier that sees little makes it low, and even two
    distributions without overlap show no more than [`ceiling`] of n samples.

    Args:
        first, second (`torch.Tensor` of shape `(n, D)`)
        seed (`int`): Of the classifier and its batches.
        epochs (`int`): At most, of its training.

    Returns:
        `float`: In nats; 0 if nothing can be told.

    Raises:
        `ValueError`: For other shapes.
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) < 16:
        raise ValueError(
            f"two tensors of one shape (n, D) with n >= 16 are needed; given: {tuple(first.shape)} and {tuple(second.shape)}."
        )
    half, last = len(first) // 2, len(first) * 5 // 8
    scale = torch.cat([first[:half], second[:half]]).float()
    first, second = ((part.float() - scale.mean(0)) / scale.std(0).clamp(min=1e-6) for part in (first, second))
    network = _classifier(first[:half], second[:half], first[half:last], second[half:last], seed, epochs)
    with torch.no_grad():
        held, test = (
            (network(first[rows]).squeeze(1), network(second[rows]).squeeze(1))
            for rows in (slice(half, last), slice(last, None))
        )
    threshold = max(torch.cat(held).unique().tolist(), key=lambda value: _told_apart(*held, value))
    return _told_apart(*test, threshold)


def ceiling(count: int) -> float:
    """The largest answer that [`kl_from_below`] can give with `count` samples of each, in nats."""
    test = count - count * 5 // 8
    return _told_apart(torch.ones(test), torch.zeros(test), 0.5)


def _told_apart(first: torch.Tensor, second: torch.Tensor, threshold: float) -> float:
    count = len(first)
    above, below = int((first > threshold).sum()), int((second > threshold).sum())
    tail = (1 - CONFIDENCE) / 2
    likely = float(beta.ppf(tail, above, count - above + 1)) if above else 0.0
    unlikely = float(beta.ppf(1 - tail, below + 1, count - below)) if below < count else 1.0
    if likely <= unlikely:  # the two intervals meet
        return 0.0
    return likely * math.log(likely / unlikely) + (1 - likely) * math.log((1 - likely) / (1 - unlikely))


def _classifier(
    first: torch.Tensor,
    second: torch.Tensor,
    first_held: torch.Tensor,
    second_held: torch.Tensor,
    seed: int,
    epochs: int,
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = 256
        network = nn.Sequential(
            nn.Linear(first.shape[1], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
        samples = torch.cat([first, second])
        labels = torch.cat([torch.ones(len(first)), torch.zeros(len(second))])
        held = torch.cat([first_held, second_held])
        held_labels = torch.cat([torch.ones(len(first_held)), torch.zeros(len(second_held))])
        best, kept = float("inf"), None
        for _ in range(epochs):
            for rows in torch.randperm(len(samples)).split(64):
                loss = nn.functional.binary_cross_entropy_with_logits(network(samples[rows]).squeeze(1), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                found = nn.functional.binary_cross_entropy_with_logits(network(held).squeeze(1), held_labels).item()
            if found < best:
                best, kept = found, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return network.eval()
