"""Single faults in compiled graphs are refused without numbers, and valid recipes are not."""

from random import Random

import pytest

from tests.deep import DEEP
from tests.trust.mutations import KINDS
from tests.trust.subjects import SUBJECTS, run, steps
from zgraph.certify.certificate import certify
from zgraph.errors import VerifyError

KINDS_EACH = len(KINDS) if DEEP else 10
FAULTS_EACH = 3 if DEEP else 1


def faults(subject: str, rng: Random):
    """Faults of many kinds in graphs of any step: the kind, the number of the graph, and what has become of it."""
    found = steps(subject)
    changed = [i for i in range(1, len(found)) if found[i][1] != found[i - 1][1]]
    for kind in rng.sample(sorted(KINDS), KINDS_EACH):
        made = 0
        for number in rng.sample(changed, len(changed)) * FAULTS_EACH:
            graph = found[number][1]
            mutant = KINDS[kind](graph, Random(rng.random()))
            if mutant is not None and mutant != graph:
                yield kind, number, mutant
                made += 1
            if made == FAULTS_EACH:
                break


@pytest.mark.parametrize("subject", SUBJECTS)
def test_single_faults_are_refused(subject):
    """At any step, by the check of that step alone."""
    found, context = steps(subject), run(subject).context
    certify(found, context)
    passed, count = [], 0
    for kind, number, mutant in faults(subject, Random(subject)):
        count += 1
        try:
            certify([*found[:number], (found[number][0], mutant)], context, since=number)
        except VerifyError:
            continue
        passed.append((kind, found[number][0]))
    assert count > KINDS_EACH // 3
    assert len(passed) <= count / 100, passed


@pytest.mark.skipif(not DEEP, reason="captures and compiles every model: make test-deep")
def test_every_kind_finds_a_place():
    assert len(KINDS) > 40
    placed = {
        kind
        for kind, make in KINDS.items()
        if any(make(graph, Random(1)) is not None for subject in SUBJECTS for _, graph in steps(subject))
    }
    assert placed == KINDS.keys()
