"""Runs the Python blocks of docs/hub.md from top to bottom, but for their length. Run by test_page.py."""

import re
import sys
from pathlib import Path

import torch


torch.set_num_threads(1)
text = Path(sys.argv[1]).read_text()
blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
names = {}
for block, epochs in zip(blocks, (1, 1, 1, 2), strict=True):
    short = re.sub(r"num_epochs=\d+", f"num_epochs={epochs}, sample_num_steps=2", block)
    exec(compile(short, "hub.md", "exec"), names)
