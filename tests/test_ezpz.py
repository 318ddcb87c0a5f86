"""ezpz: which package of that name is there, and the process groups that the real one makes.

That both runtimes give the same numbers is in test_curve.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from allranks.runtime import ezpz
from helpers import PYTHON, ROOT, SMALL, Done, execute, launcher

# The first lines of the metadata, as the packages have them.
METADATA = {
    "0.26.1": "Name: ezpz\nVersion: 0.26.1\nSummary: Distributed training, :lemon: `ezpz`.\n"
    "Project-URL: Documentation, https://saforem2.github.io/ezpz\n",
    "0.11.0": "Name: ezpz\nVersion: 0.11.0\nSummary: Distributed training, :lemon: `ezpz`.\n"
    "Author-email: Sam Foreman <saforem2@gmail.com>\n"
    "Requires-Dist: ambivalent @ git+https://github.com/saforem2/ambivalent\n",
    "0.1.2": "Name: ezpz\nVersion: 0.1.2\nSummary: Easy pan-zoom crop-resizing\n"
    "Home-page: https://github.com/pelmers/ezpz\nAuthor: Peter Elmers\n",
}
SITUATIONS = [
    ("0.26.1", ["distributed.py"], "real"),
    ("0.11.0", ["dist.py"], "too old"),
    ("0.1.2", ["main.py"], "impostor"),
    # on PYTHONPATH, and not installed
    (None, ["distributed.py", "dist.py"], "real"),
    (None, ["dist.py"], "too old"),
    (None, ["main.py"], "impostor"),
]


@pytest.mark.parametrize(("version", "files", "kind"), SITUATIONS)
def test_the_real_one_is_told_from_older_ones_and_from_another_of_that_name(tmp_path, version, files, kind):
    (tmp_path / "ezpz").mkdir()
    for file in ("__init__.py", *files):
        (tmp_path / "ezpz" / file).touch()
    if version:
        (tmp_path / f"ezpz-{version}.dist-info").mkdir()
        about = f"Metadata-Version: 2.1\n{METADATA[version]}\nhttps://example.com/saforem2\n"
        (tmp_path / f"ezpz-{version}.dist-info/METADATA").write_text(about)
    code = "from allranks.runtime import ezpz; print(*ezpz.installed(), sep='|')"
    # -S leaves out what this environment has installed.
    path = f"{tmp_path}:{ROOT / 'src'}"
    done = execute([PYTHON, "-S", "-c", code], tmp_path, {"PYTHONPATH": path}).ok()
    assert done.out == f"{kind}|{version}\n"


def test_each_that_cannot_be_used_is_refused_with_what_it_is_and_what_to_type(monkeypatch, caplog):
    said = {
        "too old": "the installed ezpz 0.11.0 is too old",
        "impostor": "is PyPI's image pan-zoom tool",
        "absent": "ezpz is not installed",
    }
    for kind, words in said.items():
        found = ezpz.Installation(kind, "0.11.0")
        monkeypatch.setattr(ezpz, "installed", lambda found=found: found)
        with pytest.raises(ezpz.UserError, match=words) as refused:
            ezpz.chosen("ezpz", rank=0)
        assert ezpz.INSTALL in str(refused.value)
        assert ezpz.chosen("native", rank=0) is False
        assert ezpz.chosen("auto", rank=0) is False
        assert (words in caplog.text) == (kind != "absent")  # which is no fault
        caplog.clear()
        ezpz.chosen("auto", rank=1)
        assert caplog.text == ""


# --- with the real one --------------------------------------------------------------------------------

# Says for each rank whether the ranks add up, and how MPI stands.
RANKS = """
import os, sys
from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.config import runtime_settings
from allranks.job.identity import discover
from allranks.runtime.bringup import open_runtime

[config] = from_command_line(["device=cpu", "threads=1", "runtime=ezpz"])
try:
    runtime = open_runtime(discover(os.environ), runtime_settings(config))
except UserError as error:
    print(error)
    sys.exit(error.code)
mpi = sys.modules.get("mpi4py.MPI")
started = mpi is not None and mpi.Is_initialized()
size = mpi.COMM_WORLD.size if started else 0
os.write(1, f"rank {runtime.rank}: {runtime.add_up([1.0])[0]:g} ranks, {size} in MPI\\n".encode())
runtime.close()
"""
TORCHRUN = launcher("torchrun", 2)


@pytest.fixture
def ranks(tmp_path: Path):
    """ranks(WORDS): what the ranks say that these words start."""
    if ezpz.installed().kind != "real":
        pytest.skip(f"ezpz is {ezpz.installed().kind} here; the real one: {ezpz.INSTALL}")
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)

    def run(words: Sequence[str], **environ: str) -> Done:
        return execute([*words, str(program)], tmp_path, environ)

    return run


def said(done: Done) -> list[str]:
    return sorted(line for line in done.out.splitlines() if line.startswith("rank "))


def test_mpi_started_by_its_launcher_has_all_ranks(ranks):
    done = ranks(launcher("mpiexec", 2)).ok()
    assert said(done) == ["rank 0: 2 ranks, 2 in MPI", "rank 1: 2 ranks, 2 in MPI"]


def test_under_torchrun_each_rank_is_alone_in_mpi(ranks):
    """ezpz asks MPI even there."""
    done = ranks(TORCHRUN).ok()
    assert said(done) == ["rank 0: 2 ranks, 1 in MPI", "rank 1: 2 ranks, 1 in MPI"]


def test_under_a_torchrun_that_mpiexec_has_started_too(ranks):
    """mpiexec knows of one process there: the ranks must not both take themselves for it."""
    done = ranks([*launcher("mpiexec", 1)[:-1], *TORCHRUN]).ok()
    assert said(done) == ["rank 0: 2 ranks, 1 in MPI", "rank 1: 2 ranks, 1 in MPI"]


@pytest.mark.parametrize("several", [False, True], ids=["alone", "torchrun"])
def test_on_hosts_where_ezpz_imports_mpi_by_itself(ranks, several):
    """Names that begin with x3 are Polaris's."""
    in_a_namespace = ["unshare", "--uts", "sh", "-c", 'hostname x3001c0s13b0n0; exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*in_a_namespace, "true"], check=False).returncode:
        pytest.skip("needs the right to name a host")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # By its address, as nobody knows a host of that name here.
    here = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", *here]
    done = ranks([*in_a_namespace, *(torchrun if several else [PYTHON])])
    expected = ["rank 0: 2 ranks, 1 in MPI", "rank 1: 2 ranks, 1 in MPI"]
    # Alone nothing is started: on a login node that would end the process.
    assert said(done) == (expected if several else ["rank 0: 1 ranks, 0 in MPI"]), done.err


def test_an_mpi_that_cannot_be_loaded_is_a_sentence(ranks, tmp_path):
    broken = tmp_path / "broken/mpi4py"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libmpi.so.12: cannot open shared object file')")
    done = ranks(TORCHRUN, PYTHONPATH=str(broken.parent))
    assert done.code == 1  # torchrun's own
    assert "runtime=ezpz: ezpz cannot be loaded (libmpi.so.12: cannot open shared" in done.out
    assert "or take runtime=native" in done.out


def test_a_training_says_what_brought_its_ranks_together(ranks, tmp_path):
    done = execute([*TORCHRUN, "-m", "allranks.train", *SMALL, "trainer.epochs=0"], tmp_path).ok()
    assert done.run.environment["runtime"] == "ezpz"
