"""Pinning of threads: the same number for every contestant, set before its libraries are loaded.

FAISS takes its threads from OpenMP, and the OpenBLAS inside its wheel is the OpenMP build, so `OMP_NUM_THREADS` governs
both. numpy brings another OpenBLAS with threads of its own: it gets one. turbovec uses rayon.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

BLAS_THREADS = 1


def requested_threads(arguments: Sequence[str]) -> int:
    """The value of `--threads` in the arguments; every core that this process may use if it is not there.

    It is read ahead of the argument parser, since libraries read the environment when they are loaded.
    """
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--threads":
            text = value if equals else "".join(arguments[position + 1 : position + 2])
            if text.isdigit() and int(text) > 0:
                return int(text)
    return usable_cores()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment_variables(threads: int) -> dict[str, str]:
    """What the thread pools read when they start."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(BLAS_THREADS),
    }


def pin(threads: int) -> None:
    """Set the environment of this process and of those it starts."""
    os.environ.update(environment_variables(threads))


def pin_loaded(threads: int) -> None:
    """Pin the libraries that are loaded already; the environment alone does not reach those."""
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def pools() -> list[dict[str, Any]]:
    """The native thread pools of this process and their sizes, without paths."""
    from threadpoolctl import threadpool_info

    return [{key: pool[key] for key in ("prefix", "num_threads", "version")} for pool in threadpool_info()]
