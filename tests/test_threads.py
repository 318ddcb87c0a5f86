"""Work on a thread that the end of the process hardly waits for."""

from __future__ import annotations

import signal
import sys

import pytest

from allranks.base.threads import in_thread
from helpers import Started, execute, only_long

# Draws digits for minutes, after it has said that it is there.
DRAWS = (
    "data=synthetic",
    "data.train.count=3000000",
    "data.split=[2999900,100]",
    "device=cpu",
    "model=linear",
)

# The tests may run in the background of a script, where a shell has SIGINT ignored.
HEARS_SIGINT = (
    "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def test_what_it_returns_or_raises_comes_to_whoever_asks():
    assert in_thread(lambda: 7, "seven").result() == 7
    with pytest.raises(KeyError, match="gone"):
        in_thread(lambda: {}["gone"], "none").result()


SLOWLY_FREED = """
import sys, time
from allranks.base.threads import in_thread

class Weights:
    def __del__(self):
        time.sleep(0.2)
        print("freed", flush=True)

def save(weights):
    time.sleep(0.3)  # the main thread has let go of what it has given to in_thread()

"""


@pytest.mark.parametrize("waits", [True, False], ids=["for the result", "for nothing"])
def test_what_a_thread_works_on_is_freed_before_the_process_ends(waits, tmp_path):
    """Tensors that are freed while Python shuts down abort the process, whose exit code is another then."""
    begin = "done = in_thread(lambda weights=Weights(): save(weights), 'save')\n"
    then = "done.result()\nprint('saved', flush=True)\n" if waits else ""
    done = execute([sys.executable, "-c", SLOWLY_FREED + begin + then + "sys.exit(7)"], tmp_path)
    assert (done.code, done.err) == (7, "")
    assert done.out.splitlines() == ["freed", *(["saved"] if waits else [])]


def test_the_end_of_the_process_does_not_wait_for_it():
    code = (
        "import sys, time\nfrom allranks.base.threads import in_thread\n"
        "in_thread(lambda: time.sleep(600), 'sleeps')\nsys.exit(7)"
    )
    with Started([sys.executable, "-c", code]) as started:
        assert started.finish(within_s=60)[0] == 7


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, -15), only_long(signal.SIGINT, 130)])
def test_a_signal_ends_a_start_that_waits_for_its_data(tmp_path, signum, code):
    """There is nothing to save yet, and the data may come from a file system that hangs."""
    training = ["-um", "allranks.train", *DRAWS, f"run.dir={tmp_path}/run"]
    with Started([sys.executable, "-c", HEARS_SIGINT, *training]) as started:
        started.process.stdout.readline()  # the run's title: torch is there, the data are not
        started.process.send_signal(signum)
        assert started.finish(within_s=20)[0] == code
    assert not (tmp_path / "run").exists()
