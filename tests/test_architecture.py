"""The house keeps its shape: who imports whom, what a start costs, what the wheel carries."""

from __future__ import annotations

import ast
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from helpers import PYTHON, ROOT, SMALL, TRAIN, Done, execute, launcher, only_long, tree

SOURCE = ROOT / "src/allranks"

# The floors of the house, from the top down. Packages and modules of one floor do not know each other, and
# an import leads to a floor below: docs/architecture.md says what each is for.
FLOORS = (
    "__main__",
    "cli",
    "train doctor completion",
    "follow",
    "submit",
    "launch",
    "own",
    "report",
    "inference",
    "training",
    "trackers",
    "data",
    "runtime",
    "runtime.watch",
    "run",
    "job",
    "compose",
    "components config models schedulers tasks",
    "base",
    "__init__",
)
# Import no torch, however they are used before a training starts.
WITHOUT_TORCH = (
    "report.gather",
    "report.pictures",
    "report.page",
    "report.command",
    "report.at_end",
    "report.compare",
    "report.compare_command",
    "report.compare_sweep",
    "report.compare_tables",
    "run.show",
    "run.checkpoint",
    "run.claim",
    "cli",
    "components",
    "compose",
    "config",
    "training.control",
    "training.ending",
    "data.arrays",
    "data.early",
    "data.mnist",
    "data.synthetic",
    "base.errors",
    "job.hosts",
    "launch.command",
    "launch.options",
    "launch.plan",
    "launch.dryrun",
    "launch.launchers",
    "job.machine",
    "run.cells",
    "job.scheduler",
    "follow.command",
    "submit.script",
    "submit.task",
    "submit.queue",
    "run.directory",
    "job.identity",
    "train",
)
MAY_PRINT = (
    "cli",
    "run.show",
    "train",
    "training.ending",
    "doctor",
    "completion.command",
    "report.command",
    "report.at_end",
    "inference.command",
    "launch.attempts",
    "launch.command",
    "launch.guard",
    "launch.console",
    "launch.supervisor",
    "launch.preflight",
    "follow.command",
    "submit.command",
    "submit.listing",
    "submit.successor",
    "report.compare_command",
)
FOR_RUNTIME_ONLY = ("torch.distributed", "mpi4py", "ezpz")


@cache
def modules() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(SOURCE).with_suffix("")).replace("/", "."): ast.parse(path.read_text())
        for path in sorted(SOURCE.rglob("*.py"))
    }


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that are imported anywhere in the tree, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(module: str) -> int:
    """The number of the floor on which a module stands, counted from the top."""
    room = room_of(module)
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms.split())


def room_of(module: str) -> str:
    """The package or module of FLOORS that a module belongs to: of nested ones the innermost."""
    rooms = [room for floor in FLOORS for room in floor.split()]
    return max((room for room in rooms if f"{module}.".startswith(f"{room}.")), key=len)


def imports_among_ours() -> dict[str, set[str]]:
    """For each module those of ours that it imports; an import of a package is one of its __init__.

    `import allranks` itself imports none of them: it names the public ones to type checkers, and finds them
    when they are asked for (test_own_loop.py).
    """
    dotted = {f"allranks.{name.removesuffix('.__init__')}": name for name in modules()}
    return {
        module: {dotted[name] for name in imported(source) if name in dotted and module != "__init__"}
        for module, source in modules().items()
    }


def test_imports_between_packages_run_downwards():
    for module, below in imports_among_ours().items():
        for other in below:
            same_room = room_of(module) == room_of(other)
            assert same_room or floor_of(module) < floor_of(other), f"{module} imports {other}"


def test_no_room_in_which_ranks_train_gets_the_whole_configuration():
    """train.py takes it apart: each room gets the values, or the sections, that it needs."""
    for module, source in modules().items():
        if (
            module.startswith(("training.", "trackers.", "data.", "runtime."))
            and module != "training.debug"
        ):
            assert "allranks.config.Config" not in imported(source), module


def test_no_module_imports_itself_by_a_detour():
    left = imports_among_ours()
    while ready := {name for name, below in left.items() if not below}:
        left = {name: below - ready for name, below in left.items() if name not in ready}
    assert left == {}


# --- CONTRIBUTING's map --------------------------------------------------------------------------------

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
LINE_OF_THE_MAP = re.compile(r"    ( *)(\S+)  +(\S.*)|    ( *)(\S+/)")


