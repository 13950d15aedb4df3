"""The rows of the matrix hold what is promised: each Python, the oldest torch, with and without CUDA kernels."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nox", reason="make matrix needs it")

import noxfile

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def the_only(pattern: str, text: str) -> str:
    [found] = re.findall(pattern, text)
    return found


def test_every_python_that_is_promised_is_tested():
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert the_only(r'requires-python = ">=([\d.]+)"', PYPROJECT) == promised[0]
    tested = {row.python for row in noxfile.ROWS} | {noxfile.USUAL_PYTHON}
    assert sorted(tested, key=lambda v: int(v[2:])) == promised


def test_the_oldest_torch_has_a_row_for_every_kind_of_build():
    oldest = the_only(r'"torch>=([\d.]+)"', PYPROJECT)
    assert noxfile.OLDEST in (oldest, f"{oldest}.0")
    usual = the_only(r"TORCH *\?= torch==([\d.]+)", (ROOT / "Makefile").read_text())
    assert usual == noxfile.USUAL
    releases = [tuple(map(int, version.split("."))) for version in (noxfile.OLDEST, usual, noxfile.NEWEST)]
    assert releases == sorted(releases)
    built = {(row.torch, row.build_env["REGFUSED_CUDA"]) for row in noxfile.ROWS if not row.compiler}
    assert built == {(noxfile.OLDEST, "0"), (noxfile.OLDEST, "1"), (noxfile.NEWEST, "1")}
    # make gpu-check is rehearsed with the torch of the GPU machine.
    assert {row.torch for row in noxfile.ROWS if row.rehearsal} == {noxfile.OLDEST}


def test_what_rows_run_is_there():
    assert [row.name for row in noxfile.ROWS if row.rehearsal]
    assert len({row.name for row in noxfile.ROWS}) == len(noxfile.ROWS)
    for row in noxfile.ROWS:
        files = [argument for argument in row.tests if argument.startswith("tests")]
        assert files and all((ROOT / file).exists() for file in files)
    assert set(noxfile.ABSENT_THERE) < set((ROOT / "requirements-dev.txt").read_text().split())
