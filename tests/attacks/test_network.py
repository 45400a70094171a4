"""No command asks the network for anything, nor writes anywhere but where it says.

The commands run once, in a network namespace that has a loopback interface and nothing else where the system permits
one, each under an audit hook that notes every address that is looked up or connected to, and every file opened for
writing. The hook sees Python alone; what compiled code tries, the kernel counts, as packets without a route.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PATIENCE = 1800  # seconds; as in programs.py, which the session cannot import
COMMON = ["data.rows=60", "data.dim=8", "queries.val_samples=100", "queries.test_samples=100", "threads=1"]
TRAIN = ["nvf.train", "trainer=debug", *COMMON, "hydra.run.dir=outputs/run"]
pytestmark = pytest.mark.slow  # every command, in a namespace of its own
COMMANDS = {
    "train": TRAIN,
    "search": ["nvf.search", "pipeline=outputs/run/pipeline", "queries=queries.npy", "k=3", "output=outputs/a.jsonl"],
    "export": ["nvf.export", "pipeline=outputs/run/pipeline", "to=outputs/keys.npy"],
    "compare": ["nvf.compare", "outputs", "output=outputs/comparison"],
}
HOOK = """
import os, sys

LOCAL = {"", "localhost", "::1", "0.0.0.0", "::"}
HOSTS = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
ADDRESSES = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getnameinfo": 0}


def note(name, text):
    line = f"{' '.join(sys.orig_argv[1:4])}: {text}\\n".encode()
    file = os.open(os.environ["NVF_NOTES"] + name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line)
    os.close(file)


