"""What rank 0 and the commands show: on a terminal of any width, and in a job's log."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from allranks.base import terminal
from allranks.base.errors import as_line
from allranks.launch.console import Console
from allranks.training import story
from allranks.training.console import DisplayHandler
from allranks.training.display import Display, Moment, Pace, bar_text
from helpers import (
    PYTHON,
    SMALL,
    TRAIN,
    Run,
    clean_environment,
    execute,
    execute_forked,
    forked_python,
    only_long,
)

pyte = pytest.importorskip("pyte", reason="pyte, a terminal without a screen, is missing: pip install pyte")

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
BAR = re.compile(r"epoch \d+/\d+  [━─#-]+")


class Terminal:
    """A command at a real pseudo-terminal, and a screen on which one can look at what it shows."""

    def __init__(
        self, argv: Sequence[str], cwd: Path, columns: int, rows: int = 40, **environ: str
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(argv[0], list(argv), clean_environment(**{"TERM": "xterm-256color", **environ}))
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int = 40) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def read(self, within_s: float = 0.1) -> bool:
        """Takes in what was written meanwhile; False at the end."""
        if not select.select([self.fd], [], [], within_s)[0]:
            return True
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:  # how a pseudo-terminal says that the command has ended
            return False
        self.written += data
        self.stream.feed(data)
        return bool(data)

    def until(self, pattern: str, within_s: float = 120) -> re.Match[str]:
        """Waits until the screen shows this; fails where it does not."""
        ends_at = time.monotonic() + within_s
        while time.monotonic() < ends_at:
            found = re.search(pattern, "\n".join(self.shown()), flags=re.M)
            if found:
                return found
            if not self.read():
                break
        shown = "\n".join(self.shown())
        found = re.search(pattern, shown, flags=re.M)
        assert found, shown
        return found

    def ended(self) -> int:
        """Waits for the end; the exit code."""
        while self.read(60):
            pass
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def shown(self) -> list[str]:
        """The lines on the screen and those that have gone up, without blanks at their ends."""
        gone = [
            "".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top
        ]
        lines = [line.rstrip() for line in [*gone, *self.screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.fd)


def trained(cwd: Path, columns: int, *overrides: str, **environ: str) -> Terminal:
    """A training of three epochs at a terminal, to its end."""
    command = [forked_python(), "-m", "allranks.train", *SMALL, "trainer.epochs=3", *overrides]
    with Terminal(command, cwd, columns, **environ) as shown:
        assert shown.ended() == 0, shown.shown()
    return shown


def only_run(below: Path) -> Run:
    [config] = below.rglob("config.yaml")
    return Run(config.parent)


# --- rank 0 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, only_long(200)])
def test_a_terminal_shows_what_a_log_has(tmp_path, columns):
    """The same words in the same order; lines fit, and a wide window is not filled."""
    shown = trained(tmp_path, columns, "name=" + "x" * 5)
    lines = shown.shown()
    run = only_run(tmp_path)
    logged = [
        re.sub(r"^\S+ \S+ INFO allranks: ", "", line)
        for line in (run.path / "logs/rank-0.log").read_text().splitlines()
    ]
    assert max(map(len, lines)) <= min(columns, terminal.MOST_COLUMNS)
    if columns == 200:  # nothing needs to be wrapped or left out
        assert [line for line in lines if line] == logged
    else:
        assert letters_outside_the_table(lines) == letters_outside_the_table(logged)


def letters_outside_the_table(lines: Sequence[str]) -> str:
    """All but the table of epochs, some of whose columns a narrow window leaves out; without blanks.

    A command is not wrapped, so that it can be copied: a terminal breaks it anywhere.
    """
    others = [line for line in lines if not re.match(r" +(\d/3|epoch) ", line)]
    return "".join("".join(others).split())


@pytest.mark.parametrize("columns", [only_long(60), 80])
def test_the_table_of_a_narrow_window_has_whole_lines_and_the_numbers_of_the_records(tmp_path, columns):
    lines = trained(tmp_path, columns).shown()
    header = next(line for line in lines if line.lstrip().startswith("epoch"))
    titles = re.split(r"\s{2,}", header.strip())
    assert len(header) <= columns
    assert ("time" in titles) == (columns == 80)
    for metrics in only_run(tmp_path).metrics:
        [line] = [line for line in lines if line.lstrip().startswith(f"{metrics['epoch']}/3 ")]
        cells = dict(zip(titles, line.split(), strict=False))
        assert cells["train loss"] == f"{metrics['train/loss']:.4f}"
        assert cells["train %"] == f"{metrics['train/accuracy']:.2f}"
        assert cells["val loss"] == f"{metrics['val/loss']:.4f}"
        assert cells["val %"] == f"{metrics['val/accuracy']:.2f}"
        assert line.index(cells["val loss"]) + len(cells["val loss"]) == header.index("val loss") + 8


def test_a_bar_is_drawn_and_nothing_is_left_of_it(tmp_path):
    shown = trained(tmp_path, 100)
    drawn = COLOURS.sub("", shown.written.decode())
    assert re.search(r"epoch 1/3  [━─]+ +\d+ %", drawn)
    assert "evaluating" in drawn
    assert not [line for line in shown.shown() if "━" in line or "evaluating" in line]
    assert COLOURS.search(shown.written.decode())
    assert b"\x1b[?25l" not in shown.written  # the cursor is never hidden: a rank may be killed at any time


def test_the_bar_tells_speed_and_time_left(tmp_path):
    words = ["data.train.count=41200", "data.split=[40800,400]", "trainer.batch_size=8"]
    with Terminal([*TRAIN, *SMALL, *words, "trainer.epochs=3"], tmp_path, 100) as shown:
        shown.until(r"epoch 1/3  [━─]+ +\d+ %  [\d,]+ samples/s  left: epoch \d+:\d\d, run \d+:\d\d")
        shown.resize(60)
        shown.until(r"^  epoch 1/3  [━─]+ +\d+ %  [\d,]+/s  left: \d+:\d\d, run \d+:\d\d$")


OWN = """
import time, allranks
run = allranks.open("own", device="cpu", threads=1, report=False)
def train(epochs):
    for epoch in run.epochs(epochs):
        for batch in run.steps([[1.0, 2.0]] * 40):
            time.sleep(0.01)
