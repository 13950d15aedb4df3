"""The demo: it runs on digits and on a CSV, its two loops agree, and a malformed CSV is named by line and column."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regfused

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

for module in ("sklearn", "matplotlib", "rich", "typer"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("demo")
    torch.set_num_threads(threads)
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def csv_table(demo):
    return importlib.import_module("csv_table")


def run_demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    # The regfused of this process, whether it is installed or in the checkout.
    paths = [str(Path(regfused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "80",
    }
    command = [sys.executable, str(EXAMPLES / "demo.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def write_regression(path: Path, *, header: bool, rows: int = 80) -> Path:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator)
    y = 40 + 5 * x[:, 0] - 2 * x[:, 1] + 0.1 * torch.randn(rows, generator=generator)
    lines = [",".join(f"{value:.6f}" for value in row) for row in torch.cat([x, y[:, None]], dim=1).tolist()]
    path.write_text("\n".join(["a,b,c,price"] * header + lines) + "\n")
    return path


@pytest.mark.parametrize("source", ["digits", "csv"])
def test_runs(source, tmp_path):
    out = tmp_path / "new folder" / "figure.png"
    data = [] if source == "digits" else ["--data", write_regression(tmp_path / "prices.csv", header=True)]
    done = run_demo("--quick", "--out", out, *data)
    assert done.returncode == 0, done.stderr
    for text in (
        "no penalty",
        "L1",
        "L2",
        "elastic net",
        "proximal L1",
        "group lasso",
        "dropout",
        "accuracy" if not data else "price",
    ):
        assert text in done.stdout
    assert "…" not in done.stdout, "a cell of the table is cut off at 80 columns"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 20_000


@pytest.fixture(scope="module")
def task(request, demo, tmp_path_factory):
    if request.param == "digits":
        return demo.digits_task(seed=0)
    return demo.csv_task(write_regression(tmp_path_factory.mktemp("csv") / "prices.csv", header=False), seed=0)


@pytest.mark.parametrize("task", ["digits", "csv"], indirect=True)
@pytest.mark.parametrize("index", range(9))
def test_loop_and_regfused_agree(demo, task, index, monkeypatch):
    recipe = demo.Recipe(epochs=3)
    setting = demo.all_settings(1e-3, 1e-3, 0.2)[index]
    # Whose masks are those of regfused.Dropout.
    monkeypatch.setitem(importlib.import_module("training").DROPOUT, "loop", regfused.reference.Dropout)
    # float64: what remains is rounding of 1e-16 a step, and a wrong formula shows. float32: the same times 1e9, and
    # with L1 in the loss a weight at zero whose sign rounding decides is off by up to 2*lr*l1/(1 - momentum) = 1e-3.
    # What moves Adam there is a sign too: by up to 2*lr = 6e-3 a step, and back at the next.
    in_float64 = demo.train_both(task, setting, recipe, torch.float64)
    assert in_float64.largest_difference < 1e-11
    in_float32 = demo.train_both(task, setting, recipe, torch.float32)
    assert in_float32.largest_difference < (4 * recipe.adam_lr if setting.adam and setting.l1 else 1e-3)
    assert abs(in_float32.score["loop"] - in_float32.score["regfused"]) < 1
    assert {len(times) for times in in_float32.step_us.values()} == {3 * -(-len(task.train) // recipe.batch_size)}


@pytest.mark.parametrize("task", ["digits"], indirect=True)
def test_only_proximal_steps_make_zeros(demo, task):
    recipe = demo.Recipe(epochs=8)
    zeros = {
        setting.name: demo.train_both(task, setting, recipe, torch.float32).zeros("regfused")
        for setting in demo.all_settings(1e-3, 1e-3, 0.2)
        if setting.l1 or setting.group_l1
    }
    assert zeros["proximal L1"] > 20
    assert zeros["group lasso"] > 1
    assert zeros["L1"] < 1
    assert zeros["elastic net"] < 1


@pytest.mark.parametrize("task", ["csv"], indirect=True)
def test_path_is_that_of_the_lasso(demo, task):
    """Coordinate descent of scikit-learn, whose objective is half of ours, is the witness."""
    from sklearn.linear_model import Lasso

    x, y = (values.double().numpy() for values in task.train.tensors)
    path = list(demo.regularization_path(task, 5, 300, demo.Recipe()))
    for l1, weights in path:
        expected = torch.tensor(Lasso(alpha=l1 / 2, tol=1e-10).fit(x, y[:, 0]).coef_)
        torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-5)
    assert (path[0][1][:2] != 0).all(), "the two features that make the target"
    assert (path[-1][1] == 0).all()


ROWS = b"1,2,3\n" * 9 + b"4,5,6\n"
NAMED = b"a,b,y\n"

# name: (content, None for no file; what the message says)
MALFORMED = {
    "missing file": (None, "cannot be read: No such file"),
    "empty file": (b"", "the file is empty"),
    "blank lines": (b"\n\n  \n", "the file is empty"),
    "header only": (NAMED, "line 1: the file ends after 0 rows of numbers; needs 10 or more"),
    "too few rows": (NAMED + b"1,2,3\n" * 9, "line 10: the file ends after 9 rows of numbers; needs 10 or more"),
    "one column": (b"y\n" + b"1\n2\n" * 9, "line 1: 1 column; needs 2 or more separated by commas"),
    "semicolons": (b"a;y\n" + b"1;2\n" * 20, "line 1: 1 column; needs 2 or more separated by commas"),
    "short row": (NAMED + b"1,2,3\n1,2\n" + ROWS, "line 3, column 3 ('y'): is missing; columns in this line: 2"),
    "long row": (NAMED + b"1,2,3,4\n" + ROWS, "line 2, column 4: is one too many; columns in this line: 4"),
    "word": (NAMED + ROWS + b"1,two,3\n", "line 12, column 2 ('b'): 'two' is not a number"),
    "word without header": (ROWS + b"1,2,three\n", "line 11, column 3: 'three' is not a number"),
    "word after blank lines": (NAMED + b"\n\n" + ROWS + b"x,2,3\n", "line 14, column 1 ('a'): 'x' is not a number"),
    "empty cell": (NAMED + ROWS + b"1,,3\n", "line 12, column 2 ('b'): the cell is empty"),
    "row of empty cells": (NAMED + ROWS + b",,\n", "line 12, column 1 ('a'): the cell is empty"),
    "empty cell without header": (b"1,,3\n" + ROWS, "line 1, column 2: the cell is empty"),
    "nan": (NAMED + ROWS + b"1,nan,3\n", "line 12, column 2 ('b'): nan is not a finite number"),
    "nan in the first row": (b"nan,2,3\n" + ROWS, "line 1, column 1: nan is not a finite number"),
    "inf": (ROWS + b"1,2,-inf\n", "line 11, column 3: -inf is not a finite number"),
    "too large": (ROWS + b"1,1e39,2\n", "line 11, column 2: 1e39 is not a finite number in float32"),
    "constant target": (NAMED + b"1,2,7\n2,3,7\n" * 9, "line 2, column 3 ('y'): the target is 7 here"),
    "bytes": (NAMED + ROWS + b"1,\xff2,3\n", "line 12, column 2 ('b'): holds bytes that are not UTF-8: b'\\xff2'"),
    "bytes in the header": (b"a,\xe9t\xe9,y\n" + ROWS, "line 1, column 2: holds bytes that are not UTF-8"),
    "open quote": (NAMED + ROWS + b'1,"2,3\n', "line 12: unexpected end of data"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_csv_is_named(csv_table, name, tmp_path):
    content, says = MALFORMED[name]
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(csv_table.MalformedTable) as error:
        csv_table.read_csv(path)
    separator = ", " if says.startswith("line") else ": "
    assert str(error.value).startswith(f"{path}{separator}{says}")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_csv_exits_with_2(demo, name, tmp_path):
    from typer.testing import CliRunner

    path = tmp_path / "table.csv"
    content, says = MALFORMED[name]
    if content is not None:
        path.write_bytes(content)
    app = demo.typer.Typer()
    app.command()(demo.main)
    done = CliRunner().invoke(app, ["--data", str(path), "--out", str(tmp_path / "out.png")])
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out.png").exists()


def test_malformed_csv_in_a_process(tmp_path):
    """Once as a user meets it, with a folder in place of a file."""
    done = run_demo("--data", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}: cannot be read: Is a directory\n"
    assert done.stdout == ""


def test_reads_header_quotes_and_byte_order_mark(csv_table, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbf"a, b",y\r\n' + b'"1", 2.5\r\n\r\n3,4\r\n' * 5)
    table = csv_table.read_csv(path)
    assert table.names == ["a, b", "y"]
    assert table.features.tolist() == [[1], [3]] * 5
    assert table.target.tolist() == [2.5, 4] * 5
    assert table.features.dtype == table.target.dtype == torch.float32


def test_divergence_is_said(tmp_path):
    done = run_demo("--quick", "--lr", 1e30, "--out", tmp_path / "out.png")
    assert done.returncode == 1
    assert "diverged" in done.stdout
    assert "Traceback" not in done.stderr
