"""README and docs as the tests see them: blocks of code, commands, and a folder in which these are run.

A page is Markdown. A block of code stands between two lines of ``` and names its language:

- `bash`: commands. Each is run, in the order of the page, or is in the table UNRUN with a reason.
- `console`: commands after `$ `, and below each what it prints.
- `python`, `yaml`, `sh`: where the first line is a comment with a path (`# mylab/models.py`), the block is
  that file, which later commands of the page need. Python without such a line is run.
- `text`: what a program prints, or a drawing. It is not run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

from helpers import PYTHON, ROOT, ForkedPython

LANGUAGES = {"bash", "console", "python", "yaml", "sh", "text"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# The first line of a block that is a file: `# conf/model/wide.yaml`, `# ~/clusters/machine/tern.yaml`.
FILE = re.compile(r"# ((?:~/)?[\w/-]+\.(?:py|yaml))$")


@dataclass(frozen=True)
class Block:
    """A block of code: its page, the line on which its text begins (from 1), its language and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The path of the file that the block is, if its first line names one."""
        named = FILE.match(self.text.split("\n")[0])
        return named[1] if named else None


@dataclass(frozen=True)
class Command:
    """A command as a page shows it, with the lines that a console block says it prints."""

    page: str
    text: str
    prints: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Its simple commands: lines that end in a backslash are joined, comments left out."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in (strip_comment(line).strip() for line in joined.split("\n")) if line]


def strip_comment(line: str) -> str:
    """The line up to a `#` that begins a comment."""
    return re.sub(r"(^|\s)#.*", "", line)


@cache
def blocks(page: str) -> list[Block]:
    """All blocks of code of a page, in its order; the language of a block without a fence is ""."""
    found = []
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            first = token.map[0] + (2 if token.type == "fence" else 1)
            found.append(Block(page, first, token.info.strip(), token.content))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a block of bash or console, each with all of its lines."""
    if block.language == "console":
        return list(_of_console(block))
    return list(_of_bash(block))


def _of_console(block: Block) -> Iterator[Command]:
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        typed, *printed = part.rstrip("\n").split("\n")
        yield Command(block.page, typed, tuple(printed))


def _of_bash(block: Block) -> Iterator[Command]:
    """A command ends with the first line after which bash wants no further one.

    So a loop, a here-document or a line that ends in a backslash is one command with the lines that follow.
    """
    gathered: list[str] = []
    for line in block.text.rstrip("\n").split("\n"):
        gathered.append(line)
        text = "\n".join(gathered)
        if not text.endswith("\\") and is_bash(text):
            if any(strip_comment(line).strip() for line in gathered):
                yield Command(block.page, text)
            gathered = []
    assert not gathered, f"{block.page}, line {block.line}: bash does not understand {gathered}"


def is_bash(text: str) -> bool:
    """Whether bash takes the text for complete commands."""
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    return checked.returncode == 0 and not checked.stderr


@cache
def all_commands() -> list[Command]:
    """Every command of every page."""
    return [
        command
        for page in NAMES
        for block in blocks(page)
        if block.language in ("bash", "console")
        for command in commands(block)
    ]


# --- where commands are run -------------------------------------------------------------------------------

# Few examples, drawn in a tenth of a second: what data=mnist and data=synthetic are where commands are run.
SMALL_DATA = """
input_shape: [1, 28, 28]
classes: 10
split: [1200, 400]
root: data
fetch: true
train: {_target_: allranks.data.synthetic.generate, count: 1600, part: train, seed: 0}
test: {_target_: allranks.data.synthetic.generate, count: 400, part: test, seed: 0}
"""

REPORT_IS_NOT_NEEDED = ("README.md", "docs/run-directory.md")  # by the commands of pages that speak of it

# Programs and files that the pages take for granted: a training of the reader's own, say.
ASSUMED = {
    "my_own_train.py": "import os\nprint('rank', os.environ['RANK'])\n",
    "train.py": "import os\nprint('rank', os.environ['RANK'])\n",
}


# Their `python` is a real one. That of the others is forked from one that has imported torch.
REAL = ("docs/run-directory.md", "docs/start.md", "docs/launch.md")


@contextmanager
def prepared(folder: Path, page: str) -> Iterator[dict[str, str]]:
    """Makes the folder in which a page's commands are run; gives the environment that they need.

    They run as typed. But allranks is a copy whose shipped data sets are small, and the home directory is
    in the folder. A run's report takes longer than so small a run does. So it is left out, unless the page
    speaks of it.
    """
    source = folder / "copy of allranks" / "src"
    conf = source / "allranks" / "conf"
    shutil.copytree(ROOT / "src", source)  # with the bytecode that is there
    shutil.copytree(ROOT / "conf", conf)
    for name in ("mnist", "synthetic"):
        (conf / "data" / f"{name}.yaml").write_text(SMALL_DATA)
    if page in REPORT_IS_NOT_NEEDED or "report.html" not in (ROOT / page).read_text():
        defaults = (conf / "config.yaml").read_text()
        assert "\nreport: true" in defaults
        (conf / "config.yaml").write_text(defaults.replace("\nreport: true", "\nreport: false"))
    home = folder / "home"
    here = folder / "here"
    home.mkdir()
    (here / "runs" / "sweep").mkdir(parents=True)  # as `allranks submit` makes them, which is not run
    for name, text in ASSUMED.items():
        (here / name).write_text(text)
    environment = {"PYTHONPATH": str(source), "HOME": str(home)}
    system = "/usr/local/bin:/usr/bin:/bin"
    if page in REAL:
        yield {**environment, "PATH": f"{Path(PYTHON).parent}:{system}"}
        return
    with ForkedPython(str(source)) as forked:
        yield {**environment, "PATH": f"{forked.bin}:{system}"}


def write_file(block: Block, folder: Path) -> None:
    """Writes the file that the block is to the place where the page's reader would put it."""
    assert block.file is not None
    inside = block.file.replace("~/", "../home/", 1)
    path = folder / "here" / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
