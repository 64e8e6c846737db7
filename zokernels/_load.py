"""Loads the native libraries that lie next to this package, by exact file name.

A library that is missing, does not load or was built from other sources is an ``ImportError`` that
says why and what to do; the registry keeps it as the backend's reason.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from zokernels.noise import CONTRACT_VERSION

# Raised together with the one compiled into the libraries when an op's native signature changes.
ABI_VERSION = 6

_REBUILD = "install zokernels again in this environment (pip install .)"


def native_library(name: str) -> ctypes.CDLL:
    """Load ``<package>/<name>.so`` and check what it was built from.

    Args:
        name: the library's file name without suffix, such as ``_zokernels_cpu``.

    Raises:
        ImportError: no such file, it does not load, or its versions are not this package's.
    """
    path = Path(__file__).resolve().with_name(f"{name}.so")
    if not path.is_file():
        raise ImportError(f"{path} does not exist: the native backend was not built; {_REBUILD}")
    try:
        # load_library registers the ops; the second handle reaches the plain C functions.
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"{path} does not load with torch {torch.__version__}: {error}; {_REBUILD}"
        ) from error
    for what, function, wanted in (
        ("native ABI", "zokernels_abi_version", ABI_VERSION),
        ("noise contract", "zokernels_contract_version", CONTRACT_VERSION),
    ):
        found = int(getattr(library, function)())
        if found != wanted:
            raise ImportError(
                f"{path} has {what} version {found}, this package needs {wanted}; {_REBUILD}"
            )
    return library
