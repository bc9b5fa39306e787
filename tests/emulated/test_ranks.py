"""Two ranks, each a process with a device, over a group that keeps NCCL's order."""

import pytest

from tests.deep import deep
from tests.emulated.case import Case
from tests.emulated.cases import BF16, BUCKETS, GROUPED, recipe
from tests.emulated.ranks import plain, train
from tests.emulated.server import Server

CASES = {
    "stage 0": Case(options={"stage": 0}),
    "stage 1, 2 micro-steps": Case(options={"stage": 1}, num_micro_steps=2),
    "stage 2": Case(options={"stage": 2}),
    "stage 3": Case(options={"stage": 3}),
    "arena": Case(options=recipe(3)),
    "grouped": Case(net="deep", options=recipe(3, BUCKETS, tail=GROUPED)),
    "uneven": Case(net="odd", options={"stage": 3}, num_micro_steps=2),
    "attention in bf16": Case(net="attending", options={"stage": 3, **BF16}),
    "offload optimizer": Case(options={"offload": "optimizer"}),
    "offload parameters": Case(options={"offload": "parameters"}, num_micro_steps=2),
    "offload activations": Case(net="deep", num_rows=256, options=recipe(3, "offload(num_bytes=100000)")),
    "recorded": Case(
        net="deep", options={**recipe(3, BUCKETS, tail=GROUPED), "cuda_graphs": True}, num_micro_steps=2, num_steps=5
    ),
    "codes": Case(net="odd", options={"stage": 2, "compress": "q8(block=8)"}),
    "codes of parameters": Case(options={"stage": 3, "compress": {"gradients": "q4", "parameters": "q8"}}),
    "states on the host": Case(optimizer={"state": "host", "chunk_bytes": 8192}),
}
OFTEN = ("stage 1, 2 micro-steps", "codes", "grouped", "offload parameters", "recorded")


@pytest.mark.parametrize("name", [*OFTEN, *(deep(name) for name in CASES if name not in OFTEN)])
def test_training_is_that_of_one_process(pair: Server, name: str) -> None:
    case = CASES[name]
    answers = pair.run(train, case)
    rel = 2e-5 if case.is_exact else 3e-2
    for (losses, races), expected in zip(answers, plain(case, 2), strict=True):
        assert losses == pytest.approx(expected, rel=rel)
        assert races == []
