# SPDX-License-Identifier: MIT
"""Ranks started by torchrun and by Ray: the tokens of one rank, and an end that leaves nobody."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import ROOT
from tokenspeed import LLM, SamplingParams
from tokenspeed.cli.main import main
from tokenspeed.config import EngineConfig, TorchrunPlace, ray_address, torchrun_place
from tokenspeed.engine.ranks import ray_cluster, torchrun
from tokenspeed.engine.ranks.starter import LOOPBACK, make_starter
from tokenspeed.errors import RankDiedError

START_S, END_S = 90.0, 10.0
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "num_pages": 16}
FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
FLAGS = [word.replace("_", "-") for word in FLAGS]
PROMPTS = ["def add(a, b):", "import os\n", "class Tree:\n    def"]
VARIABLES = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class Launch:
    """Processes on their own, what they say, and everything that they start."""

    def __init__(self, folder: Path, *commands: list[str], **environment: str) -> None:
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.processes = [
                subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | environment
                )
                for command in commands
            ]

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """All processes, children's children too."""
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def rank(self, words: str) -> psutil.Process:
        """The one process whose command has these words."""
        (found,) = [p for p in self.family() if words in " ".join(p.cmdline())]
        return found

    def wait_until_ready(self, port: int) -> None:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{LOOPBACK}:{port}/ready").status_code == 200:
                    return
            assert all(p.poll() is None for p in self.processes), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.1)

    def ends(self, timeout_s: float) -> list[int]:
        """The statuses."""
        end = time.monotonic() + timeout_s
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]


@contextlib.contextmanager
def launch(folder: Path, *commands: list[str], **environment: str) -> Iterator[Launch]:
    """Whatever happens, nothing of it is left."""
    made = Launch(folder, *commands, **environment)
    try:
        yield made
    finally:
        for process in made.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        made.ends(END_S)


def serve(port: int, *flags: str) -> list[str]:
    command = ["serve", "demo", "--port", str(port), *FLAGS]
    return [*command, "--tensor-parallel-size", "2", *flags]


def by_torchrun(port: int, *flags: str, agent: tuple[str, ...] = ()) -> list[str]:
    """One agent of two ranks, or as `agent` says."""
    agent = agent or ("--standalone", "--nproc-per-node", "2")
    command = [sys.executable, "-m", "torch.distributed.run", *agent, "-m", "tokenspeed"]
    return [*command, *serve(port, "--launcher", "torchrun", *flags)]


def two_agents(port: int, second: tuple[str, ...] = ()) -> list[list[str]]:
    """Two that stand for two machines, the second perhaps with further flags."""
    store = ("--nnodes", "2", "--nproc-per-node", "1", "--master-port", str(free_port()))
    agents = [("--master-addr", LOOPBACK, "--node-rank", str(node), *store) for node in range(2)]
    return [by_torchrun(port, agent=agents[0]), by_torchrun(port, *second, agent=agents[1])]


def by_ray(port: int, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "tokenspeed"]
    return [*command, *serve(port, "--launcher", "ray", *flags)]


