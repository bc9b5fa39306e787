"""Mutants that the benchmark says to be equivalent are in the source; what it leaves alone is left alone."""

from benchmarks.mutants import EQUIVALENT, ROOT, reasons, sites


def test_every_row_is_one_place_of_the_source():
    assert len(reasons()) == len(EQUIVALENT)


def test_only_what_runs_is_changed():
    lines = {mutant.line for mutant, _, _ in sites(ROOT / "passes/core/base.py")}
    text = (ROOT / "passes/core/base.py").read_text().splitlines()
    assert lines
    assert not any("@dataclass" in text[line - 1] or "ClassVar[" in text[line - 1] for line in lines)