def mapped() -> dict[str, str]:
    """What CONTRIBUTING says of each path of its map, in the map's order; folders end in `/`."""
    text = CONTRIBUTING.read_text().partition("\n## The map\n")[2].partition("\n## ")[0]
    purposes: dict[str, str] = {}
    parents: list[str] = []
    for line in text.splitlines():
        if not line.startswith("    "):
            continue
        match = LINE_OF_THE_MAP.fullmatch(line)
        assert match, f"CONTRIBUTING.md: not a line of the map: {line}"
        indent, name, purpose = match[1] or match[4] or "", match[2] or match[5], match[3] or ""
        parents = [*parents[: len(indent) // 2], name]
        path = "".join(parents)
        assert path not in purposes, f"CONTRIBUTING.md: {path} stands in the map twice"
        purposes[path] = purpose
    return purposes


def within(folder: Path) -> set[str]:
    """The files and folders in a folder; without __init__.py, whose text is the folder's own line, and
    without folders that hold nothing but what Python compiled there."""
    files = {path.name for path in folder.glob("[!._]*") if path.is_file()}
    files |= {path.name for path in folder.glob("_*.py") if path.name != "__init__.py"}
    folders = {f"{path.name}/" for path in folder.glob("[!._]*") if path.is_dir() and any(path.glob("*.*"))}
    return files | folders


def test_the_map_shows_each_file_of_the_tree_and_nothing_else():
    purposes = mapped()
    assert "src/allranks/" in purposes and "conf/" in purposes
    for path in purposes:
        assert (ROOT / path).exists(), f"CONTRIBUTING.md: {path} is in the map, but not in the tree"
        assert (ROOT / path).is_dir() == path.endswith("/"), path
    for folder in (path for path in purposes if path.endswith("/")):
        shown = {
            path.removeprefix(folder) for path in purposes if path.startswith(folder) and path != folder
        }
        children = {re.sub("/.*", "/", path) for path in shown}
        if not children:
            continue  # one line stands for all of its files
        for name in sorted(within(ROOT / folder) - children):
            pytest.fail(f"CONTRIBUTING.md: the map needs a line for {folder}{name}")


def test_the_map_says_what_each_file_is_for_and_shows_the_floors_from_the_top():
    purposes = mapped()
    for path, purpose in purposes.items():
        assert purpose or path == "src/allranks/", (
            f"CONTRIBUTING.md: the map does not say what {path} is for"
        )
    files = [path.removeprefix("src/allranks/") for path in purposes if path.startswith("src/allranks/")]
    floors = [floor_of(re.split(r"[/.]", name)[0]) for name in files if name]
    assert floors == sorted(floors), "CONTRIBUTING.md: the map is not in the order of FLOORS"


def test_the_map_and_the_drawing_of_the_floors_show_every_room():
    drawing = (
        (ROOT / "docs/architecture.md").read_text().partition("## The floors")[2].partition("\n## ")[0]
    )
    for room in " ".join(FLOORS).split():
        if not room.startswith("__"):
            assert re.search(rf"\b{room}(/|\.py)", drawing), f"docs/architecture.md does not draw {room}"


def test_the_files_and_functions_that_map_and_architecture_name_are_there():
    source = "".join(path.read_text() for path in SOURCE.rglob("*.py"))
    for document in (CONTRIBUTING, ROOT / "docs/architecture.md"):
        quoted = re.findall(r"`([^`\n]+)`", document.read_text())
        for path in (word for word in quoted if re.fullmatch(r"[\w/]+(\.py|/)", word)):
            assert any((folder / path).exists() for folder in (SOURCE, ROOT)), f"{document}: no {path}"
        for name in (word.removesuffix("()").split(".")[-1] for word in quoted if word.endswith("()")):
            assert f"def {name}(" in source, f"{document}: no function {name}()"


def test_only_the_runtime_touches_process_groups_mpi_and_ezpz():
    for module, source in modules().items():
        if module.startswith("runtime."):
            continue
        reached = {name for name in imported(source) if name.startswith(FOR_RUNTIME_ONLY)}
        reached |= {
            ast.unparse(node)
            for node in ast.walk(source)
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
        }
        assert reached == set(), module


def test_every_training_takes_its_backward_passes_at_one_place():
    """The shipped training and loops of one's own add up over pieces and ranks by the same code."""
    for call in ("without_sync", "check_summed"):
        calling = {
            module
            for module, source in modules().items()
            for node in ast.walk(source)
            if isinstance(node, ast.Attribute) and node.attr == call
        }
        assert calling - {"runtime.runtime"} == {"training.gradients"}, call


def test_no_broad_except_swallows_and_only_the_command_line_prints():
    for module, source in modules().items():
        for node in ast.walk(source):
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
                caught = ast.unparse(node.type) if node.type else "everything"
                broad = caught in ("everything", "Exception", "BaseException")
                # A check may fail anyhow, a tracker may raise anything, and a thread hands its error on.
                allowed = ("doctor", "trackers.follower", "base.threads")
                assert not broad or module in allowed, (module, node.lineno)
            if isinstance(node, ast.Name) and node.id == "print":
                assert module in MAY_PRINT, (module, node.lineno)


PICKLES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch.load", "np.load")
SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "eval", "exec")
COLLECTIVES_THAT_PICKLE = re.compile(
    r"(gather|scatter|broadcast|send|recv)_object(_list)?$"  # torch's
    r"|\bcomm\.i?(all)?(bcast|send|recv|gather|scatter|reduce|sendrecv|alltoall)$"  # mpi4py's
)
LISTEN = ("launch.supervisor", "job.variables", "base.links")


def test_no_data_can_become_code_and_few_modules_listen():
    """What docs/security.md promises."""
    for module, source in modules().items():
        assert not [name for name in imported(source) if name.startswith(PICKLES)], module
        for call in (node for node in ast.walk(source) if isinstance(node, ast.Call)):
            called, at = ast.unparse(call.func), (module, call.lineno)
            assert called not in (*PICKLES, *SHELLS), at
            assert not [k for k in call.keywords if k.arg == "shell"], at
            assert not COLLECTIVES_THAT_PICKLE.search(called), at
            if called.endswith(("create_server", "start_server", ".bind")):
                assert module in LISTEN, at


# --- what a process imports ----------------------------------------------------------------------------

# Python imports a module of this name at its start, in every rank.
SITECUSTOMIZE = """
import atexit, json, os, sys
def dump():
    rank = os.environ.get("RANK") or os.environ.get("PMI_RANK") or "alone"
    dynamo = sys.modules.get("torch._dynamo")
    with open(f"{os.environ['IMPORTS']}/{rank}-{os.getpid()}.json", "w") as file:
        stand_ins = [name for name, module in sys.modules.items() if type(module).__name__ == "_Understudy"]
        json.dump({"argv": sys.orig_argv, "rank": rank,
                   "modules": sorted(set(sys.modules) - set(stand_ins)),
                   "dynamo": getattr(dynamo, "__file__", None)}, file)
atexit.register(dump)
"""


@pytest.fixture
def imports_of(tmp_path: Path):
    """imports_of(argv) runs it and gives, for each Python process in it, rank and imported modules."""

    def run(argv: list[str]) -> tuple[Done, list[dict]]:
        hook, notes, cwd = tmp_path / "hook", tmp_path / "notes", tmp_path / "cwd"
        for folder in (hook, notes, cwd):
            folder.mkdir()
        (hook / "sitecustomize.py").write_text(SITECUSTOMIZE)
        done = execute(argv, cwd, env={"PYTHONPATH": str(hook), "IMPORTS": str(notes)}).ok()
        return done, [json.loads(path.read_text()) for path in sorted(notes.iterdir())]

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "allranks", "--help"],
        ["-m", "allranks", "--version"],
        ["-m", "allranks", "checkpoint", "--help"],
        ["-m", "allranks", "predict", "--help"],
        ["-m", "allranks", "evaluate", "--help"],
        ["-m", "allranks", "export", "--help"],
        ["-m", "allranks", "train", "--help"],
        ["-m", "allranks", "train", "--cfg", "job"],
        ["-m", "allranks.train", "--cfg", "job", "model=resnet18", "optimizer=adam"],
        ["-m", "allranks.train", "--help"],
        ["-c", "import " + ", ".join(f"allranks.{name}" for name in WITHOUT_TORCH)],
    ],
    ids=" ".join,
)
def test_no_torch_is_imported_to_answer(imports_of, words):
    done, processes = imports_of([PYTHON, *words])
    assert len(processes) == 1  # `allranks train` becomes the training, and starts no second process
    assert "allranks" in processes[0]["modules"]
    heavy = {"torch", "torchvision", "mpi4py", "ezpz"}
    assert heavy & {name.partition(".")[0] for name in processes[0]["modules"]} == set()
    assert tree(done.cwd) == []
    assert done.err == ""


