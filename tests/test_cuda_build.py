"""The CUDA kernels as nvcc compiles them: registers, width of access; that each call of the runtime is checked."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
RULES = ROOT / "csrc" / "rule"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# A file takes about a minute for each. REGFUSED_TEST_ARCHITECTURES=all has all of them, before a release.
CHECKED = ARCHITECTURES if os.environ.get("REGFUSED_TEST_ARCHITECTURES") == "all" else (80, 90)
# As setup.py has them; warnings are errors here.
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Werror=all-warnings"]

# Registers of a thread, at most, by file and kernel. 64 let a multiprocessor run 1024 threads, which its memory needs;
# float64 is allowed half of them.
ROOMS = (4096, 32764)
FOREACH = [f"foreach_kernel<{room}, (ForeachPass){p}>" for room in ROOMS for p in range(4)]
REGISTERS = {
    "foreach_launch.cu": dict.fromkeys(FOREACH, 64),
    "dropout_launch.cu": {
        **{f"dropout_kernel<{storage}>": 64 for storage in ("float", "__nv_bfloat16", "__half")},
        "dropout_kernel<double>": 64,
    },
    "step_launch.cu": {
        **{f"step_norm_kernel<{room}, false>": 64 for room in ROOMS},
        **{f"step_kernel<{room}, Sgd, false>": 64 for room in ROOMS},
        # With four arrays and more, 768 threads have as many accesses in flight.
        **{f"step_kernel<{room}, Adam, false>": 80 for room in ROOMS},
        **{f"step_norm_kernel<{room}, true>": 128 for room in ROOMS},
        **{f"step_kernel<{room}, {rule}, true>": 128 for room in ROOMS for rule in ("Sgd", "Adam")},
        **{f"upload_kernel<{room}>": 64 for room in ROOMS},
    },
    "slice_launch.cu": {
        **{f"slice_{does}_kernel<{room}, false>": 64 for room in ROOMS for does in ("measure", "scale")},
        # In the metric of a step.
        **{
            f"slice_{does}_kernel<{room}, {doubles}>": 128
            for room in ROOMS
            for does in ("sum", "shrink")
            for doubles in ("false", "true")
        },
        **{f"slice_{does}_kernel<{room}, true>": 128 for room in ROOMS for does in ("measure", "scale")},
        **{f"slice_factor_kernel<{room}>": 64 for room in ROOMS},
    },
}

# Loads and stores of 16 bytes in a kernel, at least. The step: each pass over an array, for float32, bfloat16 and
# float16, with and without the parameter (norm: twice, as sums may be taken once more in double) or momentum buffer.
# A sum over a list of tensors: float64 once, the others twice; a pass that writes: all four.
WIDE = {
    "foreach_launch.cu": {
        **{f"foreach_kernel<{room}, (ForeachPass){p}>": (1 + 3 * 2, 0) for room in ROOMS for p in (0, 1)},
        **{f"foreach_kernel<{room}, (ForeachPass){p}>": (4, 4) for room in ROOMS for p in (2, 3)},
    },
    # An access in each of the four runs of a row.
    "dropout_launch.cu": {
        f"dropout_kernel<{storage}>": (4, 4) for storage in ("float", "double", "__nv_bfloat16", "__half")
    },
    "step_launch.cu": {
        **{f"step_norm_kernel<{room}, false>": (3 * (1 + 2) * 2, 0) for room in ROOMS},
        **{f"step_kernel<{room}, Sgd, false>": (3 * (2 + 3), 3 * (1 + 2)) for room in ROOMS},
        **{f"step_kernel<{room}, Adam, false>": (3 * (4 + 5), 3 * (3 + 4)) for room in ROOMS},
    },
    # Segments and tiles, of float32, bfloat16 and float16; sums may be taken once more in double.
    "slice_launch.cu": {
        **{f"slice_measure_kernel<{room}, false>": (3 * 2 * 2, 0) for room in ROOMS},
        **{f"slice_scale_kernel<{room}, false>": (3 * 2, 3 * 2) for room in ROOMS},
        # Of the parameter and of the second moment.
        **{f"slice_sum_kernel<{room}, false>": (3 * 2 * (2 + 1), 0) for room in ROOMS},
        **{f"slice_shrink_kernel<{room}, false>": (3 * 2 * 2, 3 * 2) for room in ROOMS},
    },
}

# Bytes that a thread may spill. A step: the sum of penalties of a span and a few addresses, once for a chunk of 16384
# elements. In the machine code of sm_75 and sm_80 nothing is spilled inside of a loop over elements. Newer
# architectures need more for addresses.
SPILLS = {
    (f"step_kernel<{room}, {rule}, {doubles}>", architecture): {75: 112, 100: 96, 120: 96}.get(architecture, 48)
    for room in ROOMS
    for rule in ("Sgd", "Adam")
    for doubles in ("false", "true")
    for architecture in ARCHITECTURES
}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def nvcc(*arguments: object) -> str:
    run = subprocess.run([str(a) for a in (NVCC, *arguments)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    """`void regfused::(anonymous namespace)::step_norm_kernel<4096ul, true>(...)` -> `step_norm_kernel<4096, true>`"""
    found = re.search(r"\w+_kernel\b(<.*?>)?(?=\(|$)", name)
    assert found, name
    return re.sub(r"(\d)ul", r"\1", found[0]).replace("regfused::", "").replace("portable::", "")


def test_every_file_of_kernels_is_listed():
    assert REGISTERS.keys() == {path.name for path in CUDA.glob("*.cu")}


@needs_nvcc
@pytest.mark.parametrize("architecture", CHECKED)
def test_kernels(architecture, tmp_path):
    """One test for an architecture, because compiling takes most of the time."""
    if f"compute_{architecture}\n" not in nvcc("--list-gpu-arch"):
        pytest.skip("this nvcc does not know it")
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    objects = []
    for file in REGISTERS:
        objects.append(tmp_path / f"{file}.o")
        kept = ("--keep", "--keep-dir", tmp_path)
        # The report is of ptxas; the other steps of nvcc leave what they made.
        flags = (*FLAGS, "-Xcompiler=-fPIC", "-Xptxas", "-v", "-gencode", code, *kept)
        check_registers_and_spills(nvcc(*flags, "-c", CUDA / file, "-o", objects[-1]), file, architecture)
        check_wide_accesses((tmp_path / file).with_suffix(".ptx").read_text(), file)
    # Without torch.
    library = tmp_path / "kernels.so"
    nvcc("-shared", *objects, "-o", library)
    room = ctypes.CDLL(str(library))["_ZN8regfused20step_room_for_inputsEv"]
    room.restype = ctypes.c_size_t
    assert 3000 < room() < 32764


def check_registers_and_spills(report: str, file: str, architecture: int) -> None:
    seen = {}
    for kernel in demangled(report).split("Compiling entry function ")[1:]:
        # Of the kernel, and of what it calls.
        spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", kernel)
        registers = re.search(r"Used (\d+) registers", kernel)
        assert spilled and registers, kernel
        name = short(kernel.split("'")[1])
        most = max(int(number) for numbers in spilled for number in numbers)
        assert most <= SPILLS.get((name, architecture), 0), (name, spilled)
        seen[name] = int(registers[1])
    assert seen.keys() == REGISTERS[file].keys()
    assert {name: n for name, n in seen.items() if n > REGISTERS[file][name]} == {}


def check_wide_accesses(ptx: str, file: str) -> None:
    """Loads and stores of 16 bytes."""
    kernels = ptx.split(".entry ")[1:]
    assert len(kernels) == len(REGISTERS[file])
    counts = {}
    for kernel in kernels:
        loads = re.findall(r"\bld\.global(?:\.nc)?\.(?:v4\.[busf]32|v2\.[busf]64)", kernel)
        stores = re.findall(r"\bst\.global\.(?:v4\.[busf]32|v2\.[busf]64)", kernel)
        counts[short(demangled(kernel.split("(", 1)[0]))] = len(loads), len(stores)
    for name, (loads, stores) in WIDE[file].items():
        assert counts[name][0] >= loads and counts[name][1] >= stores, (name, counts[name])


def test_kernel_files_have_no_torch_header():
    free = [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*_job.h"), *CUDA.glob("*_launch.h")]
    free += [CUDA / "limits.h", CUDA / "number.h", *RULES.iterdir()]
    names = ("chunk.h", "dropout_job.h", "foreach.h", "step.h", "slice_cut.h", "slice_step.h")
    free += [ROOT / "csrc" / name for name in names]
    assert len(free) >= 15
    for path in free:
        for header in re.findall(r'#include [<"](.*)[>"]', path.read_text()):
            assert not header.startswith(("torch", "ATen", "c10", "pybind11")), (path.name, header)


def test_formulas_include_neither_torch_nor_cuda():
    """g++ for each instruction set, nvcc and stand-alone programs compile the same formulas."""
    files = list(RULES.iterdir())
    own = {path.name for path in files}
    standard = {"cmath", "cstddef", "cstdint", "cstring", "string_view", "type_traits", "utility"}
    assert len(files) >= 8
    for path in files:
        for header in re.findall(r'#include [<"](.*)[>"]', path.read_text()):
            assert header in own | standard, (path.name, header)


def unchecked_calls(code: str) -> list[str]:
    """Calls of the CUDA runtime, and of functions that return its errors, whose result nobody looks at."""
    code = re.sub(r"//[^\n]*|\"[^\"\n]*\"", "", code)
    failing = r"(cuda[A-Z]\w*|launch_\w+|\w+_resident_blocks|upload|upload_pieces(?:<\w+>)?)"
    harmless = {"cudaGetErrorString", "cudaGetLastError"}  # they report, and do not fail
    looked_at = (
        r"(return|check_cuda\(|const cudaError_t error =|cudaError_t|return cudaDriverGetVersion\(&driver\) &&)\s*$"
    )
    found = []
    for call in re.finditer(rf"(?<![\w:.]){failing}\(", code):
        if call[1] not in harmless and not re.search(looked_at, code[: call.start()]):
            found.append(f"{call[1]} in line {code.count(chr(10), 0, call.start()) + 1}")
    return found + ["<<<>>>"] * code.count("<<<")


def test_each_call_of_the_runtime_is_checked():
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*.cpp")]:
        assert unchecked_calls(path.read_text()) == [], path.name
    assert unchecked_calls("  launch_step(pass, job);") and unchecked_calls("kernel<<<1, 2>>>();")
    launches = sum(path.read_text().count("cudaLaunchKernelEx(") for path in CUDA.iterdir())
    assert launches == 1, "all launches go through one function"


@pytest.mark.parametrize(
    "value, message",
    [
        ("yes", "REGFUSED_CUDA must be 0 (no CUDA kernels) or 1 (demand them), but is 'yes'"),
        pytest.param(
            "1",
            f"REGFUSED_CUDA=1 demands the CUDA kernels, but torch {torch.__version__} is built without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA"),
        ),
        ("0", "regfused: without CUDA kernels: REGFUSED_CUDA=0"),
    ],
)
def test_what_the_build_is_asked_for(value, message):
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "REGFUSED_CUDA": value},
        timeout=120,
    )
    assert (run.returncode == 0) == (value == "0")
    assert message in run.stdout + run.stderr
