"""The versions of Python and torch that are built and tested beside those of `make test`: one row, one nox session.

`make matrix` runs all rows, `make matrix ROWS="oldest newest"` some, `nox --list` shows them. A row builds in a
copy of the checkout inside of its environment, in .nox/; both are removed when it passed, unless KEEP=1 is given.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).parent

OLDEST, USUAL, NEWEST = "2.11.0", "2.13.0", "2.14.1"  # releases of torch; on the registry, all are CUDA builds
NONE = ""
USUAL_PYTHON = "3.11"  # of `make test` where .ci/run runs
# What touches torch and Python most: the arithmetic is that of `make test`, and the whole suite would take too long.
SHORT_RUN = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("noxfile", "step_state", "step_ops", "step_tensors", "step_watched", "step_hooks", "step_stats", "convert"),
        *(
            "penalty",
            "penalty_traced",
            "clip_grad_norm",
            "max_norm",
            "dropout",
            "dropout_traced",
            "step_differentiable",
        ),
    )
)
CONTRACT = ("tests/test_step_contract.py",)  # torch's own tests of optimizers, of its newest release
SHORTEST_RUN = tuple(f"tests/test_{name}.py" for name in ("noxfile", "step_parity", "step_ops", "penalty", "dropout"))
# What make gpu-check has to do without, on a machine that has a GPU and no network.
ABSENT_THERE = ("expecttest", "nox")


@dataclass(frozen=True)
class Row:
    """An environment, how regfused is built in it, and what runs."""

    name: str
    python: str
    torch: str
    architectures: str  # of the CUDA kernels
    tests: tuple[str, ...]
    rehearsal: bool = False  # of make gpu-check, before the tests
    compiler: str = ""  # of C++, beside the usual one

    @property
    def build_env(self) -> dict[str, str]:
        """A warning is an error here: g++ reads headers of another torch in each row."""
        cuda = {"REGFUSED_CUDA": "1", "TORCH_CUDA_ARCH_LIST": self.architectures}
        compiler = {"CXX": self.compiler} if self.compiler else {}
        return {"CFLAGS": "-Werror", **compiler, **(cuda if self.architectures else {"REGFUSED_CUDA": "0"})}

    def __str__(self) -> str:
        kernels = f"CUDA kernels for {self.architectures}" if self.architectures else "no CUDA kernels"
        rehearsal = "a rehearsal of make gpu-check without network, " if self.rehearsal else ""
        compiler = f", {self.compiler}" if self.compiler else ""
        return f"Python {self.python}, torch {self.torch}, {kernels}{compiler}: {rehearsal}a short run"


ROWS = (
    # The versions of a machine on which make gpu-check is known to run.
    Row("oldest", "3.12", OLDEST, "9.0", SHORT_RUN, rehearsal=True),
    Row("newest", "3.13", NEWEST, "12.0+PTX", SHORT_RUN + CONTRACT),
    Row("oldest-cpu", "3.10", OLDEST, NONE, SHORTEST_RUN),
    Row("clang", USUAL_PYTHON, USUAL, NONE, SHORTEST_RUN, compiler="clang++"),
)

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

# Versions of Python that pyenv has and no shim of it chooses.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, sorted(PYENV.glob("*/bin")))])


def copy_checkout(session: nox.Session) -> Path:
    """A copy of what git knows or would add, as it is now."""
    folder = Path(session.virtualenv.location, "checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).strip("\0").split("\0"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def without_network(session: nox.Session) -> list[str]:
    """How a command begins that shall not reach the network."""
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    session.warn("the network stays: unshare --net is not possible here")
    return []


def rehearse_gpu_check(session: nox.Session, row: Row) -> None:
    """make gpu-check, with what a machine without network has: on the CPU, and up to where it needs a GPU."""
    packages = Path("requirements-dev.txt").read_text().splitlines()[1:]
    session.install(f"torch=={row.torch}", *(p for p in packages if p not in ABSENT_THERE), silent=False)
    offline = without_network(session)
    make = [*offline, "make", "gpu-check", f"GPU_PYTHON={session.bin}/python"]
    session.run(*make, "REHEARSE=1", "GPU_SECONDS=3600", env=row.build_env, external=True)
    # The rehearsal ran few of the tests. All must at least be found without the packages that are absent.
    session.run(*offline, "python", "-m", "pytest", "--collect-only", "-qq", external=True)
    said = session.run(*make, env={"CUDA_VISIBLE_DEVICES": ""}, external=True, silent=True, success_codes=[2])
    session.log(said)
    if "make gpu-check needs a GPU" not in said:
        session.error("without a GPU, make gpu-check must end with the word that it needs one")


def run_row(session: nox.Session, row: Row) -> None:
    session.log(f"{row.name}: {row}")
    if row.compiler and not shutil.which(row.compiler):
        session.skip(f"{row.compiler} is not installed")
    session.chdir(copy_checkout(session))
    if row.rehearsal:
        rehearse_gpu_check(session, row)
    environment = session.virtualenv.location
    session.run("make", "build", f"VENV={environment}", f"TORCH=torch=={row.torch}", env=row.build_env, external=True)
    session.run("python", "-m", "regfused")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *row.tests)
    if "keep" not in session.posargs:
        session.chdir(ROOT)
        shutil.rmtree(environment)


def add(row: Row) -> None:
    def session_of_row(session: nox.Session) -> None:
        run_row(session, row)

    session_of_row.__doc__ = str(row)  # nox --list shows it
    nox.session(session_of_row, name=row.name, python=row.python)


for row in ROWS:
    add(row)
