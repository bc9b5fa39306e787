"""Requests that share a cache are given what each is given alone, whatever comes and goes beside it."""

import random

import pytest
import torch
import transformers as hf

import zgraph
from tests.deep import DEEP
from zgraph.errors import ContextLengthError, UsageError
from zgraph.inference.continuous import ContinuousBatch, Request
from zgraph.inference.sampling import Sampling

NUM_ROWS, MAX_LEN = 3, 96


@pytest.fixture(scope="module")
def inference():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    found = zgraph.infer(model, max_batch=NUM_ROWS, max_len=MAX_LEN)
    found.kept = model
    return found


def drawn(rng: random.Random, number: int) -> Request:
    """A request of any size that fits: pieces of a prompt, stops, draws."""
    num_tokens = rng.choice([1, 5, 63, 64, 65, 80])
    tokens = [rng.randrange(96) for _ in range(num_tokens)]
    sampling = Sampling(True, rng.choice([0.7, 1.3]), top_p=rng.choice([None, 0.9])) if rng.random() < 0.5 else None
    stops = rng.sample(range(96), 8) if rng.random() < 0.3 else ()
    return Request(tokens, rng.randint(1, MAX_LEN - num_tokens), sampling or Sampling(), number, stops)


def alone(inference, request: Request) -> list[int]:
    """What `generate` gives for a request."""
    how = request.sampling
    whole = inference.generate(
        torch.tensor([request.tokens]),
        max_new_tokens=request.max_new_tokens,
        do_sample=how.do_sample,
        temperature=how.temperature,
        top_p=how.top_p,
        eos_token_id=request.stops,
        generator=torch.Generator().manual_seed(request.seed),
    )
    return whole[0, len(request.tokens) :].tolist()


@pytest.mark.parametrize("seed", range(12 if DEEP else 2))
def test_requests_are_given_what_each_is_given_alone(inference, seed):
    rng = random.Random(seed)
    requests = [drawn(rng, number) for number in range(12)]
    wanted = [alone(inference, request) for request in requests]
    batch, numbers, found, ends = ContinuousBatch(inference), {}, {}, {}
    left = list(enumerate(requests))
    cancelled: dict[int, int] = {}
    while left or batch.is_busy:
        while left and (rng.random() < 0.4 or not batch.is_busy):
            at, request = left.pop(0)
            numbers[batch.submit(request)] = at
        if numbers and rng.random() < 0.03:
            number = rng.choice([*numbers])
            if batch.cancel(number):
                cancelled[number] = len(found.get(number, []))
        for made in batch.step():
            found.setdefault(made.number, []).append(made.token)
            if made.ended:
                ends[made.number] = made.ended
        assert batch.num_running <= NUM_ROWS
    assert len(numbers) == len(requests)
    for number, at in numbers.items():
        if number in cancelled:
            assert found.get(number, []) == wanted[at][: cancelled[number]]
            assert number not in ends
        else:
            assert found[number] == wanted[at]
            is_stop = wanted[at][-1] in requests[at].stops
            assert ends[number] == ("stop" if is_stop else "length")


def test_rows_are_free_at_the_end_and_cancelled_ones_at_once(inference):
    batch = ContinuousBatch(inference)
    numbers = [batch.submit(Request([1, 2], 8)) for _ in range(NUM_ROWS + 2)]
    batch.step()
    assert (batch.num_running, batch.num_waiting) == (NUM_ROWS, 2)
    assert batch.cancel(numbers[0])
    assert not batch.cancel(numbers[0])
    assert batch.cancel(numbers[-1])
    assert (batch.num_running, batch.num_waiting) == (NUM_ROWS - 1, 1)
    batch.step()
    assert (batch.num_running, batch.num_waiting) == (NUM_ROWS, 0)
    while batch.is_busy:
        batch.step()
    assert batch.num_running == 0
    assert set(batch._places.tolist()) == {MAX_LEN}


def test_a_row_without_numbers_ends_alone(inference):
    with torch.no_grad():
        kept = inference.kept.model.embed_tokens.weight[7].clone()
        inference.kept.model.embed_tokens.weight[7] = torch.nan
    try:
        batch = ContinuousBatch(inference)
        bad, good = batch.submit(Request([7, 8], 4)), batch.submit(Request([5, 6], 4))
        made = [m for _ in range(8) for m in batch.step()]
        assert [(m.token, m.ended) for m in made if m.number == bad] == [(None, "error")]
        assert [m.ended for m in made if m.number == good] == ["", "", "", "length"]
    finally:
        with torch.no_grad():
            inference.kept.model.embed_tokens.weight[7] = kept
    again = ContinuousBatch(inference)
    again.submit(Request([5, 6], 4))
    assert [m.token for _ in range(5) for m in again.step()] == alone(inference, Request([5, 6], 4, seed=0, stops=()))


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (Request([], 1), UsageError, "no token"),
        (Request([96], 1), UsageError, "outside of 0 to 95"),
        (Request([1], 0), UsageError, "above 0"),
        (Request([1], 1, seed=2**64), UsageError, "64 bits"),
        (Request([1] * 90, 7), ContextLengthError, "96 places"),
    ],
)
def test_what_cannot_be_generated_is_refused(inference, request_, kind, words):
    batch = ContinuousBatch(inference)
    with pytest.raises(kind, match=words):
        batch.submit(request_)
    assert not batch.is_busy


def test_what_cannot_generate_is_refused():
    with pytest.raises(UsageError, match="cannot generate"):
        ContinuousBatch(zgraph.infer(torch.nn.Linear(2, 2)))
