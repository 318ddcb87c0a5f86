"""A few runs that scripts/chaos harms. The many are run by hand: docs/reliability.md."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations

from chaos import difference
from helpers import PYTHON, ROOT, execute


def test_runs_that_are_harmed_at_random_have_the_bits_of_their_undisturbed_twins(tmp_path, long):
    """Five runs with --long. Without, the third of them: it has one rank, and torch is imported by each."""
    trials = 5 if long else 1
    runs = tmp_path / "runs"
    which = ["--trials", "5"] if long else ["--trial", "3"]
    words = [*which, "--seed", "103", "--keep", str(runs)]
    done = execute(
        [PYTHON, str(ROOT / "tests/chaos.py"), *words], tmp_path, timeout_s=60 + 30 * trials
    ).ok()
    last = re.fullmatch(
        rf"{trials} trials, (\d+) faults, (\d+) kinds, 0 lost, 0 hung, 0 different",
        done.out.splitlines()[-1],
    )
    assert last, done.out
    assert int(last[1]) >= trials  # nearly three times as many where none is missed and all can be made
    assert int(last[2]) >= (5 if long else 1)

    twins = [path for path in (runs / "twins").iterdir() if path.is_dir()]
    assert len(twins) >= (5 if long else 1)
    weights = {path: json.loads((path / "summary.json").read_text())["model/sha256"] for path in twins}
    assert len(set(weights.values())) >= (5 if long else 1)  # two of the plans may make the same weights
    for one, other in combinations(twins, 2):
        assert ("model/sha256: " in difference(one, other)) == (weights[one] != weights[other])
    same = shutil.copytree(twins[0], tmp_path / "same")
    assert difference(twins[0], same) == ""
    metrics = (same / "metrics.jsonl").read_text()
    (same / "metrics.jsonl").write_text(re.sub(r'("val/loss": \S*\d)', r"\g<1>1", metrics, count=1))
    assert difference(twins[0], same).startswith("metrics.jsonl: ")
