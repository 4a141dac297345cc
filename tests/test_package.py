"""The package as a whole: its public names, its metadata, its wheel and the direction of its imports."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import dpok_trl


REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src" / "dpok_trl"


# --- public names -----------------------------------------------------------------------------------------------------


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_import_is_light():
    result = run(
        "import sys, dpok_trl; dir(dpok_trl); dpok_trl.__version__;"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'peft', 'datasets', 'trl', 'PIL'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_all_names_are_listed_once_and_have_a_module():
    names = [name for name in dpok_trl.__all__ if name != "__version__"]
    assert sorted(names) == sorted(dpok_trl._MODULE_OF)
    assert len(set(dpok_trl.__all__)) == len(dpok_trl.__all__)
    assert set(dpok_trl.__all__) <= set(dir(dpok_trl))


def test_type_checkers_see_the_same_names():
    block = next(
        node
        for node in ast.parse((SOURCE / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == dpok_trl._MODULE_OF


@pytest.mark.parametrize("name", sorted(dpok_trl._MODULE_OF))
def test_public_name_resolves(name):
    value = getattr(dpok_trl, name)
    assert value.__name__ == name
    assert value.__module__ == dpok_trl._MODULE_OF[name]
    assert vars(dpok_trl)[name] is value  # kept, so the next access is an ordinary one


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match="has no attribute 'DPOKTrainr'. Did you mean 'DPOKTrainer'?"):
        _ = dpok_trl.DPOKTrainr
    with pytest.raises(AttributeError) as error:
        _ = dpok_trl.quite_another_thing
    assert str(error.value) == "module 'dpok_trl' has no attribute 'quite_another_thing'."
    assert not hasattr(dpok_trl, "__wrapped__")


# --- metadata and wheel -----------------------------------------------------------------------------------------------


def test_version_of_the_metadata():
    assert importlib.metadata.version("dpok-trl") == dpok_trl.__version__, "install again: make setup"


def test_wheel_has_everything(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"dpok_trl-{dpok_trl.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        info = f"dpok_trl-{dpok_trl.__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    on_disk = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in packed if not name.startswith(info)} == on_disk
    assert "dpok_trl/py.typed" in packed
    assert f"{info}/licenses/LICENSE" in packed
    assert "dpok-trl = dpok_trl.cli:main" in entry_points


# --- release and repository -------------------------------------------------------------------------------------------

INIT = '__version__ = "{version}"\n_MODULE_OF = {{"A": "dpok_trl.a", "B": "dpok_trl.b"}}\n__all__ = ["A", "B", "__version__"]\n'
API = "::: dpok_trl.a.A\n\n::: dpok_trl.b.B\n"


@pytest.fixture
def release(tmp_path):
    """A folder that could be released as 0.2.0; gives what `check_release` finds in it after a change of one file."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    from check_release import problems

    sys.path.pop(0)
    files = {
        "src/dpok_trl/__init__.py": INIT.format(version="0.2.0"),
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-20\n\n- New.\n",
        "CITATION.cff": "version: 0.2.0\n",
        "docs/api.md": API,
    }

    def found(tag="v0.2.0", **changes):
        for name, text in {**files, **changes}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return problems(tmp_path, tag)

    return found


