# SPDX-License-Identifier: MIT
"""`examples/kernel-plugin` installed as its own package, and a plug-in that cannot be loaded.

Everything runs in processes of its own: what they print is what a user sees.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = """
[project]
name = "broken-kernels"
version = "1.0"
[project.entry-points."tokenspeed.kernels"]
broken = "broken_kernels:register_kernels"
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[tool.setuptools]
py-modules = ["broken_kernels"]
"""


def install(source: Path, target: Path) -> None:
    """What `pip install SOURCE` does, into a folder, without looking anything up."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    flags = ["--no-index", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([*command, *flags, str(source)], check=True, timeout=240)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder with the example and the broken plug-in installed."""
    folder = tmp_path_factory.mktemp("plugins")
    source = folder / "example"
    shutil.copytree(repository / "examples" / "kernel-plugin", source)
    broken = folder / "broken"
    broken.mkdir()
    (broken / "pyproject.toml").write_text(BROKEN)
    (broken / "broken_kernels.py").write_text("raise OSError('the device has no driver')\n")
    for each in (source, broken):
        install(each, folder / "site")
    return folder / "site"


def kernels(site: Path, *arguments: str) -> tuple[int, str]:
    """Runs `tokenspeed kernels ...` where the plug-ins are installed."""
    return python(site, "-m", "tokenspeed", "kernels", *arguments)


def python(site: Path, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def test_it_is_listed_and_a_broken_one_is_reported(site: Path) -> None:
    status, text = kernels(site, "list")
    assert status == 0
    listed = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    assert "numpy" in listed["rms_norm"]
    assert "numpy" in listed["silu_mul"]
    assert "numpy" not in listed["linear"]
    assert "not loaded: plug-in broken: OSError: the device has no driver" in text


def test_it_is_explained(site: Path) -> None:
    status, text = kernels(site, "explain", "rms_norm", "--dtype", "float32")
    assert status == 0
    assert "  numpy        cpu comes first" in text
    assert "* cpu" in text
    _, text = kernels(site, "explain", "rms_norm", "--dtype", "bfloat16")
    assert "numpy        takes float32, not bfloat16" in text
    _, text = kernels(site, "explain", "silu_mul", "--dtype", "float32", "--shape", "size=70000")
    assert "numpy        size up to 65536, not 70000" in text


def test_it_passes_every_case(site: Path) -> None:
    status, text = kernels(site, "verify", "--backend", "numpy", "--failures")
    assert status == 0, text
    assert "28 cases of 2 kernels; 0 kernels fail" in text


def test_an_engine_takes_it_where_it_is_asked_for(site: Path) -> None:
    code = """
from tokenspeed.kernels import force_backend, select
from tokenspeed.llm import LLM
with force_backend("numpy", "rms_norm"):
    print(select("rms_norm").__module__, select("linear").__module__)
texts = []
for chosen in ((), ("rms_norm=numpy", "silu_mul=numpy")):
    llm = LLM(dtype="float32", kernel_backend=chosen, num_pages=64, max_model_len=256)
    texts.append(llm.generate(["def f(x):"])[0].outputs[0].text)
    llm.close()
print(texts[0] == texts[1], len(texts[0]) > 0)
try:
    LLM(dtype="bfloat16", kernel_backend=("rms_norm=numpy",))
except ValueError as error:
    print(error)
"""
    status, text = python(site, "-c", code)
    assert status == 0, text
    first, second, refusal = text.strip().splitlines()
    assert first.split()[0] == "tokenspeed_numpy_kernels"
    assert second == "True True"
    assert "no backend serves rms_norm(" in refusal
    assert "numpy: takes float32, not bfloat16" in refusal
