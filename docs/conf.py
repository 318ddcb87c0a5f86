"""The documentation site: `sphinx-build -W -b html docs _site`.

Every page is plain Markdown that GitHub shows as well. What only the site needs is made here: the table of
contents, from the links of index.md, and the notebook's cells and pictures, below the text of tutorial.md.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
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


def setup(app: Any) -> None:
    app.connect("source-read", add_to_page)


def add_to_page(app: Any, page: str, source: list[str]) -> None:
    """Sphinx calls it with each page's text; what the site alone shows is put below it."""
    source[0] = outside_as_downloads(source[0], page)
    if page == "index":
        source[0] += contents(source[0])
    if page == "tutorial" and NOTEBOOK.is_file():
        source[0] += notebook_as_markdown(json.loads(NOTEBOOK.read_text()))


def outside_as_downloads(text: str, page: str) -> str:
    """The page's text, in which a link to a file outside docs/ (the README, say) downloads that file."""

    def download(link: re.Match[str]) -> str:
        words, target = link.groups()
        outside = not (HERE / page).parent.joinpath(target).resolve().is_relative_to(HERE)
        return f"{{download}}`{words} <{target}>`" if outside else link[0]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", download, text)


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
