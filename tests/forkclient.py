"""In the place of `python` on the command line of a launcher: a process that need not import torch.

    PYTHON -IS tests/forkclient.py SOCKET EXECUTABLE WORDS...

It has tests/forkserver.py, at that socket, fork a process that does what `PYTHON WORDS` would do, with the
open files, environment and folder of this one. Until that process ends, this one passes signals on to it;
then it ends in the same way. Whatever that process starts by `sys.executable` is started by EXECUTABLE, the
file that called this one (`helpers.ForkedPython`).

A launcher, or a guard, that starts this process and waits for it notices no difference. But another process
computes. So a test that stops, traces or looks at the process that was started needs a real one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

PASSED_ON = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT,
)  # fmt: skip


def open_files() -> list[int]:
    """The numbers of the files that this process was given."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:  # that of the listing itself
            continue
    return found


def main() -> None:
    path, executable, *words = sys.argv[1:]
    python = sys.executable
    unbuffered = words[:1] == ["-u"]
    what = words[1:] if unbuffered else words
    has_options = not what or (what[0].startswith("-") and what[0] not in ("-m", "-c"))
    # A guard imports no torch, and watches the process that it starts. What makes a page at the end of a
    # run ends with its parent, so it has to be a child of it.
    if has_options or what[:2] == ["-m", "allranks.launch.guard"] or "--at-end-of" in what:
        os.execv(python, [python, *words])
    files = open_files()
    ignored = [
        number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN
    ]
    asked = {
        "words": what,
        "unbuffered": unbuffered,
        "environment": dict(os.environ),
        "cwd": os.getcwd(),  # noqa: PTH109
        "files": files,
        "cpus": sorted(os.sched_getaffinity(0)),
        "umask": os.umask(0o22),
        "ignored": ignored,
        "python": executable,
    }
    os.umask(asked["umask"])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = json.dumps(asked).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], files)
        server.sendall(request)
        for number in PASSED_ON:
            if number not in ignored:
                signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        answer = server.recv(16)
    code = int(answer) if answer else 1
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
