# SPDX-License-Identifier: MIT
"""Makes the peers' environments, the checkpoints, and each peer's own files of them, once.

All of it lies in one folder outside of the repository. What is complete has a mark and is not made
again; what failed says why, in `SetupError` and in a log, and is tried again next time.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from peers import checkpoints
from peers.engines import CONVERTERS, ENVIRONMENTS, Engine

SCRIPTS = Path(__file__).resolve().parent / "converters"
LLAMA = "llama-cpp-python"
LLAMA_FLAGS = "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DCMAKE_BUILD_TYPE=Release"
LLAMA_PARTS = (
    *("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER"),
    *("LLAMA_CURL", "LLAVA_BUILD", "MTMD_BUILD"),
)


class SetupError(RuntimeError):
    """An environment or a file could not be made."""


class Home:
    """The folder of the peers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def python(self, environment: str | None) -> str:
        """The interpreter of an environment, which is made if it is not there."""
        if environment is None:
            return sys.executable
        folder = self.folder / "environments" / environment
        python, mark = str(folder / "bin" / "python"), folder / "complete"
        wanted = repr(ENVIRONMENTS[environment])
        if mark.exists() and mark.read_text() == wanted:
            return python
        print(f"setup: environment {environment}", flush=True)
        log = f"setup-{environment}"
        self._run([sys.executable, "-m", "venv", "--clear", str(folder)], log)
        for packages in ENVIRONMENTS[environment].installs:
            if packages[0].startswith(LLAMA):
                self._install_llama(python, packages[0], log)
            else:
                self._run([python, "-m", "pip", "install", "-q", *packages], log)
        if removes := ENVIRONMENTS[environment].removes:
            self._run([python, "-m", "pip", "uninstall", "-q", "-y", *removes], log)
        mark.write_text(wanted)
        return python

    def model(self, name: str) -> Path:
        """The checkpoint's folder."""
        folder = self.folder / "models" / name
        if not (folder / "complete").exists():
            print(f"setup: checkpoint {name}", flush=True)
        checkpoints.build(name, folder)
        return folder

    def files(self, engine: Engine, model: str, weights: str) -> Path:
        """What the engine reads for this model and weight type: the checkpoint, or its own file."""
        source = self.model(model)
        if not engine.kind:
            return source
        name = f"{model}-{engine.formats[weights]}"
        out = (
            self.folder
            / "files"
            / engine.kind
            / (name + (".gguf" if engine.kind == "gguf" else ""))
        )
        mark = out.parent / f"{name}.complete"
        if mark.exists():
            return out
        python = self.python(CONVERTERS[engine.kind])
        print(f"setup: {engine.kind} {name}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        log = f"convert-{engine.kind}-{name}"
        if engine.kind == "gguf":
            self._to_gguf(source, out, engine.formats[weights], python, log)
        else:
            if out.exists():
                shutil.rmtree(out)
            script = str(SCRIPTS / f"to_{engine.kind}.py")
            self._run([python, script, str(source), str(out), weights], log)
        mark.touch()
        return out

    def _to_gguf(self, source: Path, out: Path, kind: str, python: str, log: str) -> None:
        whole = out.with_name(f"{source.name}-bf16.gguf")
        if kind == "bf16" or not whole.exists():
            script = str(SCRIPTS / "to_gguf.py")
            self._run([sys.executable, script, str(self._sources()), str(source), str(whole)], log)
        if kind != "bf16":
            script = str(SCRIPTS / "gguf_quantize.py")
            self._run([python, script, str(whole), str(out), kind], log)

    def _install_llama(self, python: str, package: str, log: str) -> None:
        """Compiles for this CPU; Clang makes the faster code, if there is one."""
        folder = self.folder / "llama-sdist"
        pip = [python, "-m", "pip"]
        download = ["download", "-q", "--no-deps", "--no-binary", LLAMA, "-d", str(folder)]
        self._run([*pip, *download, package], log)
        flags = " ".join([LLAMA_FLAGS, *(f"-D{part}=OFF" for part in LLAMA_PARTS)])
        build = {"CMAKE_ARGS": flags, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
        names = ("clang", *(f"clang-{version}" for version in range(25, 16, -1)))
        if clang := next(filter(shutil.which, names), None):
            build |= {"CC": clang, "CXX": clang.replace("clang", "clang++")}
        print("setup: compiling llama.cpp takes minutes", flush=True)
        [archive] = folder.glob("*.tar.gz")
        self._run([*pip, "install", "-q", "--no-cache-dir", str(archive)], log, build)

    def _sources(self) -> Path:
        """llama.cpp's sources, whose converter its package leaves out."""
        self.python("llama")
        out = self.folder / "llama-sdist" / "sources"
        if not out.exists():
            [archive] = out.parent.glob("*.tar.gz")
            part = out.with_name("sources.part")
            with tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")
            part.rename(out)
        [found] = out.glob("*/vendor/llama.cpp")
        return found

    def _run(
        self, command: Sequence[str], log: str, environment: dict[str, str] | None = None
    ) -> None:
        path = self.logs / f"{log}.log"
        with path.open("a") as out:
            out.write(f"$ {' '.join(command)}\n")
            out.flush()
            done = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
                check=False,
            )
        if done.returncode:
            last = path.read_text("utf-8", "replace").strip().splitlines()[-1]
            raise SetupError(f"{log}: {last[:300]} (all of it in {path})")