def test_this_repository_agrees_with_itself():
    result = subprocess.run([sys.executable, REPOSITORY / "tools/check_release.py"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_release_that_agrees(release):
    assert release() == release(tag=None) == []


def test_a_release_that_does_not_agree(release):
    assert release(tag="v0.3.0") == ["the tag is v0.3.0, and __version__ is 0.2.0: one of the two is wrong"]
    undated = "## [Unreleased]\n\n## [0.2.0]\n"
    assert release(**{"CHANGELOG.md": undated}) == [
        "CHANGELOG.md must have `## [0.2.0] - <year-month-day>` right after [Unreleased]"
    ]
    forgotten = "## [Unreleased]\n\n- More.\n\n## [0.2.0] - 2026-11-20\n\n- New.\n"
    assert release(tag=None, **{"CHANGELOG.md": forgotten}) == []
    assert release(**{"CHANGELOG.md": forgotten}) == [
        "what is under [Unreleased] in CHANGELOG.md belongs to 0.2.0, or is not in this release"
    ]
    assert release(**{"CITATION.cff": "version: 0.1.0\n"}) == [
        "CITATION.cff says version 0.1.0, and __version__ is 0.2.0"
    ]
    assert release(**{"docs/api.md": "::: dpok_trl.a.A\n::: dpok_trl.c.B\n::: dpok_trl.c.C\n"}) == [
        "C is in docs/api.md and not in __all__",
        "docs/api.md has B in dpok_trl.c, and it is in dpok_trl.b",
    ]


def test_a_development_version_is_not_released(release):
    source = {"src/dpok_trl/__init__.py": INIT.format(version="0.3.0.dev0"), "CITATION.cff": "version: 0.3.0.dev0\n"}
    assert release(tag=None, **source) == ["0.3.0.dev0 has nothing under [Unreleased] in CHANGELOG.md"]
    assert release(tag="v0.3.0.dev0", **source)[-1] == "0.3.0.dev0 is a development version, which is not released"


WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def test_the_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "release", "tests"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] == path.stem and workflow[True], "`on` is read as True by YAML 1.1"
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step["uses"]
            else:
                program, *words = step["run"].split()
                ours = program == "make" and words[0] in targets
                assert ours or any((REPOSITORY / word).is_file() for word in (program, *words[:1])), step["run"]


def test_the_pythons_that_are_tested_are_those_that_are_promised():
    matrix = yaml.safe_load((REPOSITORY / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["strategy"]
    text = (REPOSITORY / "pyproject.toml").read_text()
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert matrix["matrix"]["python-version"] == promised
    assert re.search(r'requires-python = ">=(.+)"', text)[1] == promised[0]


def test_only_the_job_that_publishes_may_ask_for_a_token_of_pypi():
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/release.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"] == "pypi"
    assert jobs["publish"]["needs"] == "build" and "permissions" not in jobs["build"]
    assert not any("run" in step for step in jobs["publish"]["steps"])


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_an_issue_template(path):
    template = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert template == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "labels", "body"} <= template.keys()
    assert {part["type"] for part in template["body"]} <= {"markdown", "textarea", "input"}
    assert all(part["attributes"].get("label") or part["type"] == "markdown" for part in template["body"])


@pytest.mark.parametrize("script", [".ci/run", ".ci/wheel"])
def test_a_script_of_the_ci(script):
    assert (REPOSITORY / script).stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", REPOSITORY / script]).returncode == 0


def test_what_contributing_names_is_there():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    named = set(
        re.findall(
            r"`((?:src|tests|tools|docs|policy|core|rewards|prompts|training|results|commands|\.ci)/[\w./-]*)`", text
        )
    )
    assert len(named) > 25
    assert [name for name in sorted(named) if not ((REPOSITORY / name).exists() or (SOURCE / name).exists())] == []
    for name in ("_READERS", "SHIPPED", "COMMANDS", "EXAMPLES"):
        assert name in text


def test_the_citation():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    paper = citation["references"][0]
    readme = (REPOSITORY / "README.md").read_text()
    assert paper["title"] in readme and all(author["family-names"] in readme for author in paper["authors"])


# --- layers -----------------------------------------------------------------------------------------------------------

# These modules of the demo are a leaf: they draw and look at pictures, and know nothing of the package.
LEAF = {"demo.world", "demo.scenes", "demo.checker"}
BELOW_RESULTS = {"core", "policy", "rewards", "prompts", "leaf"}

# layer -> the layers of this package it may import
ALLOWED = {
    "leaf": {"leaf"},
    "core": {"core"},
    "policy": {"core", "policy"},
    "rewards": {"core", "rewards", "leaf"},
    "prompts": {"core", "prompts"},
    "results": BELOW_RESULTS | {"results", "version"},
    "training": BELOW_RESULTS | {"results", "training", "version"},
    "demo": BELOW_RESULTS | {"results", "training", "demo", "cli", "version"},
    "cli": BELOW_RESULTS | {"results", "training", "demo", "commands", "cli", "version"},
    "commands": BELOW_RESULTS | {"results", "training", "demo", "cli", "version"},
}

# layer -> the only other libraries it may import; a layer not named here is free
ALLOWED_OUTSIDE = {"core": {"torch"}, "leaf": {"numpy", "PIL", "torch"}}


def layer_of(module):
    """`dpok_trl.policy.recorder` -> `policy`."""
    name = module.removeprefix("dpok_trl.")
    if any(name == leaf or name.startswith(leaf + ".") for leaf in LEAF):
        return "leaf"
    return name.split(".")[0]


def imported_modules(source, module, is_package=False):
    """The absolute names of all modules that `source` imports anywhere, for type checkers too.

    `from dpok_trl import DPOKConfig` counts as an import of the module that defines it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base]) if base else ".".join(package)
            for alias in node.names:
                if base == "dpok_trl":
                    known = {**dpok_trl._MODULE_OF, "__version__": "dpok_trl.version"}
                    yield known.get(alias.name, f"dpok_trl.{alias.name}")
                elif base == "dpok_trl.demo":
                    yield f"{base}.{alias.name}"
                else:
                    yield base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def violations(source, module, is_package=False):
    layer = layer_of(module)
    outside = ALLOWED_OUTSIDE.get(layer)
    for imported in imported_modules(source, module, is_package):
        root = imported.split(".")[0]
        if root == "dpok_trl":
            if layer_of(imported) not in ALLOWED[layer]:
                yield f"{module} ({layer}) imports {imported}"
        elif outside is not None and root not in outside and root not in sys.stdlib_module_names:
            yield f"{module} ({layer}) imports {imported}"


def modules_of_the_package():
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ["dpok_trl", *path.relative_to(SOURCE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        if module != "dpok_trl":  # the table of public names knows every layer, and imports none
            yield path, module, is_package


def test_layers():
    found = [
        violation
        for path, module, is_package in modules_of_the_package()
        for violation in violations(path.read_text(), module, is_package)
    ]
    assert found == []


def test_every_module_has_a_layer():
    assert {layer_of(module) for _, module, _ in modules_of_the_package()} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("module", "line", "imported"),
    [
        ("dpok_trl.policy.policy", "from dpok_trl.rewards.base import score", "dpok_trl.rewards.base"),
        ("dpok_trl.rewards.clip", "from dpok_trl.policy import policy", "dpok_trl.policy"),
        ("dpok_trl.rewards.clip", "from ..policy.policy import Policy", "dpok_trl.policy.policy"),
        ("dpok_trl.rewards.clip", "from .. import policy", "dpok_trl.policy"),
        ("dpok_trl.results.hub", "from dpok_trl import DPOKConfig", "dpok_trl.training.config"),
        ("dpok_trl.results.hub", "import dpok_trl", "dpok_trl"),
        ("dpok_trl.prompts", "from dpok_trl.results import hub", "dpok_trl.results"),
        ("dpok_trl.training.trainer", "def f():\n    from dpok_trl.demo import pretrain", "dpok_trl.demo.pretrain"),
        ("dpok_trl.training.trainer", "from dpok_trl.cli import main", "dpok_trl.cli"),
        ("dpok_trl.core.gaussian", "import diffusers.schedulers", "diffusers.schedulers"),
        ("dpok_trl.core.gaussian", "import numpy as np", "numpy"),
        ("dpok_trl.core.gaussian", "from dpok_trl import __version__", "dpok_trl.version"),
        (
            "dpok_trl.core.gaussian",
            "if TYPE_CHECKING:\n    from dpok_trl.policy.lora import x",
            "dpok_trl.policy.lora",
        ),
        ("dpok_trl.policy.lora", "importlib.import_module('dpok_trl.training.config')", "dpok_trl.training.config"),
        ("dpok_trl.demo.world", "from dpok_trl.core.gaussian import Gaussian", "dpok_trl.core.gaussian"),
        ("dpok_trl.demo.world", "import diffusers", "diffusers"),
    ],
)
def test_the_layer_test_finds(module, line, imported):
    [violation] = violations(line, module)
    assert violation.endswith(f" imports {imported}")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dpok_trl.policy.policy", "import diffusers\nfrom dpok_trl.core.gaussian import Gaussian"),
        ("dpok_trl.policy.policy", "from .lora import add_lora\nfrom . import reentry"),
        ("dpok_trl.results.report", "from dpok_trl import __version__, RewardError, Policy"),
        ("dpok_trl.results.report", "from dpok_trl.demo.world import render\nfrom dpok_trl.demo import checker"),
        ("dpok_trl.core.gaussian", "import math, torch.nn\nfrom torch import Tensor\nfrom . import transitions"),
        ("dpok_trl.cli", "from dpok_trl import DPOKConfig\nfrom dpok_trl.demo.pretrain import main"),
        ("dpok_trl.demo.checker", "from dpok_trl.demo.world import Scene\nimport torch\nfrom PIL import Image"),
    ],
)
def test_the_layer_test_allows(module, line):
    assert list(violations(line, module)) == []
