"""Runs notebooks/tutorial.ipynb, and keeps what its cells print and draw in the file.

It is what scripts/notebook calls. MNIST is read from $ALLRANKS_DATA, or from ./data; with $DATA (words for
`allranks train`) in the environment another data set is taken. The trainings run in a temporary directory.
What their output would tell of this machine is taken out of it: the path of that directory, the home
directory, and the host's name.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent / "tutorial.ipynb"
CELL_LIMIT_S = 1800  # a sweep of five trainings, on a machine with much other work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=NOTEBOOK, help="the file that gets the outputs")
    target = parser.parse_args().to
    os.environ["ALLRANKS_DATA"] = str(Path(os.environ.get("ALLRANKS_DATA", "data")).resolve())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=CELL_LIMIT_S, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
        hidden = {os.environ["ALLRANKS_DATA"]: "data", os.path.realpath(folder) + "/": "", folder + "/": ""}
    hidden |= {str(Path.home()): "~", socket.gethostname(): "this-host"}
    for cell in notebook.cells:
        tidy(cell, hidden)
    target.write_text(nbformat.writes(notebook) + "\n")


def tidy(cell: nbformat.NotebookNode, hidden: dict[str, str]) -> None:
    """Takes out of a cell what differs between two runs of the same notebook, or tells of this machine."""
    cell.metadata.pop("execution", None)  # the times at which it ran
    outputs: list[nbformat.NotebookNode] = []
    for output in cell.get("outputs", []):
        last = outputs[-1] if outputs else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text  # what one command printed came in several pieces
        else:
            outputs.append(output)
    for output in outputs:
        if output.output_type == "stream":
            for text, instead in hidden.items():
                output.text = output.text.replace(text, instead)
    if cell.cell_type == "code":
        cell.outputs = outputs


if __name__ == "__main__":
    main()
