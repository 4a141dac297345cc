"""What goes to the Hub: a minimal honest model card, and the upload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData


TEMPLATE = """---
{{{{ card_data }}}}
---

# {model_name}

{what} trained with [dpok-trl](https://pypi.org/project/dpok-trl/) by DPOK: reinforcement learning with a KL term to the
pretrained model.

| | |
|---|---|
| base model | {base_model} |
| reward | `{reward}` |
| epochs, optimizer steps | {epochs}, {updates} |
{metric_rows}

```python
{loading_code}
image = pipe("a prompt").images[0]
```

The numbers are of the last training batches, not of a held-out evaluation. A model tuned on a reward inherits what that reward
overlooks: look at the images before you use it.

## Settings

```json
{config}
```

## Citation

```bibtex
@inproceedings{{fan2023dpok,
  title     = {{DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models}},
  author    = {{Ying Fan and Olivia Watkins and Yuqing Du and Hao Liu and Moonkyung Ryu and Craig Boutilier and Pieter Abbeel and
               Mohammad Ghavamzadeh and Kangwook Lee and Kimin Lee}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year      = {{2023}},
  url       = {{https://arxiv.org/abs/2305.16381}}
}}
```
"""


# Paths of the machine, and arguments that may hold names, tokens or addresses: not for a public repository.
PRIVATE_SETTINGS = ("output_dir", "logdir", "resume_from", "tracker_kwargs", "accelerator_kwargs", "project_kwargs")


def write_model_card(
    folder: str | Path,
    *,
    model_name: str,
    pipeline: str,
    base_model: str | None,
    is_adapter: bool,
    loading_code: Callable[[str, str], str],
    reward: str,
    config: dict[str, Any],
    epochs: int,
    updates: int,
    metrics: dict[str, float],
    dataset_name: str | None = None,
    tags: list[str] | None = None,
) -> None:
    """Writes `README.md` and `dpok_config.json` into `folder`.

    Args:
        is_adapter (`bool`): Whether the folder holds an adapter, or a whole pipeline.
        loading_code (`Callable[[str, str], str]`): From the base model and the repository, the lines of Python that load it.

    The licence is left out: it follows from the base model's and is the user's to state.
    """
    folder = Path(folder)
    if base_model is not None and Path(base_model).exists():
        base_model = None  # a folder on this machine: no Hub id, and nobody else's business
    shown = {"reward": "reward (last batch)", "kl": "KL per step (last batch)"}
    rows = [f"| {label} | {metrics[name]:.4g} |" for name, label in shown.items() if name in metrics]
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        datasets=dataset_name,
        tags=[
            "text-to-image",
            "diffusers",
            *(["lora"] if is_adapter else []),
            "reinforcement-learning",
            *(tags or []),
        ],
    )
    settings = {name: value for name, value in config.items() if name.split("/")[0] not in PRIVATE_SETTINGS}
    settings = json.dumps(settings, indent=2, default=str)
    text = TEMPLATE.format(
        model_name=model_name,
        base_model=base_model or f"a local {pipeline}",
        what="A LoRA adapter" if is_adapter else f"A {pipeline}, its denoiser fine-tuned in all weights,",
        loading_code=loading_code(base_model or f"path/to/the/{pipeline}", model_name),
        reward=reward,
        epochs=epochs,
        updates=updates,
        metric_rows="\n".join(rows),
        config=settings,
    )
    ModelCard(text.replace("{{ card_data }}", data.to_yaml())).save(folder / "README.md")
    (folder / "dpok_config.json").write_text(settings)


def push_folder(folder: str | Path, repo_id: str, *, commit_message: str, private: bool | None) -> str:
    """Uploads a folder to a model repository, which is made if need be. Returns the commit's URL."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(folder_path=folder, repo_id=repo, commit_message=commit_message).commit_url
