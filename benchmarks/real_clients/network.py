# SPDX-License-Identifier: MIT
"""A network namespace with nothing but loopback, for what must not reach anything else."""

import fcntl
import os
import shutil
import socket
import struct
import subprocess

_MARK = "TOKENSPEED_CLIENTS_ALONE"
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1


def wrapper() -> list[str] | None:
    """What to put before a command so that it runs alone; None if that is not permitted."""
    if shutil.which("unshare") is None:
        return None
    tried = subprocess.run(["unshare", "-rn", "true"], capture_output=True)
    return None if tried.returncode else ["env", f"{_MARK}=1", "unshare", "-rn"]


def is_alone() -> bool:
    """Whether this process was started by `wrapper()`."""
    return os.environ.get(_MARK) == "1"


def raise_loopback() -> None:
    """A new namespace's loopback is down. `OSError` if it cannot be raised."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        given = fcntl.ioctl(one, _GET_FLAGS, struct.pack("16sH14x", b"lo", 0))
        flags = struct.unpack("16sH14x", given)[1] | _UP
        fcntl.ioctl(one, _SET_FLAGS, struct.pack("16sH14x", b"lo", flags))