def test_a_users_error_needs_no_torch(tmp_path):
    code = "import sys; from allranks import train; sys.argv[1:] = ['optimizer.lr=-1']\n"
    code += "try: train.main()\nexcept SystemExit: print('torch' in sys.modules)"
    assert execute([PYTHON, "-c", code], tmp_path).out == "False\n"


@pytest.mark.parametrize("under", ["mpiexec", only_long("torchrun")])
def test_ranks_import_neither_torchvision_nor_sympy_nor_the_compiler(imports_of, under):
    """A sweep of two trainings: what the first one has left imported is looked at by the second one."""
    sweep = ["-m", *SMALL, "trainer.epochs=1", "seed=0,1"]
    _, processes = imports_of([*launcher(under, 2), "-m", "allranks.train", *sweep])
    # Rank 0 has a process of its own compare the two at the end.
    trainings = [each for each in processes if "allranks.training.control" in each["modules"]]
    assert sorted(each["rank"] for each in trainings) == ["0", "1"]
    for process in trainings:
        assert "torch" in process["modules"]
        assert "torchvision" not in process["modules"]  # rank 0 needs it for resnet18 only
        assert "sympy" not in process["modules"]
        assert process["dynamo"] is None
        compilers = ("torch._dynamo.", "torch._inductor.")
        assert [name for name in process["modules"] if name.startswith(compilers)] == []


