"""Pictures, tables and scalars in the trackers' own files: written by the real packages, offline, and read back."""

import json
import math
import sqlite3
import struct
import time
import types
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.tracking import SwanLabTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from dpok_trl.results import trackers as module
from dpok_trl.results.runlog import RunLog
from dpok_trl.results.samples import Samples
from dpok_trl.results.trackers import log_images_to, log_samples_to


LINES = [
    {"step": 0, "epoch": 0, "reward": 0.5, "rewards/hpsv2.1/mean": math.nan},
    {"step": 1, "epoch": 0, "loss": -0.25, "policy/clip_fraction": 0.0},
    {"step": 1, "epoch": 1, "reward": 0.75, "rewards/hpsv2.1/mean": 2.0},
]
COUNTS = {"reward": 2, "rewards/hpsv2.1/mean": 2, "loss": 1, "policy/clip_fraction": 1}


def make_samples(epoch: int, step: int) -> Samples:
    pictures = [Image.new("RGB", (6, 4), (255, 0, 0)), Image.new("RGB", (6, 4))]
    each = {"clip": [0.25, None], "ocr": [1.0, math.nan]}
    return Samples(pictures, ["a cat | big", "two dogs"], [0.5, math.nan], each, [3, 4], [None, None], epoch, step)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start(name)`: a tracker as Accelerate makes it, which needs no network and writes below tmp_path."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    kinds = {
        "tensorboard": lambda: TensorBoardTracker("run", tmp_path / "tensorboard"),
        "wandb": lambda: WandBTracker("run", mode="offline", dir=str(tmp_path)),
        # its folder is the one that TRACKIO_DIR named when it was first imported: the project must be a new one
        "trackio": lambda: TrackioTracker(f"run-{uuid.uuid4().hex}", name="one", auto_log_gpu=False),
        "swanlab": lambda: SwanLabTracker("run", mode="offline", log_dir=str(tmp_path / "swanlab")),
    }

    PartialState(cpu=True)  # Accelerate's trackers ask it which process they are in

    def started(name):
        pytest.importorskip(name)
        tracker = kinds[name]()
        tracker.start()
        return tracker

    yield started
    PartialState._reset_state()


def log_a_run(tracker, folder) -> None:
    for line in LINES:
        tracker.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])
        if "reward" in line:
            samples = make_samples(line["epoch"], line["step"])
            log_samples_to([tracker], samples, RunLog(folder).log_samples(samples))
    tracker.finish()


def test_tensorboard(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_a_run(start("tensorboard"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run")).Reload()
    assert {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]} == {**COUNTS, "epoch": 3}
    assert math.isnan(events.Scalars("rewards/hpsv2.1/mean")[0].value)
    images = events.Images("samples")
    grid = Image.open(tmp_path / "samples" / "epoch-0000.png")
    assert [(event.step, event.width, event.height) for event in images] == [(0, *grid.size), (1, *grid.size)]
    first = events.Tensors("samples_table/text_summary")[0]
    assert first.tensor_proto.string_val[0].decode() == (
        "| epoch | prompt | reward | rewards/clip | rewards/ocr |\n| --- | --- | --- | --- | --- |\n"
        "| 0 | a cat \\| big | 0.50 | 0.25 | 1.00 |\n| 0 | two dogs | nan | – | nan |"
    )


def test_wandb(start, tmp_path):
    log_a_run(start("wandb"), tmp_path)
    records = wandb_records(tmp_path)
    rows = [as_row(record.history.item) for record in records if record.HasField("history")]
    # what is logged at one step is one row of W&B: the epoch of the later line is the one that is kept
    assert count_keys(rows) == {**COUNTS, "epoch": 2, "samples": 2, "samples_table": 2}
    assert math.isnan(rows[0]["rewards/hpsv2.1/mean"])
    assert rows[0]["samples"]["captions"] == ["0.50 · a cat | big", "nan · two dogs"]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) == 4
    # a table with pictures is an artifact
    first, _ = (record.artifact.manifest.contents for record in records if record.HasField("artifact"))
    files = {entry.path: Path(entry.local_path) for entry in first}
    table = json.loads(files["samples_table.table.json"].read_text())
    assert table["columns"] == ["epoch", "prompt", "reward", "rewards/clip", "rewards/ocr", "image"]
    assert table["data"][0][:4] == [0, "a cat | big", 0.5, 0.25] and table["data"][1][3] is None
    assert Image.open(files[table["data"][0][5]["path"]]).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def wandb_records(folder: Path) -> list:
    """The records of an offline run's file: a header of 7 bytes, then LevelDB's log of protobuf messages in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(100):  # another process writes it, and may not be done when `finish` returns
        content, position, records, data = path.read_bytes(), 7, [], b""
        while position + 7 <= len(content):
            left = 32768 - position % 32768
            if left < 7:  # too little for another header
                position += left
                continue
            _, length, kind = struct.unpack_from(
                "<IHB", content, position
            )  # 1: whole, 2: first, 3: middle, 4: last part
            position += 7 + length
            data = (data if kind in (3, 4) else b"") + content[position - length : position]
            if kind in (1, 4) and position <= len(content):
                records.append(Record.FromString(data))
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def as_row(items) -> dict:
    row = {}
    for item in items:
        *outer, last = item.nested_key
        (row.setdefault(*outer, {}) if outer else row)[last] = json.loads(item.value_json)
    return row


def count_keys(rows) -> dict[str, int]:
    return dict(Counter(key for row in rows for key in row if not key.startswith("_")))


def test_trackio(start, tmp_path):
    tracker = start("trackio")
    log_a_run(tracker, tmp_path)
    from trackio.utils import TRACKIO_DIR

    with sqlite3.connect(TRACKIO_DIR / f"{tracker.run_name}.db") as database:
        rows = [
            (step, json.loads(text))
            for step, text in database.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
    assert count_keys(row for _, row in rows) == {**COUNTS, "epoch": 3, "samples": 2, "samples_table": 2}
    assert [row["rewards/hpsv2.1/mean"] for _, row in rows if "reward" in row] == ["NaN", 2.0]
    images = [row["samples"] for _, row in rows if "samples" in row]
    assert [image["caption"] for image in images] == ["epoch 0", "epoch 1"]
    grid = Image.open(TRACKIO_DIR / "media" / images[0]["file_path"])
    assert np.array_equal(
        np.asarray(grid.convert("RGB")), np.asarray(Image.open(tmp_path / "samples" / "epoch-0000.png"))
    )
    first, second = next(row["samples_table"]["_value"] for _, row in rows if "samples_table" in row)
    picture = Image.open(TRACKIO_DIR / "media" / first.pop("image")["file_path"])
    assert picture.size == (6 * 22, 4 * 22) and picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert first == {"epoch": 0, "prompt": "a cat | big", "reward": 0.5, "rewards/clip": 0.25, "rewards/ocr": 1.0}
    assert (second["reward"], second["rewards/clip"], second["rewards/ocr"]) == ("nan", "–", "nan")


def test_swanlab(start, tmp_path):
    log_a_run(start("swanlab"), tmp_path)
    (run,) = (tmp_path / "swanlab").glob("run-*")
    content = b"".join(path.read_bytes() for path in run.glob("*.swanlab"))
    for key in (*COUNTS, "epoch", "samples", "samples_table"):
        assert key.encode() in content, key
    for caption in ("0.50 · a cat | big", "nan · two dogs"):
        assert caption.encode() in content
    assert len(list((run / "media" / "image").iterdir())) == 4
    (table, *_) = sorted((run / "media" / "echarts").iterdir())
    assert "a cat | big" in table.read_text()


def test_pictures_and_captions_are_one_for_one(start):
    picture = Image.new("RGB", (2, 2))
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        log_images_to([], "samples", [picture], ["0.5", "0.6"], step=4)
    # trackio would drop a list with no more than a Python warning
    tracker = types.SimpleNamespace(name="trackio")
    with pytest.raises(ValueError, match="trackio takes one picture for each key, and 2 were given for samples"):
        log_images_to([tracker], "samples", [picture] * 2, ["a", "b"], step=4)


def test_other_trackers_are_warned_about_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(module, "_warned", set())
    tracker = types.SimpleNamespace(name="comet_ml")
    for epoch in (0, 1):
        log_samples_to([tracker], make_samples(epoch, 0), Image.new("RGB", (2, 2)))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no pictures are sent to the tracker comet_ml"
    ]
