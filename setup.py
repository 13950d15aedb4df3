"""Builds regfused._C: lists the sources and decides whether and for what they are compiled.

Environment variables: REGFUSED_BUILD=require fails where nothing can be compiled, instead of installing the package in
pure PyTorch; REGFUSED_CUDA=0 leaves the CUDA kernels out, 1 demands them; REGFUSED_LOCAL_VERSION=torch2.13.cpu makes
the version 0.1.0+torch2.13.cpu. Everything else is in pyproject.toml.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

# torch finds the toolkit beside the nvcc on the path, which may be a wrapper that is far from it.
if "CUDA_HOME" not in os.environ and Path("/usr/local/cuda/bin/nvcc").exists():
    os.environ["CUDA_HOME"] = "/usr/local/cuda"

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler
except ImportError as error:
    sys.exit(
        f"regfused is compiled against the torch you train with, but torch cannot be imported here ({error}).\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )


def version() -> str:
    here = re.search(r'^__version__ = "(.+)"$', Path("regfused/__init__.py").read_text(), re.MULTILINE)
    local = os.environ.get("REGFUSED_LOCAL_VERSION")
    return here[1] + (f"+{local}" if local else "")


def openmp_flag() -> str:
    """For torch's pool of threads. Not given to the linker: torch's own OpenMP runtime is the only one. On Linux it is
    GNU's, for which clang compiles nothing: csrc/cpu/parallel.cpp calls it by name there.
    """
    ask = [get_cxx_compiler(), "-dM", "-E", "-x", "c++", os.devnull]
    try:
        is_clang = "#define __clang__ " in subprocess.run(ask, capture_output=True, text=True, errors="replace").stdout
    except OSError:
        is_clang = False
    return "-DREGFUSED_GOMP" if is_clang and sys.platform == "linux" else "-fopenmp"


def why_not_compiled() -> str:
    """Why this machine compiles no C++20 against Python's headers, or an empty string."""
    compiler = get_cxx_compiler()
    openmp = openmp_flag()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tried.cpp")
        headers = ["Python.h", "span", *(["omp.h"] if openmp == "-fopenmp" else [])]
        source.write_text("".join(f"#include <{name}>\n" for name in headers) + "std::span<int> nothing;\n")
        include = ["-I", sysconfig.get_path("include")]
        command = [compiler, "-std=c++20", openmp, *include, "-c", source, "-o", os.devnull]
        try:
            tried = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return f"there is no C++ compiler: {compiler}: {error.strerror} (CXX names another)"
    if tried.returncode == 0:
        return ""
    said = next((line for line in tried.stderr.splitlines() if "error" in line), tried.stderr.strip()[-200:])
    return f"{compiler} compiles no C++20 for Python here: {said.replace(f'{folder}/', '')} (CXX names another)"


class BuildCompiledPart(BuildExtension):
    """Compiles, or leaves a note that says why not: the package shows it when it is imported."""

    def run(self) -> None:
        asked = os.environ.get("REGFUSED_BUILD", "")
        if asked not in ("", "require"):
            sys.exit(f"REGFUSED_BUILD must be empty or require, but is {asked!r}")
        why = why_not_compiled()
        if why and asked == "require":
            sys.exit(f"REGFUSED_BUILD=require demands the compiled part of regfused, but {why}")
        if not why and shutil.which("ninja") is None:
            sys.exit(
                "regfused is compiled by ninja, which is not on the path.\n"
                'Type: pip install ninja "setuptools>=77" pybind11, and then: pip install --no-build-isolation .'
            )
        note = Path(self.build_lib, "regfused", "not_compiled.txt")
        note.unlink(missing_ok=True)
        if why:
            print(f"regfused: without its compiled part, in pure PyTorch: {why}")
            self.extensions = []
            if not self.inplace:
                note.write_text(f"{why}\n")
        super().run()


def toolkit() -> str:
    """The version of nvcc, such as "13.0", or an empty string."""
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return ""
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    return version[1] if version else ""


