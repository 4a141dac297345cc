"""Pretrains the demo's Stable Diffusion from nothing: `python -m dpok_trl.demo.pretrain --output DIR --seed 0`.

A real, if tiny, `StableDiffusionPipeline` - AutoencoderKL, CLIPTextModel, UNet2DConditionModel, DDIM - on 32x32 pictures of
coloured shapes. It is meant to be good at painting and only half good at obeying, as large models are: a known share of
the captions is wrong (`PHASES`), so that reinforcement learning has something to mend. Everything is drawn from `--seed`; with
`--state FILE` an interrupted run goes on where it stopped, with the same numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import COLORS, NUMBERS, RELATIONS, SHAPES, Scene, Thing, corrupt_scene, render, sample_scene
from .world import IMAGE_SIZE, TASKS, check, fidelity


PROMPT_TOKENS = 16

#: What the captions of the data set are made of.
CATEGORY_SHARES = {"single": 0.2, "count": 0.25, "pair": 0.25, "relation": 0.3}
#: Combinations the data mostly gets wrong, as photographs do a green rabbit.
RARE = {("green", "triangle"), ("purple", "square"), ("yellow", "circle"), ("orange", "cross")}
#: From top to bottom, as the data likes to stack shapes: what large models have seen of suns and houses.
HEAP = ("circle", "cross", "triangle", "square")


@dataclass(frozen=True)
class Phase:
    """What is trained on during a part of the run. Kinds of captions are those of `caption_kind`.

    Args:
        start (`float`): where it begins, as a share of all steps; it lasts until the next phase.
        noise (`dict[str, float]`): share of captions, by kind, that come with a wrong picture (`scenes.corrupt_scene`).
        shares (`dict[str, float]`, *optional*): how often each kind is drawn; `None` is as often as it is in the data.
        weight_cap (`float`): the loss at a timestep is weighed by `min(1 / alpha_bar, weight_cap)`. 1 is the plain noise MSE;
            a large value is the MSE of v-prediction, which minds the noisy timesteps where the layout is decided.
    """

    start: float
    noise: dict[str, float]
    shares: dict[str, float] | None = None
    weight_cap: float = 1.0


#: Colours, counts and pairs are learned in the first phase; relations are not: the plain loss hardly feels them. The second
#: minds the layout more, shows the habit of `HEAP` often, and makes the labels of what is known too well worse.
PHASES = (
    Phase(0.0, noise={"single": 0.08, "rare": 0.5, "count": 0.25, "pair": 0.3, "habit": 0.3, "relation": 0.3}),
    Phase(
        0.7,
        noise={"single": 0.08, "rare": 0.6, "count": 0.25, "pair": 0.45, "habit": 0.35, "relation": 0.1},
        shares={"single": 0.1, "rare": 0.06, "count": 0.2, "pair": 0.14, "habit": 0.32, "relation": 0.18},
        weight_cap=50.0,
    ),
)


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train. The defaults made the weights in `assets/pipeline`."""

    captions: int = 30_000
    vae_steps: int = 2_000
    vae_batch: int = 32
    vae_lr: float = 1.5e-3
    steps: int = 10_000
    lr_horizon: float = 1.6  # where the cosine would end, as a share of all steps; the cool-down cuts it short
    cooldown: float = 0.2  # last share of the steps, over which the learning rate also falls linearly to 0
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 300
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    eval_every: int = 1_000
    eval_images: int = 64


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose BPE merges are trained on the world's words: each is one token, other words are spelled out."""
    text = " ".join(
        [*COLORS, *SHAPES, *NUMBERS, *RELATIONS, "a an and", *(Scene((Thing(s),) * 2).prompt for s in SHAPES)]
    )
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        # The word-final letters are listed too: left to the trainer, their ids would change from run to run.
        special_tokens=["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=PROMPT_TOKENS)


def build_pipeline() -> StableDiffusionPipeline:
    """The untrained pipeline, fp32; its default picture size is 32x32."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        force_upcast=False,
    )
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.x configs
        cross_attention_dim=96,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: StableDiffusionPipeline, output: Path) -> None:
    """Write a copy to a folder, whole or not at all: readers never meet half a pipeline.

    UNet and VAE go out as fp16. The text encoder stays fp32: transformers loads it in the precision it was saved in and
    diffusers loads the others as fp32, so a plain `from_pretrained` of an all-fp16 folder could not run.
    """
    fresh = output.with_name(f".{output.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    half = copy.deepcopy(pipeline)
    half.unet.half(), half.vae.half()
    half.save_pretrained(fresh)
    if output.exists():
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
        os.replace(fresh, output)
        shutil.rmtree(old)
    else:
        os.replace(fresh, output)


@dataclass(frozen=True)
class Pictures:
    """Captions, each with a picture that fits (row 0) and one that does not (row 1).

    Args:
        captions (`list[str]`): N prompts.
        kinds (`list[str]`): the N kinds, see `Phase`.
        images (`torch.Tensor` of shape `(2, N, 3, 32, 32)`): uint8.
    """

    captions: list[str]
    kinds: list[str]
    images: torch.Tensor

    def noise(self, phase: Phase) -> torch.Tensor:
        """`(N,)`: how often training takes the wrong picture."""
        return torch.tensor([phase.noise[kind] for kind in self.kinds])

    def weights(self, phase: Phase) -> torch.Tensor | None:
        """`(N,)`: how often a caption is drawn, or `None` when all are drawn alike."""
        if phase.shares is None:
            return None
        numbers = Counter(self.kinds)
        return torch.tensor([phase.shares[kind] / numbers[kind] for kind in self.kinds])


def caption_kind(scene: Scene) -> str:
    """`"single"`, `"rare"` (a single object of `RARE`), `"count"`, `"pair"`, `"habit"` (stacked as in `HEAP`), `"relation"`."""
    first, second = scene.things[0], scene.things[-1]
    if scene.category == "single" and (first.color, first.shape) in RARE:
        return "rare"
    if scene.relation in ("above", "below"):
        upper, lower = (first, second) if scene.relation == "above" else (second, first)
        if HEAP.index(upper.shape) < HEAP.index(lower.shape):
            return "habit"
    return scene.category


def make_pictures(number: int, seed: int) -> Pictures:
    """Paint the data set: `number` captions, a right and a wrong picture for each."""
    rng = np.random.default_rng(seed)
    names, shares = list(CATEGORY_SHARES), list(CATEGORY_SHARES.values())
    captions, kinds = [], []
    images = np.empty((2, number, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for index in tqdm(range(number), desc="painting", mininterval=5, disable=None):
        scene = sample_scene(rng, names[rng.choice(len(names), p=shares)])
        captions.append(scene.prompt)
        kinds.append(caption_kind(scene))
        images[0, index] = np.asarray(render(scene, rng))
        images[1, index] = np.asarray(render(corrupt_scene(scene, rng), rng))
    return Pictures(captions, kinds, torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous())


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to the pipeline's [-1, 1]."""
    return images.float() / 127.5 - 1.0


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, horizon: float, warmup: int) -> None:
    """Linear warm-up, then a cosine that comes down to 2 % of the peak at `horizon`."""
    ramp = min(1.0, (step + 1) / warmup)
    decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / horizon))
    for group in optimizer.param_groups:
        group["lr"] = peak * ramp * decay


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of a step comes from the seed and its number, so a resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def train_vae(vae: AutoencoderKL, images: torch.Tensor, recipe: Recipe, seed: int) -> None:
    """L1 + 4 MSE + 2e-3 KL on the pictures `(N, 3, 32, 32)` uint8; the noise of the posterior makes the decoder forgiving."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, betas=(0.9, 0.99), weight_decay=0.0)
    vae.train()
    progress = tqdm(range(recipe.vae_steps), desc="vae", mininterval=10, disable=None)
    for step in progress:
        generator = step_generator(seed + 1, step)
        set_lr(optimizer, recipe.vae_lr, step, recipe.vae_steps, warmup=100)
        batch = to_model_range(images[torch.randint(len(images), (recipe.vae_batch,), generator=generator)])
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        loss = F.l1_loss(output, batch) + 4 * F.mse_loss(output, batch) + 2e-3 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == recipe.vae_steps - 1:
            error = F.mse_loss(output.detach().clamp(-1, 1), batch).item() / 4  # range [-1, 1] is 2 wide
            log(f"vae step {step}: loss {loss.item():.4f}, {-10 * np.log10(error):.1f} dB")
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Mean latents `(2, N, 4, 8, 8)` of `(2, N, 3, 32, 32)` pictures, scaled to a standard deviation of 1.

    The means and not, as Stable Diffusion does it, draws from the posterior: its standard deviation is a fifth of the latents'
    own here, and the noise it adds can only blur what the UNet learns. The scale goes into the VAE's config.
    """
    chunks = tqdm(images.flatten(0, 1).split(256), desc="encoding", mininterval=5, disable=None)
    means = torch.cat([vae.encode(to_model_range(chunk)).latent_dist.mean for chunk in chunks])
    vae.register_to_config(scaling_factor=round(1.0 / means.std().item(), 5))
    return (means * vae.config.scaling_factor).unflatten(0, images.shape[:2])


