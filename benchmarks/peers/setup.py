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
GGUF_DIRECT = ("bf16", "Q8_0")  # that the converter writes
LLAMA_TOOLS = ("LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER")  # what the server is among
LLAMA_WEB = ("LLAMA_OPENSSL", "LLAMA_BUILD_UI", "LLAMA_BUILD_WEBUI")  # that it can do without


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
                self._install_llama(python, log)
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
        print(f"setup: {engine.kind} {name}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        log = f"convert-{engine.kind}-{name}"
        if engine.kind == "gguf":
            self._to_gguf(source, out, engine.formats[weights], log)
        else:
            python = self.python(CONVERTERS[engine.kind])
            if out.exists():
                shutil.rmtree(out)
            script = str(SCRIPTS / f"to_{engine.kind}.py")
            self._run([python, script, str(source), str(out), weights], log)
        mark.touch()
        return out

    def _to_gguf(self, source: Path, out: Path, kind: str, log: str) -> None:
        direct = kind in GGUF_DIRECT
        whole = out if direct else out.with_name(f"{source.name}-bf16.gguf")
        if direct or not whole.exists():
            script, made = str(SCRIPTS / "to_gguf.py"), kind.lower() if direct else "bf16"
            convert = [script, str(self._sources()), str(source), str(whole), made]
            self._run([sys.executable, *convert], log)
        if not direct:
            script = str(SCRIPTS / "gguf_quantize.py")
            self._run([self.python(CONVERTERS["gguf"]), script, str(whole), str(out), kind], log)

    def llama_server(self) -> Path:
        """llama.cpp's server, from the sources that its Python package brings, for this CPU."""
        sources, build = self._sources(), self.folder / "llama-server"
        if not (binary := build / "bin" / "llama-server").exists():
            print("setup: compiling llama-server takes minutes", flush=True)
            without = [*(part for part in LLAMA_PARTS if part not in LLAMA_TOOLS), *LLAMA_WEB]
            parts = [f"-D{part}=OFF" for part in without]
            tools = [f"-D{part}=ON" for part in LLAMA_TOOLS]
            beside = Path(sys.executable).with_name("cmake")  # of a virtual environment
            cmake = str(beside) if beside.exists() else "cmake"
            configure = [cmake, "-S", str(sources), "-B", str(build), *LLAMA_FLAGS.split()]
            environment = self._compilers()
            self._run([*configure, *parts, *tools], "llama-server", environment)
            jobs = str(os.cpu_count() or 1)
            make = [cmake, "--build", str(build), "--target", "llama-server", "-j", jobs]
            self._run(make, "llama-server", environment)
        return binary

    def _install_llama(self, python: str, log: str) -> None:
        flags = " ".join([LLAMA_FLAGS, *(f"-D{part}=OFF" for part in LLAMA_PARTS)])
        build = {"CMAKE_ARGS": flags, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
        print("setup: compiling llama.cpp takes minutes", flush=True)
        install = [python, "-m", "pip", "install", "-q", "--no-cache-dir", str(self._archive())]
        self._run(install, log, build | self._compilers())

    def _compilers(self) -> dict[str, str]:
        """Clang makes the faster code, if there is one."""
        names = ("clang", *(f"clang-{version}" for version in range(25, 16, -1)))
        if clang := next(filter(shutil.which, names), None):
            return {"CC": clang, "CXX": clang.replace("clang", "clang++")}
        return {}

    def _archive(self) -> Path:
        """llama.cpp as its package has it, not compiled."""
        folder = self.folder / "llama-sdist"
        if not list(folder.glob("*.tar.gz")):
            [[package]] = ENVIRONMENTS["llama"].installs
            download = ["download", "-q", "--no-deps", "--no-binary", LLAMA, "-d", str(folder)]
            self._run([sys.executable, "-m", "pip", *download, package], "llama-sdist")
        [archive] = folder.glob("*.tar.gz")
        return archive

    def _sources(self) -> Path:
        """llama.cpp's sources, whose converter and server its package leaves out."""
        out = self.folder / "llama-sdist" / "sources"
        if not out.exists():
            part = out.with_name("sources.part")
            with tarfile.open(self._archive()) as tar:
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