train(2)
train(3)
run.finish()
"""


def test_the_bar_of_a_loop_of_ones_own_tells_what_is_known_of_it(tmp_path):
    """No speed, no test set; and the number of epochs that it has named last."""
    with Terminal([forked_python(), "-c", OWN], tmp_path, 100) as shown:
        assert shown.ended() == 0
    drawn = COLOURS.sub("", shown.written.decode())
    assert re.search(r"epoch 1/2  [━─]+ +\d+ %  left: epoch \d+:\d\d, run \d+:\d\d", drawn)
    assert re.search(r"epoch 3/3  [━─]+", drawn)
    for wrong in ("samples/s", "test set", "3/2"):
        assert wrong not in drawn
    assert [line.split()[0] for line in shown.shown() if "/3 " in line] == ["3/3"]


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, only_long({"TERM": "dumb"})], ids=str)
def test_no_colours_where_none_are_wanted(tmp_path, environ):
    shown = trained(tmp_path, 100, **environ)
    assert not COLOURS.search(shown.written.decode())
    if "TERM" in environ:  # such a terminal obeys nothing at all
        assert b"\x1b" not in shown.written
        assert not BAR.search(shown.written.decode())


def test_a_print_of_a_users_own_stands_above_the_bar(tmp_path):
    """As of a model that prints: the line is whole, and the bar goes on below it."""
    (tmp_path / "chatty.py").write_text(
        "import time, torch\nclass Chatty(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.n = 0\n"
        "        self.layer = torch.nn.Linear(784, 10)\n"
        "    def forward(self, x):\n        self.n += 1\n"
        "        if self.n % 5 == 0: print('said', self.n, flush=True); time.sleep(0.2)\n"
        "        return self.layer(x.flatten(1))\n"
    )
    without = [f"~model.{key}" for key in ("widths", "activation", "dropout", "input_shape", "classes")]
    own = ["model._target_=chatty.Chatty", *without]
    shown = trained(tmp_path, 100, *own, PYTHONPATH=str(tmp_path))
    said = [line for line in shown.shown() if "said" in line]
    assert len(said) >= 6
    assert all(re.fullmatch(r"said \d+", line) for line in said)


def test_quiet_shows_the_last_line_and_verbose_what_each_rank_does(tmp_path):
    quiet, loud = tmp_path / "quiet", tmp_path / "loud"
    quiet.mkdir()
    loud.mkdir()
    done = execute_forked(["-m", "allranks.train", "-q", *SMALL, "trainer.epochs=1"], 1, quiet).ok()
    run = only_run(quiet)
    test = f"loss {run.summary['test/loss']:.4f}, accuracy {run.summary['test/accuracy']:.2f} %"
    assert done.out == f"test {test} of 400 examples; in {run.path.relative_to(quiet)}\n"
    assert done.err == ""
    assert " 1/1 " in (run.path / "logs/rank-0.log").read_text()  # the log has it all

    launch = [forked_python(), "-m", "allranks", "launch", "-n", "2", "--no-preflight", "-v"]
    done = execute([*launch, *SMALL, "trainer.epochs=1"], loud).ok()
    assert "checkpoint of step 10 saved in" in done.out
    assert "rank 0 of 2: process" in done.out
    assert re.search(r"^\[rank 1 on .*\] rank 1 of 2: process", done.err, flags=re.M)
    assert "mpiexec" in done.out.partition("Training")[0]  # the plan


@pytest.mark.long
def test_quiet_and_verbose_may_change_when_a_run_goes_on(tmp_path):
    run = ["-m", "allranks.train", *SMALL, "trainer.epochs=1", "run.dir=mine"]
    execute_forked([*run, "-q"], 1, tmp_path).ok()
    assert "finished already" in execute_forked([*run, "-v"], 1, tmp_path).ok().out
    assert "console: quiet" in (tmp_path / "mine/config.yaml").read_text()


def test_a_sweeps_cells_are_not_called_by_q(tmp_path):
    words = ["-m", "allranks.train", "-q", "-m", *SMALL, "trainer.epochs=0", "seed=1,2"]
    done = execute_forked(words, 1, tmp_path).ok()
    [cells] = tmp_path.rglob("cells.jsonl")
    assert "console" not in cells.read_text()
    assert "ranks  " not in done.out


@pytest.mark.long
def test_a_launched_quiet_training_says_one_line(tmp_path):
    launch = [PYTHON, "-m", "allranks", "launch", "-n", "2", "-q"]
    done = execute([*launch, *SMALL, "trainer.epochs=1"], tmp_path).ok()
    assert len(done.out.splitlines()) == 1
    assert done.err == ""
    refused = execute([*launch, "--run", "runs"], tmp_path)
    assert "-q cannot be given with --run" in refused.message


# --- words and columns --------------------------------------------------------------------------------


def metrics(epoch: int, val_loss: float, lr: float = 0.05) -> dict[str, float | int]:
    return {
        "epoch": epoch, "step": epoch * 10, "lr": lr, "train/loss": 0.5, "train/accuracy": 100.0,
        "val/loss": val_loss, "val/accuracy": 90.0, "time/train_s": 1.0, "time/eval_s": 0.5,
        "throughput/samples_per_s": 123456.7,
    }  # fmt: skip


@pytest.mark.parametrize("columns", [None, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("epochs", [1, 20, 300, 4000])
def test_rows_are_as_wide_as_their_header_and_fit(columns, epochs):
    table = story.Table(epochs, "val/loss")
    table.add(metrics(1, 0.5))
    header = table.header(columns)
    for values in (metrics(epochs, 0.5), metrics(1, 1234567.0, lr=1.23456e-5), metrics(1, float("nan"))):
        assert len(table.row(values, False, columns)) <= len(header)
    assert columns is None or len(header) <= max(columns, 52 + 2 * len(str(epochs)))
    assert header.split()[0] == "epoch" and "val loss" in header


@pytest.mark.parametrize(
    ("argv", "ranks", "launcher", "launched", "command"),
    [
        (["t.py", "model=cnn", "run.dir=old"], 1, "none", False, "allranks train model=cnn run.dir='a b'"),
        (["t.py", "model=cnn", "++run.dir=x"], 1, "none", False, "allranks train model=cnn run.dir='a b'"),
        (["t.py", "--frozen", "x", "y"], 4, "mpich", True, "allranks launch -n 4 --run 'a b'"),
        (["t.py", "--frozen", "x", "y"], 1, "none", True, "allranks launch -n 1 --run 'a b'"),
        (["t.py", "model=cnn"], 4, "mpich", False, "the same command again, with run.dir='a b'"),
        (["t.py", "-m", "seed=1,2"], 1, "none", False, "the same command again, with the same run.dir"),
    ],
)
def test_what_to_type_so_that_a_stopped_run_goes_on(argv, ranks, launcher, launched, command):
    assert story.going_on("a b", argv, ranks, launcher, launched) == command


def test_what_goes_on_with_a_job_of_submit():
    said = story.going_on_in_a_job("/a b")
    assert said.startswith("allranks submit --cell '/a b'   (unless")


def test_ranks_and_launchers_in_words():
    assert story.who_trains(1, 1, "cuda", 8) == "1, on a GPU (cuda)"
    assert story.who_trains(12, 3, "cpu", 1) == "12 on 3 hosts, each on the CPU with 1 thread"
    said = story.how_they_work_together("torchrun", "ezpz", "nccl")
    assert said == "torchrun; ezpz connects them, NCCL adds up their gradients"
    assert (
        story.name_of({"_target_": "allranks.data.mnist.load", "name": "fashion_mnist"}) == "fashion_mnist"
    )
    assert story.name_of({"_target_": "allranks.data.synthetic.generate"}) == "synthetic"
    assert story.name_of({"_target_": "mine.models.Wide"}) == "Wide"
    arrays = {"_target_": "allranks.data.arrays.load"}
    for path in ("/a/table/x.npz", ["table/x.npy", "other/y.npy"], {"x": "table/x.npy"}):
        assert story.name_of({**arrays, "path": path}) == "table"
    assert story.name_of({**arrays, "path": "/x.npy"}) == "arrays"


@pytest.mark.parametrize("columns", [20, 40, 60, 61, 80, 100, 200])
@pytest.mark.parametrize("is_unicode", [True, False])
def test_a_bar_fits_into_every_window(columns, is_unicode):
    now = Moment(999, 1000, 5000, 9999, 1_234_567.8, 86_399, 400_000)
    text = bar_text(now, columns, is_unicode, shows_colours=False)
    assert len(text) < columns
    assert text.isascii() != is_unicode
    assert len(COLOURS.sub("", bar_text(now, columns, is_unicode, shows_colours=True))) == len(text)
    assert text.startswith("  epoch 999/1000"[: columns - 1])


def test_lines_of_rank_0_and_of_other_ranks_stand_above_the_bar():
    """Under `allranks launch` all of it comes to one terminal, and only rank 0 knows of its bar."""
    screen = pyte.Screen(60, 10)
    stream = pyte.ByteStream(screen)
    console = Console(lambda _, data: stream.feed(data.replace(b"\n", b"\r\n")))
    written = io.StringIO()
    display = Display(written)

    def show() -> None:
        console.show(0, "n1", "out", written.getvalue().encode())
        written.seek(0)
        written.truncate()

    def lines() -> list[str]:
        return [line.rstrip() for line in screen.display if line.strip()]

    display.write_line("Training")
    display.draw("a bar of many words")
    show()
    assert lines() == ["Training", "a bar of many words"]
    console.show(1, "n2", "err", b"a fault\n")
    assert lines() == ["Training", "[rank 1 on n2] a fault"]
    display.draw("a bar")
    show()
    display.write_line("a row")
    show()
    assert lines() == ["Training", "[rank 1 on n2] a fault", "a row", "a bar"]
    for number in range(12):  # the terminal scrolls, and the bar stays the last line
        display.write_line(f"row {number}")
    show()
    assert lines()[-2:] == ["row 11", "a bar"]
    display.clear()
    show()
    assert lines()[-1] == "row 11"


def test_the_pace_is_that_of_the_last_seconds():
    pace = Pace(step=10, now_s=100.0)
    assert pace.step_s is None
    pace.note(20, 110.0)
    assert pace.step_s == 1.0
    for second in range(111, 131):
        pace.note(20 + 10 * (second - 110), second)
    assert pace.step_s == pytest.approx(0.1)


# --- messages -----------------------------------------------------------------------------------------


def test_durations():
    assert [terminal.short_duration(s) for s in (0, 7.4, 760, 11_100, 360_000)] == [
        "0:00", "0:07", "12:40", "3:05:00", "4 d 04 h",
    ]  # fmt: skip
    assert [terminal.duration(s) for s in (5.49, 252, 11_100)] == ["5.5 s", "4 min 12 s", "3 h 05 min"]


COMMANDS = {
    "train": ["train", "optimiser=adam", *SMALL],
    "launch": ["launch", "optimiser=adam"],
    "submit": ["submit", "--machine", "polaris", "optimiser=adam"],
    "runs": ["runs", "nowhere"],
    "cancel": ["cancel", "nowhere"],
    "checkpoint": ["checkpoint", "list", "nowhere"],
    "data": ["data", "verify", "--root", "nowhere"],
    "an option that there is not": ["runs", "--no-such-option"],
    "a command that there is not": ["lanuch"],
    "no argument": ["logs"],
}


QUICK = ("train", "launch", "no argument")


@pytest.mark.parametrize(
    "command", [command if command in QUICK else only_long(command) for command in COMMANDS]
)
def test_an_error_looks_the_same_everywhere(tmp_path, command):
    """One form: in a file a plain line, at a terminal wrapped by words, its first word coloured."""
    argv = [PYTHON, "-m", "allranks", *COMMANDS[command]]
    plain = execute(argv, tmp_path)
    assert plain.code == 2
    assert plain.out == ""
    assert plain.err == f"{plain.message}\n"
    with Terminal(argv, tmp_path, 60) as shown:
        assert shown.ended() == 2
    lines = shown.shown()
    assert " ".join(" ".join(lines).split()) == plain.message
    assert all(len(line) <= 60 or " " not in line.strip() for line in lines)
    assert b"\x1b[1;31mallranks\x1b[0m:" in shown.written
    with Terminal(argv, tmp_path, 60, NO_COLOR="1") as shown:
        assert shown.ended() == 2
    assert not COLOURS.search(shown.written.decode())


def test_long_words_stay_whole_when_a_message_is_wrapped():
    path = "/lus/flare/projects/" + "x" * 80
    text = terminal.wrapped(f"allranks: {path} cannot be read: give another one.", 60, indent="    ")
    assert path in text
    assert [line for line in text.splitlines() if len(line) > 60] == [f"    {path}"]


def test_in_a_file_a_message_is_one_line(tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert as_line("x " * 200, file.fileno()) == "allranks: " + "x " * 200 + "\n"


# A training whose console knows ASCII only.
ASCII = """
import sys
from allranks import train
sys.stdout.reconfigure(encoding="ascii")
train.main()
"""


def test_a_character_that_the_console_does_not_know_is_shown_escaped(tmp_path):
    words = [*SMALL, "model=linear", "trainer.epochs=1", "run.dir='tägliche'"]
    done = execute_forked(["-c", ASCII, *words], 1, tmp_path, timeout_s=60).ok()
    assert done.err == ""
    assert f"directory   {tmp_path}/t\\xe4gliche" in done.out
    log = (tmp_path / "tägliche/logs/rank-0.log").read_text(encoding="utf-8")
    assert f"directory   {tmp_path}/tägliche" in log


def test_a_log_line_that_cannot_be_formatted_does_not_end_a_training(capsys):
    handler = DisplayHandler(Display(io.StringIO()), shows_story=True)
    handler.emit(logging.makeLogRecord({"msg": "%d files", "args": ("no number",), "levelno": 30}))
    assert "Logging error" in capsys.readouterr().err


def test_what_no_work_depends_on_may_be_said_to_a_full_disk(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:  # noqa: PTH123
        monkeypatch.setattr("sys.stdout", full)
        terminal.say("the page is there")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what it still holds goes there