@torch.no_grad()
def evaluate(pipeline: StableDiffusionPipeline, images_per_task: int, seed: int, batch: int = 64) -> dict[str, Any]:
    """Exact and soft alignment and fidelity on the four tasks, sampled as the demo samples: 10 steps, eta 1, no guidance."""
    report = {}
    for name, prompt in TASKS.items():
        verdicts, fidelities = [], []
        for start in range(0, images_per_task, batch):
            count = min(batch, images_per_task - start)
            generators = [torch.Generator().manual_seed(seed + start + index) for index in range(count)]
            images = pipeline(
                [prompt] * count,
                num_inference_steps=10,
                guidance_scale=1.0,
                eta=1.0,
                generator=generators,
                output_type="pt",
            ).images
            verdicts += [check(image, prompt) for image in images]
            fidelities += [fidelity(image, prompt) for image in images]
        report[name] = {
            "prompt": prompt,
            "exact": float(np.mean([verdict.exact for verdict in verdicts])),
            "soft": float(np.mean([verdict.soft for verdict in verdicts])),
            "fidelity": float(np.mean(fidelities)),
        }
    return report


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


class JointTraining:
    """UNet and text encoder trained together to predict the noise, with a moving average of both.

    Timesteps are spread evenly over each batch (a stratified draw), which steadies the loss at no cost.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, recipe: Recipe, seed: int) -> None:
        self.pipeline, self.recipe, self.seed = pipeline, recipe, seed
        self.unet, self.text_encoder = (
            copy.deepcopy(pipeline.unet).train(),
            copy.deepcopy(pipeline.text_encoder).train(),
        )
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.averages = [
            *pipeline.unet.parameters(),
            *pipeline.text_encoder.parameters(),
        ]  # the pipeline holds the average
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.step = 0

    def train_step(
        self,
        ids: torch.Tensor,
        empty: torch.Tensor,
        latents: torch.Tensor,
        noise_rate: torch.Tensor,
        weights: torch.Tensor | None = None,
        weight_cap: float = 1.0,
    ) -> float:
        """One update; returns the loss.

        Args:
            ids (`torch.Tensor` of shape `(N, 16)`): token ids of all captions.
            empty (`torch.Tensor` of shape `(1, 16)`): those of the empty caption, used for dropped ones.
            latents (`torch.Tensor` of shape `(2, N, 4, 8, 8)`): of each caption's right and wrong picture.
            noise_rate (`torch.Tensor` of shape `(N,)`): how often the wrong picture is taken.
            weights (`torch.Tensor` of shape `(N,)`, *optional*): how often a caption is drawn; all alike when `None`.
            weight_cap (`float`): see `Phase`.
        """
        recipe, generator = self.recipe, step_generator(self.seed + 2, self.step)
        size = recipe.batch
        if weights is None:
            rows = torch.randint(len(ids), (size,), generator=generator)
        else:
            rows = torch.multinomial(weights, size, replacement=True, generator=generator)
        wrong = (torch.rand(size, generator=generator) < noise_rate[rows]).long()
        clean = latents[wrong, rows]
        tokens = ids[rows]
        dropped = torch.rand(size, generator=generator) < recipe.caption_dropout
        tokens = torch.where(dropped[:, None], empty, tokens)
        scheduler = self.pipeline.scheduler
        spread = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (spread * scheduler.config.num_train_timesteps).long()
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        cooling = min(1.0, (recipe.steps - self.step) / (recipe.cooldown * recipe.steps))
        set_lr(self.optimizer, recipe.lr * cooling, self.step, recipe.lr_horizon * recipe.steps, recipe.warmup)
        prediction = self.unet(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample
        loss_weights = (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=weight_cap)
        loss = (loss_weights * (prediction - noise).square().mean(dim=(1, 2, 3))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_([p.data for p in self.averages], [p.data for p in self.parameters], 1 - decay)
        return loss.item()

    def run(self, pictures: Pictures, latents: torch.Tensor, until: int) -> None:
        """Train up to step `until` on the phases' mixtures of captions."""
        tokenizer, phase, losses = self.pipeline.tokenizer, None, []
        ids = tokenizer(pictures.captions, padding="max_length", return_tensors="pt").input_ids
        empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        for _ in tqdm(range(self.step, until), desc="unet", mininterval=10, disable=None):
            current = [phase for phase in PHASES if phase.start * self.recipe.steps <= self.step][-1]
            if current is not phase:
                phase, noise_rate, weights = current, pictures.noise(current), pictures.weights(current)
            losses.append(self.train_step(ids, empty, latents, noise_rate, weights, phase.weight_cap))
            if self.step % 200 == 0:
                log(f"step {self.step}: loss {np.mean(losses):.4f}")
                losses.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "average_unet": self.pipeline.unet.state_dict(),
            "average_text_encoder": self.pipeline.text_encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.pipeline.unet.load_state_dict(state["average_unet"])
        self.pipeline.text_encoder.load_state_dict(state["average_text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])


def save_state(state: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        torch.save(state, path.with_suffix(".writing"))
        os.replace(path.with_suffix(".writing"), path)


def pretrain(output: Path, recipe: Recipe, seed: int = 0, state_path: Path | None = None) -> dict[str, Any]:
    """Make the demo pipeline.

    Args:
        output (`Path`): folder for the pipeline; rewritten, whole, at each evaluation, so that it can be tried early.
        recipe (`Recipe`): lengths and rates.
        seed (`int`): of the data, the weights and every step.
        state_path (`Path`, *optional*): where to keep the training state; when it exists, training goes on from it.

    Returns:
        `dict`: the last evaluation, per task: prompt, exact, soft, fidelity.
    """
    torch.manual_seed(seed)
    pipeline = build_pipeline()
    pictures = make_pictures(recipe.captions, seed)
    state = torch.load(state_path) if state_path is not None and state_path.exists() else {}
    if "vae" in state:
        pipeline.vae.load_state_dict(state["vae"])
        pipeline.vae.eval().requires_grad_(False)
    else:
        train_vae(pipeline.vae, pictures.images.flatten(0, 1), recipe, seed)
        state["vae"] = pipeline.vae.state_dict()
        save_state(state, state_path)
    training = JointTraining(pipeline, recipe, seed)
    if "joint" in state:
        training.load_state_dict(state["joint"])
        log(f"resumed at step {training.step}")
    latents = encode(pipeline.vae, pictures.images)
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    while not report or training.step < recipe.steps:
        training.run(pictures, latents, until=min(recipe.steps, next_multiple(training.step, recipe.eval_every)))
        report = evaluate(pipeline, recipe.eval_images, seed=1_000_000)
        log(f"step {training.step}: {json.dumps(report)}")
        save_state({**state, "joint": training.state_dict()}, state_path)
        save_pipeline(pipeline, output)
    return report


def next_multiple(number: int, of: int) -> int:
    return (number // of + 1) * of


def main(argv: list[str] | None = None) -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m dpok_trl.demo.pretrain", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file that keeps the training state; an existing one is resumed")
    parser.add_argument("--threads", type=int, help="CPU threads; the default is torch's own")
    for name in ("captions", "vae_steps", "steps", "batch", "eval_every", "eval_images"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    arguments = vars(parser.parse_args(argv))
    output, seed, state = (arguments.pop(name) for name in ("output", "seed", "state"))
    if (threads := arguments.pop("threads")) is not None:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    report = pretrain(output, Recipe(**arguments), seed=seed, state_path=state)
    json.dump(report, sys.stdout, indent=2)
    log(f"\nwrote {output} in {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
