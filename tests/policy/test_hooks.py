"""A pipeline of one's own through `PipelineHooks`, and that no family of pipelines has code of its own in the package."""

import ast
import re
from pathlib import Path

import diffusers
import pytest
import torch
from painter import Gallery, network, painter
from peft import PeftModel
from tiny import ddim, nudge
from walks import NUDGE, PROMPTS, SEEDS, kl, log_probs, trained

import dpok_trl
from dpok_trl import check_pipeline
from dpok_trl.policy.errors import UnsupportedPipelineError
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.tuning import tune


SAME_NOISE = 2e-5  # images in [0, 1]: our mean is written in another (stabler) form than diffusers'


class GalleryHooks(PipelineHooks):
    def denoisers(self, pipe):
        return {"net": pipe.net}

    def call(self, pipe, arguments):
        return pipe(
            arguments["prompt"],
            arguments["generator"],
            arguments.get("num_inference_steps", 4),
            output_type=arguments["output_type"],
        )

    def images(self, output):
        return output["rooms"]["main"]


def gallery() -> Gallery:
    return Gallery(network(), ddim())


@pytest.fixture
def policy() -> Policy:
    pipe = gallery()
    tuned = tune(pipe, GalleryHooks().denoisers(pipe), rank=2, alpha=5)
    nudge(pipe.net, NUDGE)
    return Policy(pipe, tuned, call_kwargs={"num_inference_steps": 3}, hooks=GalleryHooks())


def test_a_pipeline_of_one_s_own_is_a_policy(policy):
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert policy.memo is None and len(trajectory.next_latents) == 3  # the argument of the call arrives
    replayed = log_probs(policy(trajectory, verify=True))
    assert torch.equal(replayed, trajectory.log_probs)
    replayed.sum().backward()
    assert all(tensor.grad.any() for tensor in trained(policy).values())
    assert kl(policy, trajectory).min() > 0.0
    assert kl(policy, trajectory)[1] == pytest.approx(kl(policy, trajectory)[1])


def test_its_images_are_those_of_its_own_call(policy):
    """DDIM's own step at eta 1, which the pipeline does not ask for."""
    pipe = policy.pipe
    own_step = pipe.scheduler.step
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe.scheduler.step = lambda output, t, x: own_step(output, t, x, eta=1.0, variance_noise=noise(generators))
    try:
        expected = pipe(PROMPTS, generators, 3)["rooms"]["main"]
    finally:
        del pipe.scheduler.step
    assert (policy.rollout(PROMPTS, SEEDS).images - expected).abs().max() <= SAME_NOISE


def noise(generators):
    return torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators])


def test_its_adapter_is_saved_as_peft_s(policy, tmp_path):
    policy.tuned.save(policy.pipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    stock = gallery()
    stock.net = PeftModel.from_pretrained(stock.net, tmp_path / "net")
    policy.pipe.net.requires_grad_(
        False
    )  # as the loaded one: torch takes other kernels where weights require gradients
    generators = [[torch.Generator().manual_seed(seed) for seed in SEEDS] for _ in range(2)]
    images = [pipe(PROMPTS, g)["rooms"]["main"] for pipe, g in zip((stock, policy.pipe), generators, strict=True)]
    assert torch.equal(*images)


def test_the_check_takes_hooks():
    report = check_pipeline(gallery(), hooks=GalleryHooks())
    assert report.ok and report.pipeline == "Gallery" and len(report.steps) == 4


def test_without_hooks_it_is_told_which_ones_are_needed():
    report = check_pipeline(gallery())
    assert re.match(
        "Gallery has none of the components unet, transformer, transformer_2; it has net, scheduler. If one of them is the "
        "network of its denoising loop, say so with `PipelineHooks.denoisers`.",
        report.reason,
    )

    class WithoutImages(GalleryHooks):
        images = PipelineHooks.images

    report = check_pipeline(gallery(), hooks=WithoutImages())
    assert "gave a dict of titles, rooms" in report.reason and "`PipelineHooks.images`" in report.reason


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8), ["a picture"]],
    ids=["one channel", "too few", "no batch", "a list"],
)
def test_what_is_no_batch_of_images_is_refused(images):
    class Wrong(PipelineHooks):
        def images(self, output):
            return images

    pipe = painter()
    given = tuple(images.shape) if isinstance(images, torch.Tensor) else "list"
    message = (
        rf"images of shape \(2, 3, H, W\) or videos.*the pipeline gave {re.escape(str(given))}.*PipelineHooks.images"
    )
    with pytest.raises(UnsupportedPipelineError, match=message):
        Policy(pipe, hooks=Wrong()).rollout(PROMPTS, SEEDS)


# ---------------------------------------------------------------- no family has code of its own


SOURCE = Path(dpok_trl.__file__).parent
PIPELINES_AND_MODELS = {name for name in dir(diffusers) if re.search(r"Pipeline$|Model$|Transformer\w*$", name)} - {
    "DiffusionPipeline"
}
# fmt: off
FAMILIES = [
    "auraflow", "chroma", "cogvideo", "cogview", "flux", "hidream", "hunyuan", "kandinsky", "kolors", "lcm", "ltx",
    "lumina", "mochi", "pixart", "qwen", "sana", "sd", "sd1", "sd15", "sd3", "sdxl", "stable_diffusion",
    "stable-diffusion", "stablediffusion", "wan", "zimage", "z_image", "z-image",
]
# fmt: on
# Makers of Stable Diffusion pipelines: the demo, and DDPO's class under its old name
MAKERS = ("demo/", "policy/ddpo_pipeline.py")


def names_of_families(source: str) -> list[str]:
    """Strings in which a pipeline, a network or a family is named where code decides: in comparisons, in `startswith` and its kin, and anywhere
    as a whole string (the key of a table). Docstrings and messages may name whom they like."""
    found = []
    for node in ast.walk(ast.parse(source)):
        deciding = isinstance(node, (ast.Compare, ast.MatchValue)) or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith", "find", "search", "match", "fnmatch")
        )
        for part in ast.walk(node) if deciding else [node]:
            if not isinstance(part, ast.Constant) or not isinstance(part.value, str):
                continue
            words = re.split(r"[^a-z0-9_-]+", part.value.lower())
            if part.value in PIPELINES_AND_MODELS or (deciding and any(word in FAMILIES for word in words)):
                found.append(part.value)
    return found


def test_no_code_asks_for_a_family():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        assert names_of_families(file.read_text()) == [], file


def test_no_code_imports_a_pipeline_or_a_network():
    for file in SOURCE.rglob("*.py"):
        if file.relative_to(SOURCE).as_posix().startswith(MAKERS):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers"):
                named = {alias.name for alias in node.names} & PIPELINES_AND_MODELS
                assert not named, file


@pytest.mark.parametrize(
    "code",
    [
        'if family == "sdxl": pass',
        'if family in ("sd", "flux"): pass',
        'if type(pipe).__name__ == "FluxPipeline": pass',
        'if type(pipe).__name__.startswith("Flux"): pass',
        'TABLE = {"StableDiffusionPipeline": 1}',
        'match kind:\n    case "wan": pass',
    ],
)
def test_such_code_would_be_found(code):
    assert names_of_families(code)
