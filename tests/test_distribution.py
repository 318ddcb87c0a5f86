"""What is published: a wheel and an sdist that install into a clean environment, and how to cite them."""

from __future__ import annotations

import importlib.metadata
import shutil
import sysconfig
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import allranks
from helpers import PYTHON, ROOT, SMALL, execute

# What the sdist is made from, besides the package itself.
SOURCES = ("src", "conf", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    for package in ("build", "hatchling", "twine"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install .[dev]")
    source = tmp_path_factory.mktemp("source")  # the build leaves nothing in the repository
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("dist")
    execute([PYTHON, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)], folder).ok()
    return folder


@pytest.mark.long
def test_wheel_and_sdist_pass_twines_check(built):
    files = sorted(built.glob("allranks-*"))
    assert [path.name for path in files] == [
        f"allranks-{allranks.__version__}-py3-none-any.whl", f"allranks-{allranks.__version__}.tar.gz"
    ]  # fmt: skip
    checked = execute([PYTHON, "-m", "twine", "check", "--strict", *map(str, files)], built).ok()
    assert checked.out.count("PASSED") == 2


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["whl", "tar.gz"])
def test_it_installs_into_a_clean_environment_and_trains(built, tmp_path, suffix):
    """Its dependencies are taken from this environment, so that no network is needed."""
    execute([PYTHON, "-m", "venv", str(tmp_path / "clean")], tmp_path).ok()
    python = str(tmp_path / "clean/bin/python")
    where = execute([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).ok()
    # A plain path: the links in that folder to editable packages, such as this one, are not followed.
    (Path(where.out.strip()) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    [file] = built.glob(f"allranks-*.{suffix}")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    execute([python, "-m", "pip", "install", *quiet, "--ignore-installed", str(file)], tmp_path).ok()

    script = str(tmp_path / "clean/bin/allranks")
    assert execute([script, "--version"], tmp_path).ok().out == f"allranks {allranks.__version__}\n"
    place = execute([python, "-c", "import allranks; print(allranks.__file__)"], tmp_path).ok()
    assert place.out.startswith(str(tmp_path / "clean"))
    words = ["model=linear", *SMALL, "trainer.epochs=1", "report=false", "run.dir=run"]
    run = execute([script, "train", *words], tmp_path).ok().run
    assert run.summary["epochs"] == 1
    assert "to the last digit" in execute([script, "evaluate", "run"], tmp_path).ok().out
    assert "complete -o default" in execute([script, "completion", "bash"], tmp_path).ok().out


def test_the_citation_has_what_the_citation_file_format_asks_for():
    """https://github.com/citation-file-format/citation-file-format/blob/main/schema-guide.md"""
    citation = OmegaConf.to_container(OmegaConf.load(ROOT / "CITATION.cff"))
    assert isinstance(citation, dict)
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # the required keys
    known = {
        "abstract",
        "authors",
        "cff-version",
        "keywords",
        "license",
        "message",
        "title",
        "type",
        "version",
    }
    assert set(citation) <= known
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    about = importlib.metadata.metadata("allranks")
    assert citation["version"] == about["Version"] == allranks.__version__
    assert citation["license"] == about["License-Expression"]
    assert all(set(author) == {"name"} for author in citation["authors"])
    assert len(set(citation["keywords"])) == len(citation["keywords"]) > 0


@pytest.mark.parametrize("form", ["fault", "machine", "wish"])
def test_a_form_for_issues_asks_for_what_doctor_says(form):
    """https://docs.github.com/en/communities/using-templates-to-encourage-useful-issues-and-pull-requests"""
    asked = OmegaConf.to_container(OmegaConf.load(ROOT / f".github/ISSUE_TEMPLATE/{form}.yml"))
    assert isinstance(asked, dict)
    assert {"name", "description", "body"} <= set(asked)
    fields = [element for element in asked["body"] if element["type"] != "markdown"]
    assert {element["type"] for element in asked["body"]} <= {"markdown", "textarea", "input", "checkboxes"}
    identities = [element["id"] for element in fields]
    assert len(set(identities)) == len(identities)
    assert all(element["attributes"]["label"] for element in fields)
    [doctor] = [element for element in fields if element["id"] == "doctor"]
    assert doctor["attributes"]["label"] == "allranks doctor --json"
