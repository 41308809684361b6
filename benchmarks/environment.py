"""The environment record of a result: on what, with what, when."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.threads import usable_cores

PACKAGES = {
    "tqsearch": "tqsearch",
    "numpy": "numpy",
    "torch": "torch",
    "triton": "triton",
    "faiss": "faiss-cpu",
    "turbovec": "turbovec",
}
REPOSITORY = Path(__file__).resolve().parent.parent


def environment(seed: int) -> dict[str, Any]:
    """Device, cores, threads, versions, seed, git commit and date, as plain JSON values without paths.

    Args:
        seed: the one the run was given.
    """
    return {
        "device": device(),
        "cores": usable_cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", usable_cores())),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "seed": seed,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def device() -> str:
    """The model of the CPU, and of the GPU where torch sees one."""
    names = [cpu_model()]
    import torch

    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return " + ".join(names)


def cpu_model() -> str:
    """As Linux reports it, and what Python knows elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit of the checkout, with `+` where the package or the benchmarks differ from it; None outside of git.

    In a copy without git, `$TQSEARCH_COMMIT` says it.
    """
    if os.environ.get("TQSEARCH_COMMIT"):
        return os.environ["TQSEARCH_COMMIT"]
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "tqsearch", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return run.stdout.strip()
