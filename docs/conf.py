"""The documentation site: `sphinx-build -W -b html docs _site`.

Every page is plain Markdown that GitHub shows as well. What only the site needs is made here: the table of
contents, from the links of index.md; the notebook's cells and pictures, below the text of tutorial.md; and
pages of the Markdown files outside docs/ to which a page leads, such as the README.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NOTEBOOK = HERE.parent / "notebooks" / "tutorial.ipynb"

project = "allranks"
author = "the authors of allranks"
copyright = f"2026, {author}"

extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True  # a link that leads nowhere is a warning, and a warning is an error in the test

myst_heading_anchors = 4  # `page.md#a-heading` works as on GitHub
myst_links_external_new_tab = True

html_theme = "furo"
html_title = "allranks"
html_show_sourcelink = False
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .go"  # of a console block, the commands alone


OUTSIDE = "outside"  # the folder of the site with the pages of files outside docs/


def setup(app: Any) -> None:
    app.connect("source-read", add_to_page)
    app.connect("html-collect-pages", pages_of_outside)


def add_to_page(app: Any, page: str, source: list[str]) -> None:
    """Sphinx calls it with each page's text; what the site alone shows is put below it."""
    source[0] = with_links_outside(source[0], page)
    if page == "index":
        source[0] += contents(source[0])
    if page == "tutorial" and NOTEBOOK.is_file():
        source[0] += notebook_as_markdown(json.loads(NOTEBOOK.read_text()))


def with_links_outside(text: str, page: str) -> str:
    """The page's text, in which links to files outside docs/ lead to something on the site.

    A link to a Markdown file leads to the page that pages_of_outside() makes of it. A link to another file,
    such as the notebook, downloads the file.
    """

    def on_site(link: re.Match[str]) -> str:
        words, target = link.groups()
        file = (HERE / page).parent.joinpath(target).resolve()
        if file.is_relative_to(HERE):
            return link[0]
        if file.suffix != ".md":
            return f"{{download}}`{words} <{target}>`"
        up = "../" * page.count("/")
        return f'<a href="{up}{OUTSIDE}/{file.stem}.html">{words}</a>'

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", on_site, text)


def pages_of_outside(app: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    """Sphinx calls it for further pages: those of the Markdown files at the top of the repository."""
    from docutils.core import publish_parts
    from myst_parser.docutils_ import Parser

    for path in sorted(ROOT.glob("*.md")):
        settings = {"myst_heading_anchors": 4, "report_level": 5, "doctitle_xform": False}
        text = with_links_into_site(path.read_text())
        body = publish_parts(text, parser=Parser(), writer="html5", settings_overrides=settings)["body"]
        yield f"{OUTSIDE}/{path.stem}", {"title": path.stem, "body": body}, "page.html"


def with_links_into_site(text: str) -> str:
    """The text of a file at the top of the repository, with links to the pages of the site.

    Of a link to any other file, the words stay.
    """

    def on_site(link: re.Match[str]) -> str:
        words, target, mark = link[1], link[2], link[3] or ""
        if re.match(r"[a-z]+:", target):
            return link[0]
        if target.endswith(".md"):
            inside = target.removeprefix("docs/")
            page = f"../{inside}" if inside != target else target
            return f'<a href="{page.removesuffix(".md")}.html{mark}">{words}</a>'
        return words

    return re.sub(r"\[([^\]]+)\]\(([^)#]*)(#[^)]*)?\)", on_site, text)


def contents(index: str) -> str:
    """The site's table of contents: a part for each section of index.md, with the pages that it lists."""
    parts = []
    for section in index.split("\n## ")[1:]:
        caption = section.splitlines()[0]
        pages = re.findall(r"^- \[[^\]]*\]\((?!\.\.)([\w/-]+)\.md\)", section, flags=re.M)
        if pages:
            parts.append(
                "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])
            )
    return "\n".join(parts)


def notebook_as_markdown(notebook: dict[str, Any]) -> str:
    """The notebook's cells one after another: its text, its code, and what the code printed and drew.

    Headings go down by one level, because the page has a title of its own.
    """
    parts = ["", ""]
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"^#", "##", text, flags=re.M))
        else:
            shell = text.startswith("%%bash\n")  # a cell of shell commands
            code = text.removeprefix("%%bash\n")
            parts.append(f"```{'bash' if shell else 'python'}\n{code}\n```")
            parts += [output_as_markdown(output) for output in cell["outputs"]]
    return "\n\n".join(parts)


def output_as_markdown(output: dict[str, Any]) -> str:
    """One output of a cell: a picture, or text as it was printed."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "image/png" in data:
        picture = "".join(data["image/png"]).strip()
        base64.b64decode(picture, validate=True)  # it goes into the page as it is, so it must be base64
        image = f'<img alt="What the cell above draws" src="data:image/png;base64,{picture}">'
        return f"```{{raw}} html\n<p>{image}</p>\n```"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
