"""docs/bring-your-own-pipeline.md: every block of code runs, every command is understood, and every refusal that it quotes exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    WanPipeline,
)
from PIL import Image
from zoo import build
from zoo.wan import wan_transformer

from dpok_trl import cli
from dpok_trl.policy.lora_files import lora_state_dict


REPOSITORY = Path(__file__).parent.parent.parent
TEXT = (REPOSITORY / "docs" / "bring-your-own-pipeline.md").read_text(encoding="utf-8")


def two_experts():
    return build(WanPipeline, transformer_2=wan_transformer(), boundary_ratio=0.875)


# what stands behind the names of the page
MODELS = {
    "owner/model": lambda: build(StableDiffusionPipeline),
    "owner/two-experts": two_experts,
    "owner/image-to-image": lambda: build(StableDiffusionImg2ImgPipeline),
    "owner/video-model": lambda: build(WanPipeline),
}


@pytest.fixture
def tiny_models(monkeypatch):
    original = DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls, name, **kwargs):
        if name not in MODELS:
            return original(cls, name, **kwargs)
        return MODELS[name]().to(kwargs.get("dtype", kwargs.get("torch_dtype", torch.float32)))

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons, and remembers mixed precision in the environment."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def same_adapters(stock, tuned):
    for name in ("transformer", "transformer_2"):
        loaded, trained = (lora_state_dict(getattr(pipe, name)) for pipe in (stock, tuned))
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[key], trained[key]) for key in trained), name


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tiny_models, fresh_accelerate, tmp_path, monkeypatch):
    """As it stands there, but for one epoch of four steps a run and small pictures."""
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(f"{name}.png")
    namespace = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
    assert len(blocks) == TEXT.count("```python") > 10
    for number, code in enumerate(blocks):
        short = re.sub(r"\bnum_epochs=\d+", "num_epochs=1", code)
        short = re.sub(r"\b(?:512|480|832)\b", "16", short)
        short = re.sub(r'"num_frames": 17', '"num_frames": 5, "max_sequence_length": 16', short)
        short = re.sub(r"\b(sample_num_steps|num_inference_steps)=\d+", r"\1=4", short)
        exec(compile(short, f"block {number}", "exec"), namespace)
        if "two-experts" in code:
            same_adapters(namespace["stock"], namespace["trainer"].pipeline)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    lora = "pytorch_lora_weights.safetensors"
    assert {
        f"run/model/{lora}",
        f"experts/model/{lora}",
        "experts/model/pytorch_lora_weights_transformer_2.safetensors",
    } <= files
    assert {"full/model/unet/diffusion_pytorch_model.safetensors", "own/model/net/adapter_model.safetensors"} <= files
    assert namespace["pictures"].shape == (1, 3, 32, 32)


def test_the_commands_are_understood():
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.S | re.M) for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        name, *argv = shlex.split(line)
        assert name == "dpok-trl" and cli.build_parser().parse_args(argv).command == "check"


def test_a_command_runs(capsys):
    [line] = [line for line in TEXT.splitlines() if line.startswith("dpok-trl check demo")]
    assert cli.main(shlex.split(line)[1:]) == 0
    assert "It can be tuned" in capsys.readouterr().out


def test_the_quoted_refusals_exist():
    source = "\n".join(
        path.read_text()
        for folder in ("policy", "core")
        for path in (REPOSITORY / "src" / "dpok_trl" / folder).glob("*.py")
    )
    table = re.search(r"^\| the message says .*?\n\n", TEXT, re.S | re.M)[0]
    quoted = [
        phrase for row in table.strip().splitlines()[2:] for phrase in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(quoted) > 15
    # The source breaks its messages over lines and puts values and backticks into them.
    plain = re.sub(r'"\s*\n\s*f?"', "", source).replace("`", "")
    for phrase in quoted:
        pattern = r".{0,80}".join(re.escape(part.strip()) for part in phrase.split("..."))
        assert re.search(pattern, plain), phrase


def test_the_readme_runs_on_the_embedded_pipeline(tmp_path, monkeypatch, fresh_accelerate):
    """Its ten lines with the two pieces of code that it gives for a machine without the Hub, for one epoch of two steps."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    line, argument = re.search(r"`(from dpok_trl\.demo import \w+)` and `(sd_pipeline=\w+\(\))`", readme).groups()
    [code] = [
        block for block in re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M) if "trainer.train()" in block
    ]
    code, replaced = re.subn(r'sd_pipeline="[^"]+"', argument, code)
    code, shortened = re.subn(r"num_epochs=\d+", "num_epochs=1, sample_num_steps=2", code)
    assert replaced == shortened == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(f"{line}\n{code}", "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "bright-rabbit" / "model" / "pytorch_lora_weights.safetensors").is_file()
