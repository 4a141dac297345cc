"""Loads what was pushed, on an empty cache, and compares its images with those of the trained pipeline. Run by test_round_trip.py."""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from hub_families import MAKE, image
from huggingface_hub import ModelCard

from dpok_trl import load_tuned


FOLDER, OWNER = Path(sys.argv[1]), sys.argv[2]
found = {}
for family in MAKE:
    trained, repository = torch.load(FOLDER / f"{family}.pt"), f"{OWNER}/{family}-lora"
    base = DiffusionPipeline.from_pretrained(ModelCard.load(repository).data.base_model)
    untouched = image(base)
    base.load_lora_weights(repository)
    pictures = {"base": untouched, "stock": image(base), "load_tuned": image(load_tuned(repository))}
    pictures["run"] = image(load_tuned(FOLDER / family))
    pictures["saved model"] = image(load_tuned(FOLDER / family / "model"))
    found[family] = {name: (picture - trained).abs().max().item() for name, picture in pictures.items()}
print(json.dumps(found))
