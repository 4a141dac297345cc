"""The pipeline that this package ships: its name and its folder. Imports nothing heavy, so that the help of a command can name it at once."""

from __future__ import annotations

from pathlib import Path


DEMO = "demo"  # in the place of a Hub id or folder
SHIPPED_PIPELINE = Path(__file__).parents[1] / "demo" / "assets" / "pipeline"
