"""The launch configurations and the Slurm script in examples/: what Accelerate makes of them."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from dpok_trl.training import setup


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"
SCRIPT = EXAMPLES / "slurm" / "multi_node.sbatch"


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", DistributedType.NO, 1, 1),
        ("ddp", DistributedType.MULTI_GPU, 1, 8),
        ("multi_node_ddp", DistributedType.MULTI_GPU, 2, 16),
    ],
)
def test_accelerate_reads_the_configurations(name, kind, machines, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses keys that it does not know
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.mixed_precision == "no" and config.use_cpu is False


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_what_gives_a_process_a_part_of_the_weights_is_refused(kind, make_config, monkeypatch):
    monkeypatch.setattr(setup.Accelerator, "distributed_type", kind)
    with pytest.raises(ValueError, match=f"distributed_type = {kind.value} is not supported"):
        setup.make_accelerator(make_config())


def test_there_is_no_other_configuration():
    assert {path.stem for path in CONFIGS.iterdir()} == {"one_gpu", "ddp", "multi_node_ddp"}


@pytest.fixture
def cluster(tmp_path):
    """A Slurm of two machines, each of which prints what it would launch."""

    def program(name, text):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    program("scontrol", 'echo "first"; echo "second"')
    program("srun", 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done')
    program("accelerate", 'printf "%s\\n" "--- $SLURM_NODEID $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"')
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "12345", "SLURM_GPUS_ON_NODE": "8"}

    def submit(*arguments) -> list[list[str]]:
        environment = {**os.environ, **slurm, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [part.splitlines() for part in done.stdout.split("--- ")[1:]]

    return submit


def test_the_slurm_script_starts_one_launcher_on_each_machine(cluster, tmp_path):
    run = tmp_path / "a run"
    machines = cluster("recipe.yaml", str(run))
    assert [first[0] for first in machines] == ["0 1700", "1 1700"]
    for rank, (_, command, *arguments) in enumerate(machines):
        assert command == "launch"
        args = launch_command_parser().parse_args(arguments)
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, rank)
        assert (args.main_process_ip, args.main_process_port) == ("first", 29500 + 345)
        assert args.config_file == "examples/accelerate_configs/multi_node_ddp.yaml"
        assert args.training_script == "examples/train.py"
        assert args.training_script_args == ["--config", "recipe.yaml", "--output_dir", str(run)]


def test_the_slurm_script_goes_on_with_a_run(cluster, tmp_path):
    (tmp_path / "checkpoint-20").mkdir()
    for machine in cluster("recipe.yaml", str(tmp_path)):
        assert machine[-2:] == ["--resume_from", str(tmp_path)]


def test_the_slurm_script_sets_aside_a_run_that_left_no_checkpoint(cluster, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    for machine in cluster("recipe.yaml", str(run)):
        assert "--resume_from" not in machine
    assert not run.exists() and (tmp_path / "run-without-checkpoint-12345" / "metrics.jsonl").exists()


def test_the_slurm_script_has_its_options_before_its_first_command():
    """sbatch reads no further."""
    lines = SCRIPT.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:first] if line.startswith("#SBATCH")]
    (notice,) = [int(line.split("TERM@")[1]) for line in options if "TERM@" in line]
    (wait,) = [int(line.split("=")[1]) for line in lines if "SHUTDOWN_TIMEOUT=" in line]
    assert wait < notice  # the launcher gives up before Slurm does


def test_the_slurm_script_says_what_it_needs(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode != 0 and "give a recipe" in done.stderr
