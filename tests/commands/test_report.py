"""`dpok-trl report`: the page from the folder alone."""

import subprocess
import sys

import pytest

from dpok_trl import cli
from dpok_trl.results.runlog import RunLog


@pytest.fixture
def run(tmp_path):
    """A run that was killed in its second epoch, before any report."""
    folder = tmp_path / "rabbit"
    log = RunLog(folder)
    log.log({"epoch": 0, "reward": 0.25, "images": 16}, step=0)
    log.log({"epoch": 0, "loss": 0.5, "kl": 0.125}, step=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "epo')
    return folder


def test_a_killed_run_has_a_page(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"Report: {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert "<h1>rabbit</h1>" in page and "1 epoch, 1 optimizer steps, 16 images" in page
    assert "Reward while training: 0.25." in page and "KL to the reference: 0.125." in page


def test_the_page_goes_where_it_is_asked_for_and_is_opened(run, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "--output", str(page), "--open"]) == 0
    assert opened == [page.as_uri()] and page.exists() and not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty"], "is no run: it holds neither metrics.jsonl nor report.json. Give the output_dir of a run."),
        (["nowhere"], "is no run: there is no such folder"),
        (["rabbit", "--output", "nowhere/page.html"], "there is no folder"),
        (["rabbit", "--output", "empty"], "is a folder. Name the page:"),
        (["torn"], "metrics.jsonl, line 1 is not JSON"),
    ],
)
def test_what_cannot_be_shown_is_one_line_on_stderr(run, tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": \n{"step": 1}\n')
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpok-trl report: error: ") and said in error and error.count("\n") == 1


def test_no_model_library_is_loaded(run):
    code = (
        f"import sys\nfrom dpok_trl import cli\ncli.main(['report', {str(run)!r}])\n"
        "print(sorted({'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
