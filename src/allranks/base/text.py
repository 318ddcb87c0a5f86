"""Words for people: one line out of many, a guess at what was meant, columns side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def one_line(said: object) -> str:
    """The text of another library's error on one line, to be quoted in a message."""
    return " ".join(str(said).replace("\0", " ").split())


def first_line(error: BaseException) -> str:
    """The first line of a library's error message; the name of the error if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """The text with every character that a terminal would obey, not show, in its escaped form.

    A directory's name may hold escape sequences that colour or overwrite the text before it, or bytes that
    are not UTF-8: these are shown escaped, too. Line ends and tabs stay.
    """
    if text.isprintable():  # nearly always
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the known name nearest to `word`, or an empty string."""
    import difflib  # only for a mistake: every rank's start comes by here

    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:  # a case or a leaf name only: Relu for ReLU, lr for optimizer.lr
        near = [name for name in known if name.lower().split(".")[-1] == word.lower().split(".")[-1]]
    return f" Did you mean {near[0]}?" if near else ""


def some(things: Sequence[object]) -> str:
    """The first eight of the things as text, with `...` where there are more."""
    return ", ".join(map(str, things[:8])) + (", ..." if len(things) > 8 else "")


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as text, each column as wide as its widest cell; a row's last cell may be longer.

    Control characters are shown escaped.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = max(len(row) for row in rows)
    widths = [max((len(r[i]) for r in rows if len(r) > i + 1), default=0) for i in range(columns)]
    lines = ("  ".join(f"{cell:{w}}" for cell, w in zip(r, widths, strict=False)) for r in rows)
    return "\n".join("  " + line.rstrip() for line in lines)


def is_text(name: str) -> bool:
    """Whether a name from the file system is UTF-8: Python keeps other bytes as half characters."""
    return as_text(name) == name


def as_text(name: str) -> str:
    """A name from the file system with a question mark for each byte that is not UTF-8."""
    return name.encode(errors="replace").decode()
