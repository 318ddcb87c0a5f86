"""The options of `allranks launch` and `allranks submit`, in one table.

The command lines of both, the words by which a job script starts its `allranks launch`, what is kept of a
submission to be asked for again, and the keys of `hydra/launcher=allranks` all follow from this table.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allranks.base.errors import UserError
from allranks.base.files import with_home
from allranks.base.text import did_you_mean


@dataclass(frozen=True)
class Option:
    """An option. A command has it where there is a help text of it for that command.

    `metavar` is empty for a switch; `switched` is then the value that the switch stands for.
    """

    flag: str  # as it is typed
    name: str  # the name of its value in Python, in job.json and after `hydra.launcher.`
    metavar: str
    launch: str = ""  # help of `allranks launch`
    submit: str = ""  # help of `allranks submit`
    kind: type = str  # of the value
    least: int | None = None  # the smallest number that is valid
    switched: bool | str = True
    in_job: bool = False  # `allranks submit` hands it to the `allranks launch` of its job
    in_sweep: bool = False  # `hydra/launcher=allranks` has it for each job of a Hydra application


LAUNCHER = "auto|mpiexec|srun|flux|torchrun"

OPTIONS = (
    Option(
        "--machine", "machine", "M", in_job=True, in_sweep=True,
        launch="machine file to use; default: the one that fits this host",
        submit="machine file to use; default: the one that fits this host",
    ),
    Option(
        "--nodes", "nodes", "K", kind=int, least=1, in_sweep=True,
        launch="use the first K nodes",
        submit="nodes of the job, or chunks in a queue that deals in those; default: 1",
    ),
    Option(
        "-n", "ranks", "RANKS", kind=int, least=1, in_job=True, in_sweep=True,
        launch="ranks in all; default: as many as the hosts have room for",
        submit="ranks in all; default: as many as the machine file says",
    ),
    Option(
        "--ppn", "ppn", "P", kind=int, least=1, in_job=True, in_sweep=True,
        launch="ranks per node",
        submit="ranks per node",
    ),
    Option(
        "--launcher", "launcher", LAUNCHER, in_job=True, in_sweep=True,
        launch="the program that starts the ranks; auto: what the machine file says, or what is installed",
        submit="the program that starts the ranks; auto: what the machine file says, or what is installed",
    ),
    Option(
        "--walltime", "walltime", "HH:MM:SS", in_sweep=True,
        submit="how long the job may run",
    ),
    Option("--account", "account", "NAME", in_sweep=True, submit="the project or account that pays"),
    Option(
        "--queue", "queue", "Q", in_sweep=True,
        submit="queue, partition or QOS; default: what the machine file says",
    ),
    Option("--name", "name", "N", in_sweep=True, submit="the job's name; default: the run's"),
    Option(
        "--chain", "chain", "K", kind=int, least=1, in_sweep=True,
        submit="queue K jobs that run one after another in one run directory, and no further one",
    ),
    Option("--after", "after", "ID", submit="start after the job with this id has ended"),
    Option(
        "--cell", "cell", "DIR",
        submit="submit a cell of a sweep, or any run that was submitted, once more",
    ),
    Option(
        "--run", "run", "DIR",
        launch="(in job scripts) start what `allranks submit` has frozen in this run directory",
    ),
    Option(
        "--hosts", "hosts", "FILE",
        launch="a file with the hosts to use, one a line: `host`, `host:4` or `host slots=4`",
    ),
    Option(
        "--job-nodes", "job_nodes", "K", kind=int, least=1,
        launch="(in job scripts) start nothing if the job has got fewer than K nodes",
    ),
    Option(
        "--max-restarts", "max_restarts", "N", kind=int, least=0, in_job=True, in_sweep=True,
        launch="start the ranks again after a crash, up to N times; default: 0",
        submit="in the job: start the ranks again after a crash, up to N times; default: 0",
    ),
    Option(
        "--min-ranks", "min_ranks", "M", kind=int, least=1, in_job=True, in_sweep=True,
        launch="go on without a host that is gone, as long as M ranks are left",
        submit="in the job: go on without a host that is gone, as long as M ranks are left",
    ),
    Option(
        "--spares", "spares", "S", kind=int, least=0, in_job=True, in_sweep=True,
        launch="keep S of the nodes aside: one of them replaces a node that is gone",
        submit="in the job: keep S of the --nodes aside: one of them replaces a node that is gone",
    ),
    Option(
        "--idle", "idle", "SECONDS", kind=int, least=1, in_job=True, in_sweep=True,
        launch="end a program whose ranks neither write nor compute for so long, and say where they are",
        submit="in the job: end a program whose ranks neither write nor compute for so long",
    ),
    Option(
        "--start-within", "start_within", "SECONDS", kind=int, least=1, in_job=True, in_sweep=True,
        launch="how long all ranks together may take to start; default: 60, and 40 for the preflight",
        submit="in the job: how long all ranks together may take to start; default: 60",
    ),
    Option(
        "--grace", "grace", "SECONDS", kind=int, least=0,
        launch="how long the ranks may take to end after Ctrl-C or SIGTERM, before they are killed; "
        "default: 10 for a program, and for a training what its watchdog allows for a step and a save",
    ),
    Option(
        "--config-dir", "config_dir", "DIR", in_job=True, in_sweep=True,
        launch="a folder of your own with YAML files, such as machine/NAME.yaml or model/NAME.yaml",
        submit="a folder of your own with YAML files, such as machine/NAME.yaml or model/NAME.yaml",
    ),
    Option(
        "--no-preflight", "preflight", "", switched=False, in_job=True, in_sweep=True,
        launch="start at once, without checking the hosts first",
        submit="in the job: start at once, without checking the hosts first",
    ),
    Option(
        "-q", "console", "", switched="quiet",
        launch="show warnings, errors and the last line only",
        submit="in the job: show warnings, errors and the last line only",
    ),
    Option(
        "-v", "console", "", switched="verbose",
        launch="show more: the plan, each rank's start, each save, and the log lines of all ranks",
        submit="in the job: show more: the plan, ranks' starts, saves, and the log lines of all ranks",
    ),
    Option(
        "--next", "next", "DIR",
        submit="(in job scripts) queue the job that goes on with this run, now that it has stopped",
    ),
    Option(
        "--dry-run", "dry_run", "",
        launch="show the command line and every rank's place, and start nothing",
        submit="show the job script, the command line and every rank's place, and queue nothing",
    ),
    Option(
        "--json", "json", "",
        launch="with --dry-run: the same for programs",
        submit="print the answer for programs",
    ),
)  # fmt: skip


def parser(command: str, usage: str, description: str = "", examples: str = "") -> argparse.ArgumentParser:
    """The parser of `allranks launch` or `allranks submit`. An option that was not given is None.

    `--help` shows `usage` and `description` before the options, and `examples` after them. The last two are
    shown with the line breaks that they have.
    """
    made = argparse.ArgumentParser(
        prog=f"allranks {command}",
        usage=usage,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for option in OPTIONS:
        text = getattr(option, command)
        if not text:
            continue
        if option.metavar:
            made.add_argument(
                option.flag, dest=option.name, type=_reader(option), metavar=option.metavar, help=text
            )
        else:
            made.add_argument(
                option.flag, dest=option.name, action="store_const", const=option.switched, help=text
            )
    return made


def _reader(option: Option) -> Callable[[str], Any]:
    """From the word after an option to its value; raises argparse.ArgumentTypeError where it is none."""

    def read(word: str) -> Any:
        # A shell's variable that is not set gives an empty word: `--after "$ID"` must not start at once.
        if not word.strip():
            raise argparse.ArgumentTypeError(
                f"{word!r} is not valid: it is empty, so give {option.metavar}"
            )
        if option.metavar in ("DIR", "FILE"):  # no shell puts the home directory into --config-dir=~/conf
            return with_home(option.flag, word)
        try:
            return option.kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word} is not valid: give a whole number") from None

    return read


def parse(made: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the options of a command, the rest: overrides, Hydra's flags, `-- PROGRAM ARGS`).

    Raises UserError for an option that there is not, and for a number that is too small.
    """
    from allranks.compose import HYDRAS

    end = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        args, rest = made.parse_known_args(arguments[:end])
    except argparse.ArgumentError as error:
        raise UserError(
            f"{error.argument_name} {error.message}. `{made.prog} --help` explains the options."
        ) from None
    for flag in (word.partition("=")[0] for word in rest):
        if flag.startswith("--") and flag not in HYDRAS:
            known = re.findall(r"--[a-z-]+", made.format_help())
            raise UserError(f"{flag} is not an option of `{made.prog}`.{did_you_mean(flag, known)}")
    for option in OPTIONS:
        value = getattr(args, option.name, None)
        if value is not None and option.least is not None and value < option.least:
            raise UserError(f"{option.flag} {value} is not valid: give a whole number >= {option.least}.")
    return args, [*rest, *arguments[end:]]