def why_no_cuda() -> str:
    """Why the CUDA kernels are not compiled, or an empty string. A GPU is not needed for that."""
    asked = os.environ.get("REGFUSED_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"REGFUSED_CUDA must be 0 (no CUDA kernels) or 1 (demand them), but is {asked!r}")
    if asked == "0":
        return "REGFUSED_CUDA=0"
    nvcc = toolkit()
    why = ""
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    elif not nvcc:
        why = f"torch is built for CUDA {torch.version.cuda}, but there is no nvcc (CUDA_HOME is {CUDA_HOME})"
    elif nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        why = f"torch is built for CUDA {torch.version.cuda}, but nvcc is {nvcc}"
    if why and asked == "1":
        sys.exit(f"REGFUSED_CUDA=1 demands the CUDA kernels, but {why}")
    return why


def default_architectures() -> str:
    """Those of the GPUs that are here. Without one, what this nvcc knows of the architectures that people have, and PTX
    of the last one for later ones.
    """
    here = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    if here:
        return " ".join(f"{major}.{minor}" for major, minor in sorted(here))
    known = subprocess.check_output(
        [shutil.which("nvcc", path=f"{CUDA_HOME}/bin") or "nvcc", "--list-gpu-arch"], text=True
    )
    wanted = [
        arch
        for arch in ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
        if f"compute_{arch.replace('.', '')}\n" in known
    ]
    return " ".join(wanted) + "+PTX"


def folder_with_digest() -> str:
    """The folder of a header that names the sources, for csrc/sources.cpp. It is written only where it changes."""
    header = Path("build", "include", "regfused_sources_digest.h")
    text = f'#define REGFUSED_SOURCES_DIGEST "{runpy.run_path("regfused/sources.py")["digest"](Path.cwd())}"\n'
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return str(header.parent.absolute())


def extension_module() -> CppExtension:
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))

    flags = [
        "-std=c++20",
        "-O3",
        "-g0",
        openmp_flag(),
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",  # in headers of torch
        "-Wno-psabi",  # vectors never cross a function that is not inlined
        # The same bits on every instruction set: no contraction of a*b + c. NaN, infinities and signed zeros
        # stay; only errno and floating-point traps, which nothing reads, are given up.
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]

    no_cuda = why_no_cuda()
    if no_cuda:
        print(f"regfused: without CUDA kernels: {no_cuda}")
        cpu_sources = [source for source in sources if Path(source).parts[1] != "cuda"]
        extension = CppExtension("regfused._C", cpu_sources, extra_compile_args=flags)
    else:
        if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.device_count():
            print(
                "regfused: no GPU is here, so CUDA kernels are compiled for all: minutes for each architecture. "
                "TORCH_CUDA_ARCH_LIST=9.0 compiles for one, REGFUSED_CUDA=0 for none"
            )
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures())
        print(f"regfused: with CUDA kernels, nvcc {toolkit()}, for {os.environ['TORCH_CUDA_ARCH_LIST']}")
        nvcc_flags = [
            "-std=c++20",
            "-O3",
            "-fmad=false",  # the same arithmetic as on the CPU; memory is what limits the kernels
            "-Xcompiler=-fvisibility=hidden",
        ]
        extension = CUDAExtension(
            "regfused._C",
            [*sources, *sorted(str(path) for path in Path("csrc").rglob("*.cu"))],
            define_macros=[("REGFUSED_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
        )

        # The CUDA runtime goes into the extension, where it can: another release of it may come with torch.
        runtime = next(
            (path for lib in ("lib64", "lib") for path in Path(str(CUDA_HOME), lib).glob("libcudart_static.a")), None
        )
        if runtime:
            extension.libraries.remove("cudart")
            extension.extra_link_args += [
                str(runtime),
                "-ldl",
                "-lrt",
                "-lpthread",
                "-Wl,--exclude-libs,libcudart_static.a",
            ]

    extension.include_dirs.append(folder_with_digest())
    # A source distribution holds the headers, and the CUDA kernels whatever this torch is built for.
    extension.depends += sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
    return extension


setup(
    version=version(),
    ext_modules=[extension_module()],
    cmdclass={"build_ext": BuildCompiledPart.with_options(use_ninja=True)},
    options={"build_ext": {"build_temp": f"build/{sys.implementation.cache_tag}"}},
)
