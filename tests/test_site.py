"""The documentation site: it is built without a warning, and every link inside it leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from helpers import PYTHON, ROOT, execute


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    execute([PYTHON, *words, str(ROOT / "docs"), str(folder / "html")], folder).ok()
    return folder / "html"


@pytest.mark.long
def test_every_page_is_in_the_table_of_contents(site):
    contents = (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert f'href="{name}"' in contents or name == Path("index.html")


@pytest.mark.long
def test_every_link_inside_the_site_leads_to_a_page_and_to_a_heading_there(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    marks = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    checked = 0
    for path, text in pages.items():
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            if re.match(r"[a-z]+:|//", link):
                continue
            file, _, mark = unquote(link).partition("#")
            file = file.partition("?")[0]
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), f"{path.name}: {link}"
            assert not mark or target not in marks or mark in marks[target], f"{path.name}: {link}"
            checked += 1
    assert checked > 1000
