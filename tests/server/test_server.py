"""Answers over HTTP are those of the model alone; what is malformed is refused; who goes away frees the place."""

import asyncio
import gc
import json
import random
import socket
import threading
import time
import tracemalloc
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2
import pytest
import torch

import zgraph
from tests.deep import DEEP
from tests.server.small import MAX_LEN, NUM_ROWS, listening, model, tokenizer
from zgraph.server.app import Limits
from zgraph.server.text import Words

T = TypeVar("T")


@pytest.fixture(scope="module")
def inference():
    whole = model()
    found = zgraph.infer(whole, max_batch=NUM_ROWS, max_len=MAX_LEN)
    found.kept = whole
    return found


@pytest.fixture(scope="module")
def served(inference):
    with listening(inference) as found:
        yield found


@pytest.fixture(scope="module")
def offline(inference):
    """The model on its own, for prompts one by one: while the server has nothing to do."""
    return inference


def bodies(count: int) -> list[dict]:
    """Requests of different lengths, half of them drawn."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        prompt = "".join(rng.choice("abcdefgh äß漢") for _ in range(rng.choice([1, 7, 20])))
        body = {"model": "small", "prompt": prompt, "max_tokens": rng.randint(1, 24), "temperature": 0}
        if number % 2:
            body |= {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": number}
        found.append(body)
    return found


def alone(offline, body: dict) -> str:
    """The text that the model itself gives."""
    words = Words(tokenizer())
    ids = torch.tensor([words.tokens(body["prompt"])])
    how = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "top_k": 40} if body["temperature"] else {}
    draws = torch.Generator().manual_seed(body.get("seed", 0))
    made = offline.generate(ids, max_new_tokens=body["max_tokens"], generator=draws, **how)
    return words.whole(made[0, ids.shape[1] :].tolist())


async def streamed(client, body: dict) -> str:
    """The text of a stream, put together."""
    text, ends = "", []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ")
            if line == "data: [DONE]":
                ends.append("done")
                continue
            (choice,) = json.loads(line[6:])["choices"]
            text += choice["text"]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert len(ends) == 2
    assert ends[0] in ("stop", "length")
    return text


def client_of(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=100))


def in_a_thread(made: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread: another test may have left a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, made).result()


def test_fifty_streams_at_once_are_the_answers_of_the_model_alone(served, offline):
    asked = bodies(50)
    wanted = [alone(offline, body) for body in asked]

    async def all_of_them() -> list[str]:
        async with client_of(served[1]) as client:
            return await asyncio.gather(*(streamed(client, body) for body in asked))

    assert in_a_thread(all_of_them()) == wanted
    assert idle(served[0])


def idle(server, seconds: float = 20) -> bool:
    """Whether no request has a row or waits, now or soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (server.worker.num_running, server.worker.num_waiting) == (0, 0):
            return True
        time.sleep(0.01)
    return False


def test_whole_answers(served, offline):
    first, second = bodies(3)[::2]
    with httpx2.Client(base_url=served[1], timeout=60) as client:
        found = client.post("/v1/completions", json=first).json()
        assert found["object"] == "text_completion"
        assert found["choices"][0]["text"] == alone(offline, first)
        made = found["usage"]["completion_tokens"]
        assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + made
        assert found["choices"][0]["finish_reason"] == ("length" if made == first["max_tokens"] else "stop")
        several = {**first, "prompt": [first["prompt"], second["prompt"]], "max_tokens": second["max_tokens"]}
        texts = [choice["text"] for choice in client.post("/v1/completions", json=several).json()["choices"]]
        assert texts[1] == alone(offline, second)
        tokens = {**first, "prompt": Words(tokenizer()).tokens(first["prompt"])}
        assert client.post("/v1/completions", json=tokens).json()["choices"] == found["choices"]


def test_chats(served, offline):
    asked = {
        "model": "small",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_completion_tokens": 12,
        "temperature": 0,
    }
    wanted = alone(offline, {"prompt": "<system>s<user>hi<assistant>", "max_tokens": 12, "temperature": 0})
    with httpx2.Client(base_url=served[1], timeout=60) as client:
        found = client.post("/v1/chat/completions", json=asked).json()
        assert found["choices"][0]["message"] == {"role": "assistant", "content": wanted}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = client.post("/v1/chat/completions", json=asked | options).text.split("\n\n")
        pieces = [json.loads(line[6:]) for line in lines[:-2]]
        assert "".join(p["choices"][0]["delta"]["content"] for p in pieces[:-1]) == wanted
        assert pieces[-1]["usage"] == found["usage"]
        assert lines[-2:] == ["data: [DONE]", ""]