def check_idle(idle: int | None, program: Sequence[str] | None) -> None:
    """Raises UserError if --idle is given for a training, which has a watchdog of its own."""
    if idle is not None and program is None:
        raise UserError(
            f"--idle {idle} is for a program after `--`: a training has a watchdog of its own, with "
            "watchdog.step_s=SECONDS and other limits."
        )


def console_words(console: str | None) -> list[str]:
    """-q, -v or nothing, for the value that the option `console` has."""
    return [option.flag for option in OPTIONS if option.name == "console" and option.switched == console]


def words(options: Iterable[Option], values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give `options` the values they have in `values`.

    None, and a switch that is not switched, give no word.
    """
    found: list[str] = []
    for option in options:
        value = values.get(option.name)
        if value is None:
            continue
        if option.metavar:
            found += [option.flag, str(value)]
        elif value == option.switched:
            found.append(option.flag)
    return found


def split(rest: Sequence[str]) -> tuple[list[str], list[str], tuple[str, ...] | None]:
    """(overrides, machine.key=value overrides, program or None) from what stands after the options."""
    before = list(rest[: rest.index("--")]) if "--" in rest else list(rest)
    machine_overrides = [word for word in before if word.startswith("machine.")]
    overrides = [word for word in before if not word.startswith("machine.")]
    for word in overrides:
        if word.startswith("machine="):
            raise UserError(f"{word} is no override: write --machine {word.removeprefix('machine=')}.")
    if "--" not in rest:
        return overrides, machine_overrides, None
    program = tuple(rest[len(before) + 1 :])
    if overrides:
        raise UserError(
            f"{overrides[0]} stands before `--`, where only options and machine.key=value may: "
            "put the program and its arguments after `--`."
        )
    if not program:
        raise UserError("No program stands after `--`: write `-- python my_train.py`.")
    return [], machine_overrides, program
