"""Do version, changelog, public names and documentation agree? Prints what does not, and exits with 1.

    python tools/check_release.py                 # at any time
    python tools/check_release.py --tag v0.1.0    # before that tag is released

A development version (`.dev`) has its changes under "Unreleased"; a released one has a section with its number and date on top, and nothing under "Unreleased".
Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path


REPOSITORY = Path(__file__).parent.parent


def public_names(source: str) -> tuple[str, list[str], dict[str, str]]:
    """Version, `__all__` and the table of modules, as they are written in `__init__.py`."""
    values = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("__version__", "__all__", "_MODULE_OF")
    }
    return values["__version__"], values["__all__"], values["_MODULE_OF"]


def sections(changelog: str) -> dict[str, str]:
    """Heading of each section -> its text."""
    return dict(re.findall(r"^## (\[.+?\].*?)\n(.*?)(?=^## |\Z)", changelog, re.S | re.M))


def problems(folder: Path, tag: str | None = None) -> list[str]:
    version, listed, module_of = public_names((folder / "src/dpok_trl/__init__.py").read_text(encoding="utf-8"))
    found = []
    if tag is not None and tag != f"v{version}":
        found.append(f"the tag is {tag}, and __version__ is {version}: one of the two is wrong")
    if not re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+|\.dev\d+)?", version):
        found.append(f"__version__ = {version!r} is no version such as 0.1.0, 0.1.0rc1 or 0.1.0.dev0")
    found += changelog_problems((folder / "CHANGELOG.md").read_text(encoding="utf-8"), version, tag is not None)
    cited = re.search(r"^version: (.+)$", (folder / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    if cited is None or cited[1] != version:
        found.append(f"CITATION.cff says version {cited and cited[1]}, and __version__ is {version}")
    names = {name for name in listed if name != "__version__"}
    shown = dict(
        (name, module)
        for module, name in re.findall(
            r"^::: (dpok_trl[\w.]+)\.(\w+)$", (folder / "docs/api.md").read_text(encoding="utf-8"), re.M
        )
    )
    for what, others in (("_MODULE_OF", set(module_of)), ("docs/api.md", set(shown))):
        found += [f"{name} is in __all__ and not in {what}" for name in sorted(names - others)]
        found += [f"{name} is in {what} and not in __all__" for name in sorted(others - names)]
    found += [
        f"docs/api.md has {name} in {shown[name]}, and it is in {module_of[name]}"
        for name in sorted(shown.keys() & module_of.keys())
        if shown[name] != module_of[name]
    ]
    return found


def changelog_problems(changelog: str, version: str, released: bool) -> list[str]:
    parts = sections(changelog)
    headings = list(parts)
    if not headings or headings[0] != "[Unreleased]":
        return ["CHANGELOG.md must begin with a section [Unreleased]"]
    if ".dev" in version:
        found = [] if parts["[Unreleased]"].strip() else [f"{version} has nothing under [Unreleased] in CHANGELOG.md"]
        return found + ([f"{version} is a development version, which is not released"] if released else [])
    if len(headings) < 2 or not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", headings[1]):
        return [f"CHANGELOG.md must have `## [{version}] - <year-month-day>` right after [Unreleased]"]
    if released and parts["[Unreleased]"].strip():
        return [f"what is under [Unreleased] in CHANGELOG.md belongs to {version}, or is not in this release"]
    return []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Do version, changelog, public names and documentation agree?")
    parser.add_argument("--tag", help="of the release, such as v0.1.0")
    found = problems(REPOSITORY, parser.parse_args(argv).tag)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
