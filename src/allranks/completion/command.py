"""`allranks completion SHELL`: what the TAB key offers, in bash, zsh and fish. No torch.

The shell's script is short and never changes: at each TAB it asks `allranks completion --line LINE`, which
prints one candidate a line. The candidates come from the commands' own parsers, from the configuration's
own keys and from the folders that are there. So they cannot differ from what the commands take.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError

Main = Callable[[list[str]], object]  # a command: it reads its own words

SHELLS = ("bash", "zsh", "fish")
TRAINING = ("train", "launch", "submit")  # commands that take overrides in Hydra's grammar
USING = ("predict", "evaluate", "export")  # commands that take overrides of data, device and threads
CONFIG = "config.yaml"  # a directory that has one is a run's
MOST_FOLDERS = 2_000  # the most that are searched, so that an answer comes within a second
DEPTH = 4  # folders below the present one in which runs are looked for: runs/NAME/TIME/CELL


class _Parser(Exception):
    """Carries a command's parser out of the command, at the moment when it would read its words."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def main(arguments: Sequence[str], commands: Mapping[str, Callable[[], Main] | None]) -> int:
    """Runs `allranks completion` with these arguments and returns 0.

    `commands` are all commands by name. Each value is a function that imports the command and returns its
    main function. It is None for `train`, whose command line is read by Hydra and not by argparse.
    """
    parser = argparse.ArgumentParser(
        prog="allranks completion",
        description="What the TAB key offers after `allranks`. Put a line into your shell's file:",
        epilog='bash, in ~/.bashrc:  eval "$(allranks completion bash)"\n'
        'zsh, in ~/.zshrc:    eval "$(allranks completion zsh)"     (after compinit)\n'
        "fish, in ~/.config/fish/config.fish:  allranks completion fish | source",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", nargs="?", choices=SHELLS)
    parser.add_argument("--line", help=argparse.SUPPRESS)  # what is typed so far
    options = with_our_errors(parser).parse_args(arguments)
    if options.line is not None:
        print("".join(f"{each}\n" for each in candidates(options.line, commands)), end="")
        return 0
    if options.shell is None:
        raise UserError(f"Name the shell: `allranks completion {'|'.join(SHELLS)}`.")
    script = Path(__file__).with_name(f"allranks.{options.shell}")
    print(script.read_text(), end="")
    return 0


def candidates(line: str, commands: Mapping[str, Callable[[], Main] | None]) -> list[str]:
    """What the last word of this command line may become, in order.

    The list is empty where the shell should offer the names of files.
    """
    words, current = _words_of(line)
    _, *before = words or [""]
    if not before:
        return _beginning_with(current, [*sorted(commands), "--help", "--version"])
    command, *given = before
    if command == "completion":
        return _beginning_with(current, SHELLS)
    if command not in commands or "--" in given:  # after `--` stand a program and its arguments
        return []
    found: list[str] = []
    load = commands[command]
    parser = None if load is None else _parser_of(load())
    if parser is not None:
        place = _place(parser, given)
        if place.option is not None:
            return _beginning_with(current, _values(place.option))
        found += _options_and_choices(place, current)
        if place.wants_a_run and not current.startswith("-"):
            found += runs(current)
        elif command in USING and current:  # with nothing typed yet, files are offered: images
            found += _overrides(current, ("data", "device", "threads"))
    if command in TRAINING:
        found += _hydra_flags(current) if command == "train" else []
        found += _overrides(current, ("",))
    return found


def _words_of(line: str) -> tuple[list[str], str]:
    """The words of a line before its last one, and that last one, which may be empty; without quotes."""
    ends_with_blank = line[-1:].isspace() and not line[:-1].endswith("\\")
    # A quote that is still open belongs to the last word, with the blanks after it.
    for quote in ("", '"', "'"):
        with suppress(ValueError):
            words = shlex.split(line + quote)
            ends_with_blank = ends_with_blank and not quote
            break
    else:
        words = line.split()
    if not words or ends_with_blank:
        return words, ""
    return words[:-1], words[-1]


def _beginning_with(current: str, known: Iterable[str]) -> list[str]:
    return [word for word in known if word.startswith(current)]


# --- from a command's parser -----------------------------------------------------------------------------


def _parser_of(command: Main) -> argparse.ArgumentParser | None:
    """The parser with which a command reads its words; None if it has none.

    A command makes its parser only when it is called. So this function calls the command, and stops it at
    the moment when it lets the parser read.
    """

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Parser(parser)

    # Every way to read words with argparse calls this method. It is replaced by stop() for the moment.
    read = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[assignment,method-assign]
    try:
        command([])
    except _Parser as found:
        return found.parser
    except UserError:
        return None
    finally:
        argparse.ArgumentParser.parse_known_args = read  # type: ignore[method-assign]
    return None


class _Place(NamedTuple):
    """Where in a command's words the word stands that is to be completed."""

    parser: argparse.ArgumentParser  # of the command, or of its subcommand
    option: argparse.Action | None  # the option whose value the word is
    argument: argparse.Action | None  # what the word is if it is not an option

    @property
    def wants_a_run(self) -> bool:
        name = str(getattr(self.argument, "metavar", None) or getattr(self.argument, "dest", ""))
        return name.upper() in ("RUN", "RUNS", "PATH", "DIR", "DIRECTORY", "SWEEP_DIR")


def _place(parser: argparse.ArgumentParser, given: Sequence[str]) -> _Place:
    """The place after the words `given`."""
    option: argparse.Action | None = None
    arguments = 0  # words so far that belong to no option
    for word in given:
        if option is not None:
            option = None
            continue
        action = parser._option_string_actions.get(word)
        subparser = _subparsers(parser).get(word)
        if action is not None:
            option = action if action.nargs is None or action.nargs in ("?", "+") else None
        elif subparser is not None:
            parser = subparser
            arguments = 0
        elif not word.startswith("-"):
            arguments += 1
    places = parser._get_positional_actions()
    takes_more = bool(places) and places[-1].nargs in ("*", "+")
    if arguments < len(places):
        return _Place(parser, option, places[arguments])
    return _Place(parser, option, places[-1] if takes_more else None)


def _values(option: argparse.Action) -> list[str]:
    """The values that an option may have; empty if it takes the name of a file, or any text."""
    if option.dest == "machine":
        from allranks.config import conf_dir

        return sorted(path.stem for path in conf_dir().glob("machine/*.yaml"))
    return [str(choice) for choice in option.choices or ()]


def _options_and_choices(place: _Place, current: str) -> list[str]:
    if not current.startswith("-"):
        choices = getattr(place.argument, "choices", None) or ()
        return _beginning_with(current, map(str, choices))
    shown = [
        flag
        for flag, action in place.parser._option_string_actions.items()
        if action.help != argparse.SUPPRESS and (flag.startswith("--") or not current.startswith("--"))
    ]
    return _beginning_with(current, shown)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


# --- overrides in Hydra's grammar ------------------------------------------------------------------------


def _hydra_flags(current: str) -> list[str]:
    from allranks.compose import HYDRAS

    return _beginning_with(current, sorted(HYDRAS)) if current.startswith("-") else []


def _overrides(current: str, sections: Sequence[str]) -> list[str]:
    """`model=` and `trainer.epochs=` as long as no `=` is typed, `model=cnn` after it."""
    if current.startswith("-"):
        return []
    groups = {
        group: names
        for group, names in _groups().items()
        if any(group == section or not section for section in sections)
    }
    key, equals, _ = current.partition("=")
    if equals:
        names = groups.get(key) or _names_of(key)
        return _beginning_with(current, [f"{key}={name}" for name in names])
    keys = [
        name
        for name in _keys()
        if any(not section or name == section or name.startswith(f"{section}.") for section in sections)
    ]
    offered = [_up_to_next_dot(name, current) for name in _beginning_with(current, keys)]
    return [
        *(f"{group}=" for group in _beginning_with(current, groups)),
        *dict.fromkeys(offered),  # each once, in order
    ]


def _up_to_next_dot(key: str, typed: str) -> str:
    """What is offered for a key: `trainer.` after `tr`, and `trainer.epochs=` after `trainer.`.

    There are 100 keys, so only the part up to the next dot is offered at once.
    """
    head, dot, _ = key[len(typed) :].partition(".")
    if dot:
        return f"{typed}{head}."
    return f"{key}="


def _groups() -> dict[str, list[str]]:
    """The choices of each group, from the shipped YAML files: {"model": ["cnn", "linear", ...]}."""
    from allranks.config import conf_dir

    found = {}
    for folder in sorted(conf_dir().iterdir()):
        if folder.is_dir() and folder.name != "machine":
            found[folder.name] = sorted(path.stem for path in folder.glob("*.yaml"))
    return found


def _keys() -> list[str]:
    """Every key that has an explanation, sections left out."""
    from allranks import config as configs

    marks = {**configs.settings(), **configs.COMPONENT_KEYS}
    return sorted(key for key in marks if not any(other.startswith(f"{key}.") for other in marks))


def _names_of(key: str) -> list[str]:
    """The values that a key may have, where there are only a few; empty for numbers, texts and paths."""
    from allranks import config as configs
    from allranks.base.schema import FLAG

    mark = {**configs.settings(), **configs.COMPONENT_KEYS}.get(key)
    if mark is None or mark.rule is None:
        return []
    return ["true", "false"] if mark.rule is FLAG else list(mark.rule.names)


# --- runs ------------------------------------------------------------------------------------------------


def runs(current: str) -> list[str]:
    """The directories of runs whose path begins with what is typed, the newest first.

    If no folder is typed yet, runs are looked for below `runs`; or below the present folder, if it has
    no folder `runs`.
    """
    head, slash, _ = current.rpartition("/")
    typed = head + slash  # such as `./runs/`: what is offered must begin with just these letters
    try:
        top = Path(typed or "runs").expanduser()
    except RuntimeError:  # ~NAME, and no user has that name
        return []
    if not typed and not top.is_dir():
        top = Path()
    found: list[tuple[float, str]] = []
    folders = [(top, 0)]
    looked_at = 0
    while folders and looked_at < MOST_FOLDERS:
        folder, depth = folders.pop()
        looked_at += 1
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == CONFIG and typed and folder == top:
                    continue  # what is typed is a run already
                if entry.name == CONFIG:
                    name = f"{typed}{folder.relative_to(top)}" if typed else str(folder)
                    found.append((entry.stat().st_mtime, name))
                elif depth < DEPTH and not entry.name.startswith(".") and entry.is_dir():
                    folders.append((Path(entry.path), depth + 1))
    newest = [path for _, path in sorted(found, reverse=True)]
    return _beginning_with(current, newest)
