"""A few runs that scripts/chaos harms. The many are run by hand: docs/reliability.md."""

from __future__ import annotations

import re
import shutil
from itertools import combinations

from chaos import difference
from helpers import PYTHON, ROOT, execute


def test_runs_that_are_harmed_at_random_have_the_bits_of_their_undisturbed_twins(tmp_path):
    runs = tmp_path / "runs"
    done = execute(
        [PYTHON, str(ROOT / "tests/chaos.py"), "--trials", "6", "--seed", "103", "--keep", str(runs)],
        tmp_path,
    ).ok()
    last = re.fullmatch(
        r"6 trials, (\d+) faults, (\d+) kinds, 0 lost, 0 different", done.out.splitlines()[-1]
    )
    assert last, done.out
    assert int(last[1]) >= 10  # 22 where none is missed and all can be made
    assert int(last[2]) >= 7

    twins = [path for path in (runs / "twins").iterdir() if path.is_dir()]
    assert len(twins) == 6
    for one, other in combinations(twins, 2):
        assert "model/sha256: " in difference(one, other)
    same = shutil.copytree(twins[0], tmp_path / "same")
    assert difference(twins[0], same) == ""
    metrics = (same / "metrics.jsonl").read_text()
    (same / "metrics.jsonl").write_text(re.sub(r'("val/loss": \S*\d)', r"\g<1>1", metrics, count=1))
    assert difference(twins[0], same).startswith("metrics.jsonl: ")
