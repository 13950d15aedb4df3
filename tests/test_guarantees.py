"""The table of promises: every test that it names is there, and every file of tests of trust is named."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", TEXT)


def test_every_test_that_is_named_exists():
    assert len(NAMED) > 40
    for file, name in NAMED:
        tree = ast.parse((TESTS / file).read_text())
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name in tests, f"{file}::{name}"


def test_every_row_names_what_holds_it():
    for row in re.findall(r"^\|(.+)\|$", TEXT, re.MULTILINE):
        promise, holds = row.rsplit("|", 1)
        if promise.strip() not in ("promise", "---"):
            assert re.search(r"`test_\w+\.py|`make ", holds), row


def test_every_file_about_trust_is_named():
    trust = (
        "amp",
        "atomic",
        "beside_torch_fused",
        "checkpoints",
        "contract",
        "contract_state",
        "process",
        "properties",
    )
    assert {f"test_step_{name}.py" for name in trust} | {"test_determinism.py", "test_build.py"} <= {
        f for f, _ in NAMED
    }


def test_commands_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", TEXT + (ROOT / "SECURITY.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
