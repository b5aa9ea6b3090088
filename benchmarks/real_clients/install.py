# SPDX-License-Identifier: MIT
"""Installs clients of pinned versions into one folder. Knows no task and starts no client.

npm packages share the folder's `node_modules`; what pip installs has a virtual environment each,
because their requirements contradict one another.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """What is installed for a client. `home` is the virtual environment's folder; "" means npm."""

    name: str
    version: str
    home: str = ""
    beside: tuple[str, ...] = ()

    def found(self, folder: Path) -> str:
        """The version that is installed in `folder`; "" if there is none."""
        if not self.home:
            about = folder / "node_modules" / self.name / "package.json"
            return str(json.loads(about.read_text())["version"]) if about.is_file() else ""
        prefix = self.name.replace("-", "_") + "-"
        for at in folder.glob(f"{self.home}/lib/python3*/site-packages/{prefix}*.dist-info"):
            return at.name.removeprefix(prefix).removesuffix(".dist-info")
        return ""

    def install(self, folder: Path) -> None:
        """Unless it is there. `OSError` or `subprocess.SubprocessError` if that is not possible."""
        if self.found(folder) == self.version:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not self.home:
            exact = f"{self.name}@{self.version}"
            _run("npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", exact)
            return
        python = folder / self.home / "bin" / "python"
        if not python.exists():
            _run(sys.executable, "-m", "venv", str(folder / self.home))
        _run(
            str(python), "-m", "pip", "install", "-q", f"{self.name}=={self.version}", *self.beside
        )


CLAUDE = Package("@anthropic-ai/claude-code", "2.1.197")
CODEX = Package("@openai/codex", "0.169.0")
OPENAI = Package("openai", "3.52.0", "sdk")
ANTHROPIC = Package("anthropic", "2.12.0", "sdk")
MINI = Package("mini-swe-agent", "2.4.6", "mini", ("mcp==2.3.0", "litellm==1.106.2"))
AIDER = Package("aider-chat", "0.86.2", "aider")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise subprocess.SubprocessError(f"{command[0]}: {' '.join(last)}")
