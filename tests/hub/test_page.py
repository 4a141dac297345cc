"""docs/hub.md: its code runs, with a Hub of our own."""

from pathlib import Path

from tiny import stable_diffusion


PAGE = Path(__file__).parents[2] / "docs" / "hub.md"


def test_the_code_of_the_page_runs(hub, client, tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    files = {
        path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    hub.create("stable-diffusion-v1-5/stable-diffusion-v1-5", files=files)
    done = client("run_page.py", PAGE)
    assert done.returncode == 0, done.stderr[-5000:]
    assert hub.messages("me/rabbit-lora") == ["End of training", "End of training"]
    assert "last-checkpoint/trainer_state.json" in hub.files("me/rabbit-lora")
