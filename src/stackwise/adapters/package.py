"""The one place that imports PEFT: late, for it takes seconds, and quietly."""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stackwise.adapters.layer import AdaptedLinear


class MissingPackageError(ImportError):
    """A package that an extra installs is not there; the message names the extra."""

    exit_code = 2


@lru_cache(maxsize=1)
def adapted_linear() -> type[AdaptedLinear]:
    """The layer class. Without the package: MissingPackageError."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # packages that PEFT loads speak of kernels they could use elsewhere
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # and of calls of theirs that PyTorch will drop
            from stackwise.adapters.layer import AdaptedLinear
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"adapters need the package peft, and {error.name} is not installed; "
            'pip install "stackwise[adapters]"'
        ) from error
    finally:
        logging.disable(before)
    return AdaptedLinear
