# SPDX-License-Identifier: MIT
"""`examples/scripted-model`, installed as its own package, through the real engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, sys
from pathlib import Path
from tokenspeed import LLM, SamplingParams
from tokenspeed_scripted_folder import write_folder

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plays = [{"cue": "count", "answers": ["<think>Easy.</think>One, two, three.", "Four."]}]
    write_folder(folder, plays, "Hm.")
    llm = LLM(str(folder), enforce_eager=True, max_model_len=2048, max_num_batched_tokens=64)
    params = SamplingParams(max_tokens=60, temperature=0.0)
    first = [{"role": "user", "content": "a " * 200 + "count"}]
    told = {"role": "assistant", "content": "One, two, three."}
    second = [*first, told, {"role": "user", "content": "and then?"}]
    third = [*second, told, {"role": "user", "content": "and then?"}]
    other = [{"role": "user", "content": "b " * 300}]
    outputs = llm.chat([first, other, second, third, first], params, use_tqdm=False)
    print(json.dumps([output.outputs[0].text for output in outputs]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder that looks as if the example were installed in it."""
    folder = tmp_path_factory.mktemp("site")
    source = repository / "examples" / "scripted-model"
    for file in source.glob("*.py"):
        (folder / file.name).symlink_to(file)
    metadata = folder / "tokenspeed_scripted_model-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: tokenspeed-scripted-model\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[tokenspeed.models]\n"
        "ScriptedForCausalLM = tokenspeed_scripted:ScriptedForCausalLM\n"
        "BrokenForCausalLM = no_such_module:Nothing\n"
    )
    return folder


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_it_says_what_the_script_tells_in_chunks_and_from_cached_pages(site, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    done = run(site, str(script), str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    counted = "<think>Easy.</think>One, two, three."
    assert json.loads(done.stdout) == [counted, "Hm.", "Four.", "Hm.", counted]


def test_a_plug_in_that_does_not_load_is_a_clear_error(site, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BrokenForCausalLM"]}')
    load = "import sys, torch, pathlib; from tokenspeed.models.build import build_model"
    load += "; build_model(pathlib.Path(sys.argv[1]), torch.float32, torch.device('cpu'))"
    done = run(site, "-c", load, str(tmp_path))
    assert done.returncode != 0
    assert "plug-in of architecture BrokenForCausalLM does not load" in done.stderr