def bodies() -> list[dict[str, Any]]:
    """Greedy and drawn."""
    return [
        {"prompt": prompt, "max_tokens": 24, "temperature": temperature, "seed": 5}
        for prompt in PROMPTS
        for temperature in (0.0, 0.8)
    ]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What one rank says."""
    llm = LLM("demo", **OPTIONS)
    outputs = [
        llm.generate(b["prompt"], SamplingParams(**{k: b[k] for k in b if k != "prompt"}))[0]
        for b in bodies()
    ]
    return [output.outputs[0].text for output in outputs]


def answers(port: int) -> list[str]:
    url = f"http://{LOOPBACK}:{port}/v1/completions"
    replies = [httpx.post(url, json=body, timeout=60.0) for body in bodies()]
    return [reply.json()["choices"][0]["text"] for reply in replies]


def assert_gone(family: list[psutil.Process], timeout_s: float = END_S) -> None:
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    left = [" ".join(p.cmdline())[:120] for p in alive]
    for process in alive:
        process.kill()
    assert left == []


# -- torchrun


def test_torchrun_ranks_answer_as_one_and_leave_at_sigterm(
    tmp_path: Path, expected: list[str]
) -> None:
    port = free_port()
    with launch(tmp_path, by_torchrun(port)) as made:
        made.wait_until_ready(port)
        assert answers(port) == expected
        family = made.family()
        assert len(family) >= 4  # agent, gateway, its engine, rank 1
        made.processes[0].terminate()
        assert_gone(family)


@pytest.mark.full
def test_torchrun_ranks_on_two_machines_exchange_over_the_network(
    tmp_path: Path, expected: list[str]
) -> None:
    port = free_port()
    with launch(tmp_path, *two_agents(port)) as made:
        made.wait_until_ready(port)
        assert answers(port) == expected
        family = made.family()
        made.processes[0].terminate()
        assert_gone(family)


@pytest.mark.full
@pytest.mark.parametrize("victim", ["agent", "gateway", "engine", "rank 1"])
def test_whoever_of_torchruns_processes_dies_all_end(tmp_path: Path, victim: str) -> None:
    port = free_port()
    with launch(tmp_path, by_torchrun(port)) as made:
        made.wait_until_ready(port)
        family = made.family()
        agent = psutil.Process(made.processes[0].pid)
        ranks = {len(p.children()) > 0: p for p in agent.children()}  # only the gateway has any
        victims = {"agent": agent, "gateway": ranks[True], "rank 1": ranks[False]}
        victims["engine"] = made.rank("engine.server")
        victims[victim].kill()
        statuses = made.ends(END_S)
        assert_gone(family)
        if victim == "rank 1":
            assert "rank      : 1" in made.said
            assert "SIGKILL" in made.said
        assert statuses == [-9 if victim == "agent" else 1]


@pytest.mark.full
def test_torchrun_with_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    flags = ("--tensor-parallel-size", "4")
    with launch(tmp_path, by_torchrun(free_port(), *flags)) as made:
        assert made.ends(START_S) == [1]
        assert "started 2 process(es) (WORLD_SIZE), but the parallel sizes need 4" in made.said


@pytest.mark.full
def test_torchrun_ranks_with_other_options_are_refused(tmp_path: Path) -> None:
    commands = two_agents(free_port(), ("--max-num-seqs", "8"))
    with launch(tmp_path, *commands) as made:
        assert made.ends(START_S) == [1, 1]
        assert "rank 1 was started with other options than rank 0" in made.said


def test_a_process_that_torchrun_did_not_start_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert main(["serve", "demo", "--launcher", "torchrun"]) == 2
    assert "the environment has no RANK; start with `torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("missing", VARIABLES)
def test_each_missing_variable_of_torchruns_is_named(missing: str) -> None:
    assert torchrun_place(VARIABLES).rank == 1
    with pytest.raises(ValueError, match=f"the environment has no {missing}"):
        torchrun_place({k: v for k, v in VARIABLES.items() if k != missing})
    with pytest.raises(ValueError, match="WORLD_SIZE is no number: 'two'"):
        torchrun_place(VARIABLES | {"WORLD_SIZE": "two"})


def test_an_llm_is_not_for_torchruns_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="this process is rank 1 of torchrun's"):
        torchrun.TorchrunRanks(4)
    with pytest.raises(ValueError, match=r"torchrun started 4 .* need 2 rank"):
        torchrun.TorchrunRanks(2)


def test_rank_0_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = TorchrunPlace(0, 2, 2, 0, LOOPBACK, free_port(), "run", 0, agent_has_store=False)
    store = torchrun.connect(place, 10.0)
    other = TorchrunPlace(1, 2, 2, 0, LOOPBACK, place.port, "run", 0, agent_has_store=False)
    with pytest.raises(
        RankDiedError, match="rank 0 has not said where to meet: key tokenspeed/run"
    ):
        torchrun.find_meeting(other, 0.5)
    store.set("tokenspeed/run/0/meeting", '{"port": 7}')
    assert torchrun.find_meeting(other, 5.0) == {"port": 7}


def test_processes_of_two_agents_are_on_two_machines() -> None:
    places = [torchrun_place(VARIABLES | {"GROUP_RANK": str(node)}) for node in (0, 0, 1)]
    names = [torchrun.machine_of(place) for place in places]
    assert names[0] == names[1] != names[2]
    alone = torchrun_place(VARIABLES | {"WORLD_SIZE": "2"})
    assert torchrun.machine_of(alone) == socket.gethostname()
    assert torchrun.own_address_towards(LOOPBACK, 1) == LOOPBACK


# -- Ray

SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


def need_ray() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install tokenspeed[ray]")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each, both on this machine."""
    need_ray()
    address = f"{LOOPBACK}:{free_port()}"
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1"]
    port = ["--port", address.rpartition(":")[2], "--node-ip-address", LOOPBACK]
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # names of sockets are short
    quiet = ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", temporary]
    head = [*ray, "--head", *port, *quiet]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        for name, command in (("head", head), ("second", [*ray, "--address", address])):
            (tmp_path / name).mkdir()
            wait_until_up(stack.enter_context(launch(tmp_path / name, command, **SECRET)))
        yield address


def wait_until_up(node: Launch) -> None:
    end = time.monotonic() + START_S
    while "Ray runtime started" not in node.said:
        assert node.processes[0].poll() is None, node.said
        assert time.monotonic() < end, node.said
        time.sleep(0.1)


@pytest.mark.full
def test_ray_ranks_answer_as_one_and_leave_at_sigterm(tmp_path: Path, expected: list[str]) -> None:
    need_ray()
    port = free_port()
    with launch(tmp_path, by_ray(port)) as made:
        made.wait_until_ready(port)
        assert answers(port) == expected
        family = made.family()
        made.processes[0].terminate()
        assert made.ends(END_S) == [0]
        assert_gone(family)
        assert "unexpected" not in made.said