def hook(event, arguments):
    if event in HOSTS or event in ADDRESSES:
        host = arguments[HOSTS.get(event, ADDRESSES.get(event))]
        if event in ADDRESSES:
            if not isinstance(host, tuple):
                return  # the path of a socket in the file system, or a connected socket's None
            host = host[0]
        host = host.decode() if isinstance(host, bytes) else str(host or "")
        if host not in LOCAL and not host.startswith("127."):
            note("network", f"{event} {host}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith((os.environ["NVF_NOTES"], "/dev/", "/proc/")):
            note("written", path)


sys.addaudithook(hook)
"""


# What runs inside the namespace. As a process of its own, since a process cannot leave a namespace for which it has no
# privilege, and pytest must.


def no_routes() -> int:
    """How many packets the kernel of this network namespace had no route for."""
    head, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:"))
    counters = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(dict(zip(head, values, strict=True))["OutNoRoutes"]) + int(counters["Ip6OutNoRoutes"])


def raise_loopback() -> None:
    """What `ip link set lo up` does, on machines without `ip`."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        up_and_running, set_flags = 0x41, 0x8914
        fcntl.ioctl(control, set_flags, struct.pack("16sh14x", b"lo", up_and_running))


def lost() -> bool:
    """Whether an address out there, one that is kept for documentation, cannot be reached."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # which sends nothing, but needs a route
        except OSError:
            return True
    return False


def dashboard(environment: dict[str, str]) -> dict[str, Any]:
    """Start TensorBoard as the README says, and ask it for its page and for the runs."""
    import urllib.request

    arguments = [sys.executable, "-m", "tensorboard.main", "--logdir", "outputs", "--port", "0"]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    limit = threading.Timer(PATIENCE, process.kill)
    limit.start()
    said, answers = [], {}
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"at (http://localhost:\d+/)", line):
                for page in ("", "data/runs"):
                    with urllib.request.urlopen(found[1] + page, timeout=PATIENCE) as answer:
                        answers[page] = answer.read().decode(errors="replace")
                break
    finally:
        limit.cancel()
        process.terminate()
        said.append(process.communicate(timeout=PATIENCE)[0])
    return {"status": 0 if answers else process.returncode, "said": "".join(said), "answers": answers}


def session(isolated: bool) -> None:
    """Run every command in the working directory, and leave what was seen in seen.json."""
    seen: dict[str, Any] = {"isolated": isolated, "counts": False}
    if isolated:
        raise_loopback()
        before = no_routes()
        seen["lost"], seen["counts"] = lost(), no_routes() > before
    before = no_routes() if isolated else 0
    commands = {}
    for name, arguments in COMMANDS.items():
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        commands[name] = {"status": done.returncode, "said": done.stdout}
    commands["tensorboard"] = dashboard(dict(os.environ))
    seen |= {"commands": commands, "tried": no_routes() - before if isolated else None}
    Path("seen.json").write_text(json.dumps(seen))


# What asks.


def isolation() -> list[str] | None:
    """The words that start a command in a network namespace of its own; None where the system permits none."""
    for words in (["unshare", "-rn"], ["unshare", "-n"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return None


def surroundings(place: Path, **changed: str) -> dict[str, str]:
    """An environment whose home, temporary folder and notes lie in a folder, under the audit hook."""
    for name in ("hook", "home", "temporary", "notes", "work"):
        (place / name).mkdir(exist_ok=True)
    (place / "hook" / "sitecustomize.py").write_text(HOOK)
    of_the_user = ("XDG_", "MPL", "TORCH", "HF_", "TENSORBOARD", "PYTHON", "PYTEST")  # they name other places
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_the_user)}
    return environment | {
        "PYTHONPATH": str(place / "hook"),
        "PYTHONDONTWRITEBYTECODE": "1",  # what Python compiles, it would keep beside the sources
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "temporary"),
        "NVF_NOTES": f"{place / 'notes'}/",
        **changed,
    }


def notes(place: Path, name: str) -> list[str]:
    """The lines that the hook has noted."""
    path = place / "notes" / name
    return path.read_text().splitlines() if path.exists() else []


def tree(folder: Path) -> set[str]:
    """The files in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all commands have run."""
    place = tmp_path_factory.mktemp("network")
    environment = surroundings(place)
    np.save(place / "work" / "queries.npy", np.random.default_rng(0).standard_normal((7, 8), dtype=np.float32))
    words = isolation()
    subprocess.run(
        [*(words or []), sys.executable, "-I", __file__, "open" if words is None else "isolated"],
        cwd=place / "work",
        env=environment,
        check=True,
        timeout=5 * PATIENCE,
    )
    return place


@pytest.fixture
def seen(place: Path) -> Any:
    """What the commands said, and what the kernel counted."""
    return json.loads((place / "work" / "seen.json").read_text())


@pytest.mark.parametrize("name", [*COMMANDS, "tensorboard"])
def test_every_command_works_without_a_network(name: str, seen: dict[str, Any]) -> None:
    if not seen["isolated"]:
        pytest.skip("no network namespace is permitted here (unshare -rn, unshare -n)")
    assert seen["lost"], "the namespace has a way out, so that it shows nothing"
    found = seen["commands"][name]
    assert found["status"] == 0, found["said"]
    if name == "tensorboard":
        assert "<tb-webapp" in found["answers"][""]
        assert {"run", "run/curves/stage-1", "run/curves/pipeline"} <= {
            run.removeprefix("./") for run in json.loads(found["answers"]["data/runs"])
        }


def test_no_compiled_code_tries_to_leave(seen: dict[str, Any]) -> None:
    if not seen["counts"]:
        pytest.skip("no network namespace is permitted here, or its kernel does not count packets without a route")
    assert seen["tried"] == 0


def test_nothing_is_looked_up_or_connected_to(place: Path, seen: dict[str, Any]) -> None:
    assert all(found["status"] == 0 for found in seen["commands"].values()), seen["commands"]
    assert notes(place, "network") == []


def test_no_tip_sells_anything(place: Path, seen: dict[str, Any]) -> None:
    """Lightning recommends its company's services in the log of every Trainer."""
    said = {name: found["said"] for name, found in seen["commands"].items()}
    said["train.log"] = (place / "work/outputs/run/train.log").read_text()
    for name, text in said.items():
        assert not re.search(r"Tip:|litlogger|litmodels|lightning\.ai|💡", text), name


def test_the_hook_sees_an_attempt(tmp_path: Path) -> None:
    """Or an empty file would say nothing. The look-up is of a number, for which nobody is asked."""
    code = "import socket; socket.getaddrinfo('192.0.2.1', 9, flags=socket.AI_NUMERICHOST); open('here', 'w')"
    environment = surroundings(tmp_path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "work", env=environment, check=True)
    assert [line.rpartition(": ")[2] for line in notes(tmp_path, "network")] == ["socket.getaddrinfo 192.0.2.1"]
    assert [line.rpartition(": ")[2] for line in notes(tmp_path, "written")] == [str(tmp_path / "work" / "here")]


def test_nothing_is_written_elsewhere(place: Path) -> None:
    """The list of fonts is matplotlib's, which every program that draws with it shares."""
    fonts = re.compile(r"\.(cache|config)/matplotlib/")
    assert {path for path in tree(place / "home") if not fonts.match(path)} == set()
    rest = tree(place / "work") - {"queries.npy", "seen.json"}
    allowed = ("outputs/run/", "outputs/cache/", "outputs/comparison/")
    assert {path for path in rest if not path.startswith(allowed)} == {"outputs/a.jsonl", "outputs/keys.npy"}
    allowed = tuple(str(place / name) + "/" for name in ("home", "work", "temporary"))
    assert [line for line in notes(place, "written") if not line.rpartition(": ")[2].startswith(allowed)] == []


def test_a_home_that_nobody_can_write_into_is_enough(tmp_path: Path) -> None:
    """As containers and services have it; not even root can make a folder below a device."""
    environment = surroundings(tmp_path, HOME="/dev/null")
    done = subprocess.run(
        [sys.executable, "-m", *TRAIN, "stage=attention"],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "work/outputs/run/projector_config.pbtxt").exists()  # drawn, among the last things written
    assert notes(tmp_path, "network") == []
    allowed = tuple(str(tmp_path / name) + "/" for name in ("work", "temporary"))
    assert [line for line in notes(tmp_path, "written") if not line.rpartition(": ")[2].startswith(allowed)] == []


if __name__ == "__main__":
    session(isolated=sys.argv[1] == "isolated")
