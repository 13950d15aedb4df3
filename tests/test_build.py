"""The compiled part: what it exports, how it is missed, which runtimes it brings."""

import doctest
import glob
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from step_cases import OTHER_EXTENSION

import regfused
from regfused import extension

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]


def _python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_the_compiled_part_is_in_use():
    info = regfused.build_info()
    assert info["compiled"] is True, "make builds it; without it these tests prove little"
    assert info["built for torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["isa"] in info["isas"]


def test_python_m_regfused():
    run = subprocess.run([sys.executable, "-m", "regfused"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "built for torch" in run.stdout and "isa" in run.stdout


def test_without_the_compiled_part():
    run = _python("""
import sys, warnings
sys.modules["regfused._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import regfused, torch
    p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    for _ in range(2):
        regfused.SGD([p], lr=0.5, momentum=0.9, max_norm=1e9).step()
assert torch.allclose(p, torch.zeros(3)), p
assert str(regfused.build_info()["compiled"]).startswith("no: it cannot be imported")
print(len([w for w in caught if "regfused runs in pure PyTorch" in str(w.message)]))
try:
    regfused.SGD([p], fused=True)
except RuntimeError as error:
    print(error)
""")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "1"
    assert "fused=True demands the compiled part of regfused, but it cannot be imported" in run.stdout


def test_built_for_another_torch():
    run = _python("""
import torch
torch.__version__ = "9.9.9"
import regfused
print(regfused.build_info()["compiled"])
""")
    assert run.returncode == 0, run.stderr
    assert "it was built for torch" in run.stdout and "and this is torch 9.9.9" in run.stdout
    assert "regfused runs in pure PyTorch" in run.stderr


def _copy_of_the_package(folder) -> Path:
    """A copy of regfused whose compiled part can be damaged; the path of that."""
    package = Path(regfused.__file__).parent
    shutil.copytree(package, folder / "regfused", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "regfused" / Path(extension.C.__file__).name


def _import_copy(folder) -> subprocess.CompletedProcess:
    return _python(f"""
import sys
sys.path.insert(0, {str(folder)!r})
import regfused, torch
assert regfused.__file__.startswith({str(folder)!r})
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
regfused.SGD([p], lr=0.5, momentum=0.9).step()
assert torch.equal(p, torch.full((3,), 0.5)), p
print(regfused.build_info()["compiled"])
""")


@pytest.mark.parametrize(
    "kept, message",
    [
        (0, "file too short"),
        (500, "is damaged or cut off: it has 500 bytes of"),
        (0.5, "is damaged or cut off: it has"),
        ("noise", "is damaged or cut off|cannot be imported"),
        ("text", "cannot be imported .*invalid ELF header"),
    ],
    ids=str,
)
def test_a_corrupt_compiled_part(tmp_path, kept, message):
    library = _copy_of_the_package(tmp_path)
    whole = library.read_bytes()
    if kept == "noise":
        library.write_bytes(whole[:64] + bytes(range(256)) * 12 + whole[64 + 256 * 12 :])
    elif kept == "text":
        library.write_bytes(b"version https://git-lfs.example/spec\n" * 20)
    else:
        library.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    run = _import_copy(tmp_path)
    assert run.returncode == 0, (run.returncode, run.stderr)
    assert re.search(message, run.stdout), run.stdout
    assert "regfused runs in pure PyTorch" in run.stderr and "pip install --no-build-isolation" in run.stderr


def test_a_stale_compiled_part(tmp_path):
    # What Python asks for and an older build does not have.
    _copy_of_the_package(tmp_path)
    source = tmp_path / "regfused" / "extension.py"
    source.write_text(source.read_text().replace('"judge",', '"judge", "of_tomorrow",'))
    run = _import_copy(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "it was built from other sources of regfused: it has no StepPlan.of_tomorrow" in run.stdout
    assert "regfused runs in pure PyTorch" in run.stderr and "setup.py build_ext --inplace" in run.stderr


@pytest.mark.skipif(OTHER_EXTENSION is not None, reason="built by the tests")
@pytest.mark.parametrize("change", ("nothing", "a line", "another file", "a name", "no checkout"))
def test_a_compiled_part_of_older_sources(tmp_path, change):
    _copy_of_the_package(tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "setup.py").touch()
    rule = tmp_path / "csrc" / "rule" / "sgd_rule.h"
    # Not compiled: what editors, compilers and people leave there.
    (tmp_path / "csrc" / ".#sgd_rule.h").symlink_to("nowhere")
    (tmp_path / "csrc" / "notes.txt").touch()
    if change == "a line":
        rule.write_text(rule.read_text() + "\n")
    elif change == "another file":
        (tmp_path / "csrc" / "cpu" / "new.cpp").touch()
    elif change == "a name":
        rule.rename(rule.with_name("rule_sgd.h"))
    elif change == "no checkout":
        rule.unlink()
        (tmp_path / "setup.py").unlink()
    run = _import_copy(tmp_path)
    assert run.returncode == 0, run.stderr
    if change in ("nothing", "no checkout"):
        assert run.stdout.strip() == "True" and not run.stderr
    else:
        assert f"it was built from other sources of regfused than those in {tmp_path / 'csrc'}" in run.stdout
        assert "regfused runs in pure PyTorch" in run.stderr and "setup.py build_ext --inplace" in run.stderr


def test_python_asks_for_nothing_that_is_not_checked():
    # The list in extension.py against what the package's files name.
    used = set()
    for path in Path(regfused.__file__).parent.glob("*.py"):
        used |= set(re.findall(r"\bC\.([A-Za-z_]+)", path.read_text()))
    assert used - {"__file__"} <= set(extension._OFFERS[""])
    asking = [Path(regfused.__file__).parent / name for name in ("optimizer.py", "sharded_step.py")]
    plan = {name for path in asking for name in re.findall(r"\bplan\.([a-z_]+)", path.read_text())}
    assert plan | {"numbers", "stepped"} == set(extension._OFFERS["StepPlan"])


def _checkout(folder: Path) -> Path:
    """A copy of what is built."""
    checkout = folder / "checkout"
    for name in ("csrc", "regfused"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    return checkout


def _setup(checkout: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--quiet", *map(str, arguments)]
    environment = {**os.environ, "REGFUSED_CUDA": "0", "REGFUSED_BUILD": "", **env}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


NO_COMPILER = "there is no C++ compiler: nothere: No such file or directory"


def test_without_a_compiler_the_package_is_installed_and_says_why(tmp_path):
    checkout = _checkout(tmp_path)
    done = _setup(checkout, "build", "--build-lib", tmp_path / "installed", CXX="nothere")
    assert done.returncode == 0, done.stderr
    assert f"regfused: without its compiled part, in pure PyTorch: {NO_COMPILER}" in done.stdout
    run = _import_copy(tmp_path / "installed")
    assert run.returncode == 0, run.stderr
    assert f"it was not compiled: {NO_COMPILER}" in run.stdout
    assert "regfused runs in pure PyTorch" in run.stderr and NO_COMPILER in run.stderr
    done = _setup(checkout, "build", CXX="nothere", REGFUSED_BUILD="require")
    assert done.returncode == 1
    assert f"REGFUSED_BUILD=require demands the compiled part of regfused, but {NO_COMPILER}" in done.stderr
    done = _setup(checkout, "build", REGFUSED_BUILD="maybe")
    assert done.returncode == 1
    assert "REGFUSED_BUILD must be empty or require, but is 'maybe'" in done.stderr


def test_with_a_compiler_that_knows_no_cpp20(tmp_path):
    old = tmp_path / "c++"
    old.write_text("#!/bin/sh\necho 'tried.cpp:3:10: fatal error: span: No such file' >&2\nexit 1\n")
    old.chmod(0o755)
    done = _setup(_checkout(tmp_path), "build", CXX=str(old), REGFUSED_BUILD="require")
    assert done.returncode == 1
    assert f"{old} compiles no C++20 for Python here: tried.cpp:3:10: fatal error: span: No such file" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch brings the OpenMP runtime that clang compiles for")
@pytest.mark.parametrize(
    ("macro", "flag"), [("__clang__", "-DREGFUSED_GOMP"), ("__GNUC__", "-fopenmp")], ids=["clang", "gcc"]
)
def test_the_openmp_runtime_that_a_compiler_knows(tmp_path, macro, flag):
    compiler = tmp_path / "c++"
    asked = f'[ "$1" = -dM ] && echo "#define {macro} 1" && exit'
    compiler.write_text(f'#!/bin/sh\n{asked}\necho "error: $*" >&2\nexit 1\n')
    compiler.chmod(0o755)
    done = _setup(_checkout(tmp_path), "build", CXX=str(compiler), REGFUSED_BUILD="require")
    assert done.returncode == 1
    assert f"error: -std=c++20 {flag} -I" in done.stderr


def test_without_ninja(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in {"g++", "c++", "as", "ld", "sh"}:
        if shutil.which(tool):
            (tools / tool).symlink_to(shutil.which(tool))
    done = _setup(_checkout(tmp_path), "build", PATH=str(tools))
    assert done.returncode == 1
    assert "Type: pip install ninja" in done.stderr


def test_without_torch(tmp_path):
    checkout = _checkout(tmp_path)
    (checkout / "torch.py").write_text("raise ImportError('No module named torch')")
    done = _setup(checkout, "build")
    assert done.returncode == 1
    assert "Install torch first, then: pip install --no-build-isolation ." in done.stderr


def test_the_version_stands_in_one_place(tmp_path):
    checkout = _checkout(tmp_path)
    for local, version in (("", regfused.__version__), ("torch2.13.cpu", f"{regfused.__version__}+torch2.13.cpu")):
        done = _setup(checkout, "--version", REGFUSED_LOCAL_VERSION=local)
        assert done.stdout.splitlines()[-1] == version, done.stderr
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[project]")[1].split("[tool.setuptools]")[0]


def test_a_source_distribution_holds_all_sources(tmp_path):
    # No compiler is needed for it.
    done = _setup(_checkout(tmp_path), "sdist", "--dist-dir", tmp_path / "dist", CXX="nothere")
    assert done.returncode == 0, done.stderr
    (distribution,) = (tmp_path / "dist").iterdir()
    with tarfile.open(distribution) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = [path for folder in ("csrc", "regfused") for path in (ROOT / folder).rglob("*") if path.suffix != ".so"]
    needed = {str(path.relative_to(ROOT)) for path in needed if path.is_file() and path.parent.name != "__pycache__"}
    assert len(needed) > 100
    assert needed <= held, needed - held


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
@pytest.mark.parametrize("name, warns", [("libiomp5.so", True), ("libgomp-a1b2.so.1", False)])
def test_two_openmp_runtimes_are_noticed(tmp_path, name, warns):
    other = tmp_path / name
    source = tmp_path / "runtime.cpp"
    source.write_text("int nothing;")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", other, source], check=True)
    run = _python(f"""
import ctypes
ctypes.CDLL({str(other)!r})
import regfused
print(regfused.build_info())
""")
    assert run.returncode == 0, run.stderr
    row = next(line for line in run.stdout.splitlines() if line.startswith("openmp"))
    assert str(other) in row and row.count(".so") >= 2
    assert ("OpenMP runtimes of GNU and LLVM are in one process" in run.stderr) == warns
    assert ("which may hang or crash" in row) == warns


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_one_openmp_runtime():
    run = _python("""
import torch, regfused
p = torch.nn.Parameter(torch.ones(300_000)); p.grad = torch.ones_like(p)
regfused.SGD([p], lr=0.5).step()
print(sorted({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].rpartition("/")[2]}))
""")
    assert run.returncode == 0, run.stderr
    runtimes = [path for path in eval(run.stdout) if "lib" in path]
    assert len(runtimes) == 1, runtimes


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("isa", ("plain", "avx2", "avx512"))
def test_kernels_leave_no_code_for_the_linker_to_share(isa):
    # A weak symbol of an AVX-512 object may become the copy that every other file calls.
    objects = glob.glob(str(ROOT / "build" / "*" / "csrc" / "cpu" / f"isa_{isa}.o"))
    if not objects:
        pytest.skip("no object files: not a build from this checkout")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        shared = [line for line in symbols if line.split()[-2 if line.startswith(" ") else 1 :][0] in "VWu"]
        assert not [s for s in shared if f"regfused::{isa}::" not in s], shared


@pytest.mark.parametrize(
    "module", ("regfused.sgd", "regfused.adam", "regfused.penalties", "regfused.sparsity", "regfused.stats")
)
def test_examples_in_docstrings(module):
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, extraglobs={"regfused": regfused, "torch": torch})
    assert result.attempted > 0 and result.failed == 0


def test_extension_is_checked_once():
    assert extension.why_missing == ""