@pytest.mark.full
@pytest.mark.parametrize("victim", ["ranks.worker", "ray::tokenspeed rank 1", "engine.server"])
def test_whoever_of_rays_processes_dies_all_end(tmp_path: Path, victim: str) -> None:
    need_ray()
    port = free_port()
    with launch(tmp_path, by_ray(port)) as made:
        made.wait_until_ready(port)
        family = [p for p in made.family() if not is_rays_own(p)]
        made.rank(victim).kill()
        assert made.ends(END_S) == [1]
        assert_gone(family)
        assert victim == "engine.server" or "rank 1" in made.said


def is_rays_own(process: psutil.Process) -> bool:
    """Its helpers find by themselves, some in half a minute, that their cluster is no more."""
    command = " ".join(process.cmdline())
    return "/ray/" in command or command.startswith(("ray::Dash", "ray::Runtime", "ray::IDLE"))


@pytest.mark.full
def test_ray_ranks_on_two_nodes_of_a_cluster(
    tmp_path: Path, cluster: str, expected: list[str]
) -> None:
    """RAY_ADDRESS names the cluster; its nodes stand for two machines. It outlives the engine."""
    for _ in range(2):
        port = free_port()
        with launch(tmp_path, by_ray(port), RAY_ADDRESS=cluster, **SECRET) as made:
            made.wait_until_ready(port)
            assert answers(port) == expected
            family = made.family()
            assert not any("raylet" in " ".join(p.cmdline()) for p in family)
            made.processes[0].terminate()
            assert made.ends(END_S) == [0]
            assert_gone(family)


@pytest.mark.full
def test_a_cluster_that_is_full_says_so(tmp_path: Path, cluster: str) -> None:
    port, second = free_port(), tmp_path / "one too many"
    second.mkdir()
    with launch(tmp_path, by_ray(port), RAY_ADDRESS=cluster, **SECRET) as made:
        made.wait_until_ready(port)
        with launch(second, by_ray(free_port()), RAY_ADDRESS=cluster, **SECRET) as other:
            assert other.ends(START_S) == [1]
            assert "Ray has no room for 2 ranks of 1 CPU" in other.said
        made.wait_until_ready(port)


@pytest.mark.full
def test_an_llm_uses_the_ray_that_its_program_has(tmp_path: Path, expected: list[str]) -> None:
    need_ray()
    program = tmp_path / "program.py"
    program.write_text(
        "import time, ray\n"
        "from tokenspeed import LLM, SamplingParams\n"
        "ray.init(num_cpus=2, include_dashboard=False)\n"
        f"with LLM('demo', tensor_parallel_size=2, launcher='ray', **{OPTIONS}) as llm:\n"
        f"    params = SamplingParams(**{dict(list(bodies()[0].items())[1:])})\n"
        f"    print(repr(llm.generate({PROMPTS[0]!r}, params)[0].outputs[0].text))\n"
        "for _ in range(100):\n"  # Ray counts now and then
        "    free = ray.available_resources().get('CPU')\n"
        "    time.sleep(0 if free == 2 else 0.1)\n"
        "print('still', ray.is_initialized(), free)\n"
    )
    with launch(tmp_path, [sys.executable, str(program)]) as made:
        assert made.ends(START_S) == [0], made.said
        assert repr(expected[0]) in made.said
        assert "still True 2.0" in made.said


@pytest.mark.full
def test_a_cluster_that_is_too_small_says_so_at_once(tmp_path: Path, cluster: str) -> None:
    command = by_ray(free_port(), "--tensor-parallel-size", "4")
    with launch(tmp_path, command, RAY_ADDRESS=cluster, **SECRET) as made:
        assert made.ends(START_S) == [1]
        assert "4 ranks ask Ray for 4 CPU, and the cluster has 2 CPU" in made.said


@pytest.mark.parametrize(
    ("has", "unit", "said"),
    [
        ({"CPU": 3.0}, {"CPU": 1.0}, "4 ranks ask Ray for 4 CPU, and the cluster has 3 CPU"),
        ({}, {"CPU": 1.0}, "has 0 CPU"),
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, "for 4 CPU, 4 GPU, .* has 8 CPU, 0 GPU"),
    ],
)
def test_room_is_counted_before_it_is_waited_for(
    has: dict[str, float], unit: dict[str, float], said: str
) -> None:
    ray_cluster.check_room(dict.fromkeys(unit, 4.0), unit, 4)
    with pytest.raises(ValueError, match=said):
        ray_cluster.check_room(has, unit, 4)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "tokenspeed\[ray\]"'):
        make_starter(EngineConfig.of(launcher="ray", tensor_parallel_size=2), 2)


def test_rays_address_is_the_environments() -> None:
    assert ray_address({"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    assert ray_address({}) is ray_address({"RAY_ADDRESS": ""}) is None


def test_a_cluster_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "ray_current_cluster"
    assert not ray_cluster.answers(file)
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        file.write_text("{}:{}".format(*listener.getsockname()))
        assert ray_cluster.answers(file)
    assert not ray_cluster.answers(file)
