"""The value function V(x_t, prompt, t): what reward to expect from a denoising path that has come as far as x_t."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


# Rows of a prediction that are on the device at once.
PREDICTED_TOGETHER = 4096


class StepConditionedLinear(nn.Module):
    """A linear map whose outputs are scaled by a learned vector of the step: `embedding[step] * (W x + b)`."""

    def __init__(self, input_size: int, output_size: int, num_steps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, output_size)
        self.embedding = nn.Embedding(num_steps, output_size)
        nn.init.uniform_(self.embedding.weight)  # in [0, 1), as in the official code

    def forward(self, inputs: Tensor, steps: Tensor) -> Tensor:
        scaled: Tensor = self.embedding(steps) * self.linear(inputs)
        return scaled


class StepConditionedMLP(nn.Module):
    """
    The value network of DPOK (arXiv:2305.16381, appendix A.5; `ValueMulti` of the official code): three linear layers that are conditioned on the step, each
    followed by a ReLU, and a linear map to one number.

    Departs from the official code: the last layer starts at zero, and so does the output.

    Args:
        input_size (`int`): Numbers in a row of the input.
        num_steps (`int`): Denoising steps, those that are no actions included.
        hidden_size (`int`, defaults to 256)
    """

    def __init__(self, input_size: int, num_steps: int, hidden_size: int = 256) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(
            StepConditionedLinear(size, hidden_size, num_steps) for size in (input_size, hidden_size, hidden_size)
        )
        self.last = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: Tensor, steps: Tensor) -> Tensor:
        """
        Args:
            inputs (`torch.Tensor` of shape `(n, input_size)`): float32.
            steps (`torch.Tensor` of shape `(n,)`): int64, of the denoising loop, counted from 0 in generation order.

        Returns:
            `torch.Tensor` of shape `(n,)`
        """
        for layer in self.hidden:
            inputs = torch.relu(layer(inputs, steps))
        values: Tensor = self.last(inputs).squeeze(1)
        return values


class ValueFunction:
    """
    A [`StepConditionedMLP`] that is regressed on the rewards, with its own AdamW (arXiv:2305.16381, appendix A.5): the baseline of the advantage `r - V`.

    The network is built when the size of its inputs is known ([`~ValueFunction.build`]); until then V is the mean of the observed rewards. All processes build
    the same network, and stay equal if they observe the same rewards and average their gradients.

    Args:
        learning_rate (`float`): Of AdamW.
        scale_targets (`bool`): Regress on `(reward - mean) / std` of all rewards observed so far, and scale the prediction back. The network then starts at the
            mean, and its learning does not depend on the unit of the reward. Otherwise on the rewards themselves, from 0, as the official code does.
        seed (`int`): Of the initial weights; torch's own random state is not touched.
        device (`torch.device` or `str`)
    """

    def __init__(self, *, learning_rate: float, scale_targets: bool, seed: int, device: torch.device | str) -> None:
        self.learning_rate = learning_rate
        self.scale_targets = scale_targets
        self.seed = seed
        self.device = torch.device(device)
        self.network: StepConditionedMLP | None = None
        self._input_size = self._num_steps = 0
        # Of the rewards: how many, their mean, and the sum of their squared distances from it.
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    # ---------------------------------------------------------------- the network

    def build(self, input_size: int, num_steps: int) -> None:
        """
        Makes the network; does nothing if it is there already.

        Raises:
            ValueError: If it is there with other sizes.
        """
        if self.network is None:
            # A stream of its own: the same weights on all processes, and the caller's noise is what it was.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)
                self.network = StepConditionedMLP(input_size, num_steps).to(self.device)
            self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate)
            self._input_size, self._num_steps = input_size, num_steps
        elif (input_size, num_steps) != (self._input_size, self._num_steps):
            raise ValueError(
                f"the value function was built for {self._input_size} inputs and {self._num_steps} denoising steps, and is given {input_size} inputs and {num_steps} "
                "steps. Keep the size of the images, the number of steps and value_input as they were, or start a new value function (a new run)."
            )

    # ---------------------------------------------------------------- the targets

    def observe(self, rewards: Tensor) -> None:
        """
        Takes rewards into the running mean and standard deviation of the targets.

        Args:
            rewards (`torch.Tensor` of shape `(N,)`): Of all processes, in the same order everywhere; finite.

        Raises:
            ValueError: If a reward is not finite; the statistics are then as before.
        """
        values = rewards.detach().to("cpu", torch.float64)
        if not values.isfinite().all():
            broken = int((~values.isfinite()).sum())
            raise ValueError(f"{broken} of {len(values)} rewards are not finite; leave them out")
        if len(values) == 0:
            return
        # Chan's formula, which joins the statistics of two sets without a sum of squares that would cancel.
        mean = values.mean().item()
        shift, count = mean - self._mean, self._count + len(values)
        self._squares += (values - mean).square().sum().item() + shift**2 * self._count * len(values) / count
        self._mean += shift * len(values) / count
        self._count = count

    @property
    def target_mean(self) -> float:
        """What the network's 0 stands for, in the unit of the reward."""
        return self._mean if self.scale_targets else 0.0

    @property
    def target_std(self) -> float:
        """What the network's 1 stands for, in the unit of the reward."""
        if not self.scale_targets or self._squares == 0.0:
            return 1.0  # rewards that are all equal leave nothing to scale: every target is 0
        return math.sqrt(self._squares / self._count)

    # ---------------------------------------------------------------- prediction and regression

    @torch.no_grad()
    def predict(self, inputs: Tensor, steps: Tensor) -> Tensor:
        """
        V of each row.

        Args:
            inputs (`torch.Tensor` of shape `(n, input_size)`): Of any device and floating dtype.
            steps (`torch.Tensor` of shape `(n,)`): int64.

        Returns:
            `torch.Tensor` of shape `(n,)`, float32, in the unit of the reward, on the value function's device. Before there is a network, `target_mean`.
        """
        if self.network is None:
            return torch.full((len(steps),), self.target_mean, dtype=torch.float32, device=self.device)
        starts = range(0, len(steps), PREDICTED_TOGETHER)
        chunks = [slice(start, start + PREDICTED_TOGETHER) for start in starts]
        values = [self.network(*self._on_device(inputs[rows], steps[rows])) for rows in chunks]
        return self.target_mean + self.target_std * torch.cat(values)

    def fit(
        self,
        draw: Callable[[int], tuple[Tensor, Tensor, Tensor]],
        *,
        batch_size: int,
        updates: int,
        accumulation: int = 1,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> float:
        """
        Regresses V on rewards: `updates` steps of AdamW on the mean squared error, each of `accumulation` batches.

        Args:
            draw (`Callable`): `batch_size -> inputs (n, input_size), steps (n,), rewards (n,)`: transitions, each with the reward of its whole path.
            batch_size, updates, accumulation (`int`)
            average (`Callable`, *optional*): The mean over all processes of a tensor; called once for each update, with the gradient of all parameters as one vector.

        Returns:
            `float`: Mean loss of this process before each update, in units of the reward squared.

        Raises:
            RuntimeError: Before [`~ValueFunction.build`].
            FloatingPointError: If the gradient is not finite; on all processes alike.
        """
        if self.network is None:
            raise RuntimeError("the value function has no network yet: call build(input_size, num_steps) first")
        parameters = list(self.network.parameters())
        total = torch.zeros((), device=self.device)
        for _ in range(updates):
            self.optimizer.zero_grad()
            for _ in range(accumulation):
                inputs, steps, rewards = draw(batch_size)
                inputs, steps = self._on_device(inputs, steps)
                # In float64 until it is centred: rewards far from 0 would lose their differences.
                targets = ((rewards.detach().cpu().double() - self.target_mean) / self.target_std).to(inputs)
                loss = nn.functional.mse_loss(self.network(inputs, steps), targets) / accumulation
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
            if average is not None:
                gradient = average(gradient)
            if not gradient.isfinite().all():
                raise FloatingPointError(
                    "the gradient of the value function is NaN or infinite: its inputs are not finite, or value_learning_rate = "
                    f"{self.learning_rate} is too high. Lower it, or set value_scale_targets = True."
                )
            end = 0
            for parameter in parameters:
                start, end = end, end + parameter.numel()
                parameter.grad = gradient[start:end].view_as(parameter)
            self.optimizer.step()
        return total.item() / updates * self.target_std**2

    def _on_device(self, inputs: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.detach().to(self.device, torch.float32), steps.to(self.device)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer and statistics, in tensors and plain values: `torch.load(weights_only=True)` reads them."""
        return {
            "input_size": self._input_size,
            "num_steps": self._num_steps,
            "network": None if self.network is None else self.network.state_dict(),
            "optimizer": None if self.network is None else self.optimizer.state_dict(),
            "rewards": {"count": self._count, "mean": self._mean, "squares": self._squares},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Replaces network, optimizer (its learning rate too) and statistics. Builds the network if it is not there yet.

        Raises:
            ValueError: If the state is of a network with other sizes.
        """
        if state["network"] is not None:
            self.build(state["input_size"], state["num_steps"])
            assert self.network is not None
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(
                copy.deepcopy(state["optimizer"])
            )  # torch would share the moments with the state
        else:
            self.network = None
        rewards = state["rewards"]
        self._count, self._mean, self._squares = rewards["count"], rewards["mean"], rewards["squares"]


def explained_variance(values: Tensor, rewards: Tensor) -> float:
    """
    `1 - Var(reward - value) / Var(reward)`: 1 where V foretells every reward, 0 where it does no better than their mean, below 0 where it does worse.

    Args:
        values, rewards (`torch.Tensor` of shape `(n,)`)

    Returns:
        `float`: NaN where all rewards are equal, or there is none: nothing is there to be explained.

    Raises:
        ValueError: If the shapes differ.
    """
    if values.shape != rewards.shape or values.dim() != 1:
        raise ValueError(
            f"values and rewards must have one shape (n,), but have {tuple(values.shape)} and {tuple(rewards.shape)}"
        )
    if (rewards == rewards[:1]).all():
        return math.nan
    values, rewards = values.detach().cpu().double(), rewards.detach().cpu().double()
    return 1.0 - (rewards - values).var(correction=0).item() / rewards.var(correction=0).item()
