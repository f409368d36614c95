"""Importing a package without the optional packages that it would import with it.

torchmetrics and diffusers import torchvision wherever it is installed, needed or not. Beside a CPU build of torch it
may not import at all: its compiled operators are missing, and ``import torchmetrics`` fails with them. What we use of
either needs no torchvision, so they are imported as if it were absent. Who imports torchvision still gets it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Any


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Within, these packages are not found, neither as modules nor as distributions; one that is imported already is.

    Only for imports: it changes what the whole process sees.
    """
    absent = {package for package in packages if package not in sys.modules}
    find = Distribution.from_name

    def find_others(name: str) -> Distribution:
        if name.replace("-", "_") in absent:
            raise PackageNotFoundError(name)
        return find(name)

    Distribution.from_name = find_others
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(absent))  # None: the import system's word for a module that is not there
    try:
        yield
    finally:
        Distribution.from_name = find
        for package in absent:
            del modules[package]
