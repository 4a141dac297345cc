"""Prompts: where they come from (`sources`), and data sets, files and shipped lists of them (`datasets`)."""

from dpok_trl.prompts.datasets import load_prompts
from dpok_trl.prompts.sources import PromptSource, prompt_source


__all__ = ["PromptSource", "load_prompts", "prompt_source"]