# It says whether torchvision is there, before and after its own model is made, and whether sympy is.
RESNET18 = """
import sys
from allranks.runtime import lean
with lean.quick_import():
    from allranks import models
    from allranks.training import engine, report
print("torchvision" in sys.modules)
models.resnet18([1, 28, 28], 10)
print("torchvision" in sys.modules)
print("sympy" in sys.modules)
from torchvision.ops import roi_align
asked = roi_align.__globals__["is_compile_supported"]
print(asked("cpu") in (True, False))
"""


def test_torchvision_is_imported_for_its_own_model_only_and_does_not_bring_the_compiler(imports_of):
    """It imports a function of the compiler's, which only object detection calls."""
    done, [process] = imports_of([PYTHON, "-c", RESNET18])
    assert done.out == "False\nTrue\nFalse\nTrue\n"
    assert process["dynamo"] is not None  # now that it was asked, the real one is there


# --- what a start costs --------------------------------------------------------------------------------


@pytest.mark.long
def test_a_start_makes_few_file_system_calls_beyond_torchs_own(strace, tmp_path):
    """On a cluster's shared file system each costs a millisecond, times the ranks. A start made 5,700 more
    per rank than `import torch` does when this was written; torch's compiler alone would add 15,000."""
    trace = [strace, "-f", "-qq", "-e", "trace=%file", "-o"]

    def calls(name: str, *argv: str) -> int:
        file = tmp_path / name
        execute([*trace, str(file), *argv], tmp_path, env={"PYTHONDONTWRITEBYTECODE": "1"}).ok()
        # A call that another process interrupts takes a second line: "<... NAME resumed>".
        return sum("resumed>" not in line for line in file.open())

    torch_alone = calls("torch", PYTHON, "-c", "import torch")
    two_ranks = calls("ranks", *launcher("mpiexec", 2), "-m", "allranks.train", *SMALL, "trainer.epochs=1")
    answer = calls("answer", *TRAIN, "--cfg", "job")
    assert two_ranks / 2 - torch_alone < 6_500
    assert answer < 4_000


# --- the wheel -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, built from this tree, is installed."""
    pytest.importorskip("hatchling", reason="hatchling is missing: pip install hatchling")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("src", "conf", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)  # the build leaves nothing in the repository
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        str(source),
    ]
    execute(built, folder).ok()
    [wheel] = folder.glob("allranks-*.whl")
    target = folder / "site"
    execute([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], folder).ok()
    return target


def test_the_wheel_carries_all_of_conf(installed):
    assert tree(installed / "allranks/conf") == tree(ROOT / "conf")


def test_the_wheel_carries_the_template_of_job_scripts(installed):
    template = "submit/job.sh.template"
    assert (installed / "allranks" / template).read_text() == (SOURCE / template).read_text()


def test_the_wheel_works_from_any_directory(installed, tmp_path):
    env = {"PYTHONPATH": str(installed)}
    where = execute([PYTHON, "-c", "import allranks; print(allranks.__file__)"], tmp_path, env=env).ok()
    assert where.out.strip() == str(installed / "allranks/__init__.py")
    shown = execute([*TRAIN, "--cfg", "job", "experiment=tutorial_step"], tmp_path, env=env).ok()
    assert shown.out == execute([*TRAIN, "--cfg", "job", "experiment=tutorial_step"], ROOT).ok().out
    assert "_target_: torch.optim.lr_scheduler.StepLR" in shown.out
    done = execute([*TRAIN, *SMALL, "trainer.epochs=1"], tmp_path, env=env).ok()
    assert done.run.summary["epochs"] == 1


def test_the_wheel_declares_the_least_that_it_needs(installed):
    """Loose lower bounds, no upper ones; never PyPI's ezpz; an MPI only as an extra."""
    [metadata] = installed.glob("allranks-*.dist-info/METADATA")
    wanted = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), flags=re.M)
    always = [line for line in wanted if "extra ==" not in line]
    assert not any(line.startswith(("ezpz", "mpich")) for line in always)
    assert not any("<" in line or "==" in line for line in always)
    assert any(line.startswith("mpich") and "extra" in line for line in wanted)
