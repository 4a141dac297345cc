"""What a run pushes when it is stopped. Pushes to a Hub are in tests/hub."""

import json

import pytest

from dpok_trl.results.hub import without_folders
from dpok_trl.training import publishing
from dpok_trl.training.interruption import Interruption


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("end", []), ("every_save", [("step 1", None)]), ("checkpoint", [("step 1", "checkpoint-1")])],
)
def test_a_run_that_is_stopped_pushes_what_it_saves(make_trainer, monkeypatch, strategy, expected):
    pushed = []

    def push(folder, repo_id, *, commit_message, private, checkpoint):
        pushed.append((commit_message.removeprefix("Training in progress, "), checkpoint and checkpoint.name))

    monkeypatch.setattr(publishing, "push_folder", push)
    monkeypatch.setattr(publishing, "open_repository", lambda repo_id, *, private: repo_id)
    monkeypatch.setattr(Interruption, "requested", lambda self: True)
    trainer = make_trainer(num_epochs=3, push_to_hub=True, hub_model_id="me/rabbit", hub_strategy=strategy)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert pushed == expected
    assert (trainer.output_dir / "checkpoint-1" / "trainer_state.json").is_file()


def test_no_folder_of_this_machine_goes_up(tmp_path):
    """Networks remember where they were loaded from: a repository is told, a folder is not."""
    config = tmp_path / "unet" / "config.json"
    config.parent.mkdir()
    for name, kept in (("runwayml/stable-diffusion-v1-5", True), (str(tmp_path), False), ("/no/longer/there", False)):
        config.write_text(json.dumps({"_name_or_path": name, "sample_size": 64}))
        content = without_folders(config)
        assert (content == config) == kept
        if not kept:
            assert json.loads(content) == {"sample_size": 64}
    other = tmp_path / "trainer_state.json"
    assert without_folders(other) == other and without_folders(b"bytes") == b"bytes"
