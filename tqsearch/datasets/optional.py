"""Packages that only data sets need: imported where they are used."""

import importlib
from typing import Any

from tqsearch.errors import DatasetError


def needs(module: str, purpose: str) -> Any:
    """Import an optional package.

    Args:
        module: its name.
        purpose: what cannot be done without it, for the message.

    Raises:
        DatasetError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise DatasetError(f"{module} is needed to {purpose}: pip install 'tqsearch[bench]'") from error
