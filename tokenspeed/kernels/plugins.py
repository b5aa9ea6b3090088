# SPDX-License-Identifier: MIT
"""Where ops and backends come from: the modules of this package, and other packages' plug-ins.

A source that fails to load is reported and left out; it stops nobody. A built-in module that needs
an optional package which is not installed is no failure: its backend is "not installed".
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

ENTRY_POINT_GROUP = "tokenspeed.kernels"
# Modules <family>_<backend> and <backend>_<what they share>: loaded when one is wanted.
GPU_BACKENDS = ("triton", "gluon", "cuda")
OPTIONAL_PACKAGES = ("triton", "cuda")  # that a built-in backend may miss

Register = Callable[..., None]


class Sources:
    """Loads the common sources once, and the GPU backends' modules once they are wanted."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}  # source -> why it did not load
        self.missing: dict[str, str] = {}  # source -> the optional package that it needs
        self.loaded = self.gpu_loaded = False

    def load(self, register: Register, *, gpu: bool) -> None:
        """Imports what has not been imported yet; `gpu`: the modules of GPU backends too."""
        if not self.loaded:
            self.loaded = True
            for name in _modules(gpu=False):
                self._try(name, partial(importlib.import_module, name))
            for plugin in entry_points(group=ENTRY_POINT_GROUP):
                self._try(f"plug-in {plugin.name}", partial(_plug_in, plugin, register))
        if gpu and not self.gpu_loaded:
            self.gpu_loaded = True
            for name in _modules(gpu=True):
                self._try(name, partial(importlib.import_module, name))

    def _try(self, source: str, load: Callable[[], Any]) -> None:
        # A plug-in is foreign code: whatever it raises is its own report, not our crash.
        try:
            load()
        except (Exception, SystemExit) as error:
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            package = (absent or "").partition(".")[0]
            if source.startswith("tokenspeed.") and package in OPTIONAL_PACKAGES:
                self.missing[source] = package
            else:
                self.problems[source] = f"{type(error).__name__}: {error}"


def _plug_in(plugin: EntryPoint, register: Register) -> None:
    plugin.load()(register)


def _modules(*, gpu: bool) -> Iterator[str]:
    package = importlib.import_module("tokenspeed.kernels")
    for module in pkgutil.iter_modules(package.__path__, "tokenspeed.kernels."):
        words = module.name.rpartition(".")[2].split("_")
        if (words[0] in GPU_BACKENDS or words[-1] in GPU_BACKENDS) is gpu:
            yield module.name
