"""Prints which architecture `make gpu-check` compiles for: the first call of it that needs a GPU."""

import sys

import torch


def main() -> None:
    try:
        print("{}.{}".format(*torch.cuda.get_device_capability()))
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        sys.exit(
            f"make gpu-check needs a GPU, but torch {torch.__version__} of {sys.executable} finds none:\n{error}\n"
            "GPU_PYTHON=... names another Python. REHEARSE=1 compiles and runs every stage without a GPU, on the CPU."
        )


if __name__ == "__main__":
    main()