def test_a_string_ends_the_text_and_frees_the_row(served, offline):
    asked = {"model": "small", "prompt": "the", "max_tokens": 60, "temperature": 0}
    whole = alone(offline, asked)
    stop = whole[8:11]
    assert len(stop) == 3
    with httpx2.Client(base_url=served[1], timeout=60) as client:
        for stream in (False, True):
            body = asked | {"stop": ["never there", stop], "stream": stream}
            answer = client.post("/v1/completions", json=body)
            texts = (
                [json.loads(line[6:]) for line in answer.text.split("\n\n") if "{" in line]
                if stream
                else [answer.json()]
            )
            assert "".join(t["choices"][0]["text"] for t in texts) == whole[: whole.find(stop)]
            assert texts[-1]["choices"][0]["finish_reason"] == "stop"
    assert idle(served[0])


GOOD = {"model": "small", "prompt": "abc", "max_tokens": 2}
CHAT = {"model": "small", "messages": [{"role": "user", "content": "a"}]}
SAY, TALK = "/v1/completions", "/v1/chat/completions"
MALFORMED = {
    "no JSON": (SAY, b"{", 400, "JSON"),
    "no object": (SAY, b"[1]", 400, "object"),
    "no text": (SAY, b'{"model": "small", "prompt": "\xff"}', 400, "the body"),
    "half a character": (SAY, rb'{"model": "small", "prompt": "\ud800"}', 400, "the body"),
    "deep": (SAY, b'{"model":' + b"[" * 50_000, 400, "the body"),
    "no prompt": (SAY, {"model": "small"}, 400, "prompt"),
    "an empty prompt": (SAY, GOOD | {"prompt": ""}, 400, "no token"),
    "no prompts": (SAY, GOOD | {"prompt": []}, 400, "1 to 16"),
    "many prompts": (SAY, GOOD | {"prompt": ["a"] * 17}, 400, "1 to 16"),
    "another model": (SAY, GOOD | {"model": "large"}, 404, "here is 'small'"),
    "a word for a number": (SAY, GOOD | {"max_tokens": "2"}, 400, "max_tokens"),
    "no tokens": (SAY, GOOD | {"max_tokens": 0}, 400, "max_tokens"),
    "too many": (SAY, GOOD | {"max_tokens": MAX_LEN}, 400, "96 places"),
    "an endless prompt": (SAY, GOOD | {"prompt": "a" * 1000}, 400, "96 places"),
    "hot": (SAY, GOOD | {"temperature": 3}, 400, "temperature"),
    "no number": (SAY, b'{"model": "small", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    "nearly cold": (SAY, GOOD | {"temperature": 1e-9}, 400, "at least 0.01"),
    "no mass": (SAY, GOOD | {"top_p": 0}, 400, "top_p"),
    "a large seed": (SAY, GOOD | {"seed": 2**64}, 400, "seed"),
    "no such token": (SAY, GOOD | {"prompt": [1, 257]}, 400, "outside of 0 to 256"),
    "an empty stop": (SAY, GOOD | {"stop": [""]}, 400, "stop"),
    "many stops": (SAY, GOOD | {"stop": ["a"] * 5}, 400, "at most 4"),
    "several": (SAY, GOOD | {"n": 2}, 400, "n:"),
    "a penalty": (SAY, GOOD | {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    "unknown": (SAY, GOOD | {"tempreature": 1}, 400, "not known here"),
    "numbers without a stream": (SAY, GOOD | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "no messages": (TALK, {"model": "small", "messages": []}, 400, "messages"),
    "no role": (TALK, {"model": "small", "messages": [{"role": "cat", "content": "a"}]}, 400, "role"),
    "no text part": (
        TALK,
        {"model": "small", "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        400,
        "text",
    ),
    "what the template refuses": (
        TALK,
        {"model": "small", "messages": CHAT["messages"] + [{"role": "system", "content": "b"}]},
        400,
        "comes first",
    ),
    "a tool": (TALK, CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
    "large": (SAY, GOOD | {"prompt": "a" * 70_000}, 413, "65,536"),
}


@pytest.fixture(scope="module")
def refusing(inference):
    """The address of a server that takes little."""
    with listening(inference, Limits(body_bytes=65_536, body_seconds=0.5)) as found:
        yield found[1]


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_is_refused(refusing, case):
    path, body, status, words = MALFORMED[case]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx2.post(refusing + path, content=raw, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_other_calls_are_refused(refusing):
    with httpx2.Client(base_url=refusing, timeout=60) as client:
        assert client.post(SAY, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        assert client.get(SAY).status_code == 405
        assert client.get("/v1/other").status_code == 404
        assert client.get("/v1/models/other").status_code == 404
        assert client.get("/health", headers={"host": "elsewhere.example"}).status_code == 400
    host, port = refusing.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        assert b" 408 " in slow.recv(4096)


def test_models_health_and_metrics(served):
    with httpx2.Client(base_url=served[1], timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "small"
        assert client.get("/v1/models/small").json()["object"] == "model"
        assert client.get("/health").json() == {"status": "ok", "ranks": 1}
        before = metrics(client)
        client.post(SAY, json=GOOD | {"temperature": 0})
        client.post(SAY, json=GOOD | {"n": 2})
        after = metrics(client)
    assert after["zgraph_prompt_tokens_total"] - before["zgraph_prompt_tokens_total"] == 3
    assert after["zgraph_made_tokens_total"] - before["zgraph_made_tokens_total"] in (1, 2)
    assert after['zgraph_answers_total{path="/v1/completions",status="400"}'] >= 1
    assert after["zgraph_first_token_seconds_count"] > before["zgraph_first_token_seconds_count"]
    assert after["zgraph_rows"] == NUM_ROWS
    assert after["zgraph_ranks"] == 1


def metrics(client) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(served, stream):
    server, url = served
    host, port = url.removeprefix("http://").split(":")
    asked = {"model": "small", "prompt": "a", "max_tokens": MAX_LEN - 1, "stream": stream, "logit_bias": {}}
    sockets = []
    slow = server.worker.generator.calls.decode
    server.worker.generator.calls.decode = lambda *given: time.sleep(0.1) or slow(*given)
    try:
        for _ in range(NUM_ROWS + 2):
            found = socket.create_connection((host, int(port)))
            raw = json.dumps(asked).encode()
            found.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
            )
            sockets.append(found)
        end = time.monotonic() + 20
        while (server.worker.num_running, server.worker.num_waiting) != (NUM_ROWS, 2) and time.monotonic() < end:
            time.sleep(0.01)
        assert (server.worker.num_running, server.worker.num_waiting) == (NUM_ROWS, 2)
        for found in sockets:
            found.close()
        assert idle(server, 5)  # to the end, they would take ten
    finally:
        server.worker.generator.calls.decode = slow


def test_who_comes_too_much_is_told_to_come_again(inference):
    with listening(inference, max_waiting=0) as (_, url), httpx2.Client(base_url=url, timeout=60) as client:
        answer = client.post(SAY, json=GOOD | {"prompt": ["a"] * (NUM_ROWS + 1)})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert client.post(SAY, json=GOOD | {"prompt": ["a"] * NUM_ROWS}).status_code == 200


def test_those_under_way_are_answered_when_the_server_stops(inference):
    async def asked(url: str) -> list[str]:
        async with client_of(url) as client:
            return await asyncio.gather(*(streamed(client, body) for body in bodies(8)))

    found: list[str] = []
    with listening(inference) as (server, url):
        thread = threading.Thread(target=lambda: found.extend(asyncio.run(asked(url))))
        thread.start()
        end = time.monotonic() + 20
        while server.worker.num_running < NUM_ROWS and not found and time.monotonic() < end:
            time.sleep(0.002)
    thread.join()
    assert len(found) == 8


def test_a_step_that_fails_is_an_error_of_the_server_and_the_next_works(served):
    server, url = served
    calls = server.worker.generator.calls
    whole = calls.decode

    def fails(*_):
        raise RuntimeError("no memory")

    with httpx2.Client(base_url=url, timeout=60) as client:
        calls.decode = fails
        try:
            assert client.post(SAY, json=GOOD | {"max_tokens": 9}).status_code == 500
            text = client.post(SAY, json=GOOD | {"max_tokens": 9, "stream": True}).text
            assert '"error"' in text
        finally:
            calls.decode = whole
        assert client.post(SAY, json=GOOD).status_code == 200


def test_many_requests_leave_nothing_behind(served):
    count = 1000 if DEEP else 60
    asked = [body | {"max_tokens": 3} for body in bodies(20)]

    async def some(number: int) -> None:
        async with client_of(served[1]) as client:
            for begin in range(0, number, 20):
                await asyncio.gather(*(streamed(client, body) for body in asked[: min(20, number - begin)]))

    in_a_thread(some(20))
    tracemalloc.start()
    try:
        in_a_thread(some(20))
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        in_a_thread(some(count))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert idle(served[0])
    assert grown < 60_000, f"{grown} bytes more after {count} requests"
    worker = served[0].worker
    assert (len(worker._tickets), len(worker._new), len(worker._dropped), worker._num_pending) == (0, 0, 0, 0)
