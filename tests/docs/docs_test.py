"""Tests of what `make docs` builds, without building it: every page, every module."""

import ast
import pathlib
import re

import aps_jax

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text()


def modules():
    """The package's modules by their full names, and their files."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "aps_jax").rglob("*.py")
        if path.stem != "__init__"
    }


def test_each_module_is_in_the_reference_once():
    listed = re.findall(r"^\.\. automodule:: (\S+)$", API, flags=re.MULTILINE)
    assert sorted(listed) == sorted(modules())


def test_modules_of_a_room_stand_together():
    """A block of the reference lists modules of one package."""
    blocks = re.findall(r"```\{eval-rst\}\n(.*?)```", API, flags=re.DOTALL)
    for block in blocks:
        rooms = {name.rpartition(".")[0] for name in re.findall(r":: (\S+)", block)}
        assert len(rooms) == 1, rooms


def test_each_public_name_has_a_docstring_for_it():
    for name in aps_jax.__all__:
        assert getattr(aps_jax, name).__doc__, name
    for module, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            is_shown = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_shown and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}: {node.name}"


def test_each_page_is_in_the_table_of_contents():
    (block,) = re.findall(
        r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.DOTALL
    )
    pages = [line for line in block.splitlines() if line and line[0] != ":"]
    assert sorted([*pages, "index"]) == sorted(path.stem for path in DOCS.glob("*.md"))


def test_links_between_pages_lead_somewhere():
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_make_docs_lets_no_warning_pass():
    (line,) = re.findall(r"-m sphinx .*", (ROOT / "Makefile").read_text())
    assert " -W " in line and "docs docs/_build/html" in line


def test_pages_stay_within_their_budgets_of_lines():
    lines = {path.name: path.read_text().count("\n") for path in DOCS.glob("*.*")}
    assert sum(lines.values()) <= 1600
    assert lines["agents.md"] <= 120
