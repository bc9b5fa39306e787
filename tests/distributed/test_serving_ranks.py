"""A server over ranks that compute together: the answers of one rank, and the end of all where one ends."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import httpx2
import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.deep import DEEP, deep
from tests.server.small import MAX_LEN, NUM_ROWS, listening, model
from tests.server.test_server import GOOD, SAY, alone, bodies, client_of, idle, in_a_thread, metrics, streamed
from zgraph.inference.orders import follow

from .pool import Pool

KEPT: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8 and its cache": {"weights": "int8", "kv": "int8"},
    "int4": {"weights": "int4", "group": 32},
}


def served(_: DeviceMesh, kept: str, count: int) -> dict[str, Any]:
    """Findings of the first rank about its server, and of the other about the end."""
    whole = model(64 if kept == "int4" else 32)
    one = zgraph.infer(whole, max_batch=NUM_ROWS, max_len=MAX_LEN, **KEPT[kept])
    both = zgraph.infer(whole, max_batch=NUM_ROWS, max_len=MAX_LEN, tensor_parallel=2, **KEPT[kept])
    asked = [body | {"temperature": 0} for body in bodies(count)]
    wanted = [alone(both, body) for body in asked]
    if dist.get_rank():
        peers, rests = both.programs.session.peers, [0.0, 0.0]
        told = peers.told

        def timed(*given: str) -> str:
            began = time.thread_time(), time.monotonic()
            word = told(*given)
            rests[0] += time.thread_time() - began[0]
            rests[1] += time.monotonic() - began[1]
            return word

        peers.told = timed  # type: ignore[method-assign]
        follow(both)
        return {"busy": rests[0] / rests[1]}
    drawn = bodies(2)[1]
    with listening(both) as (server, url):

        async def all_of_them() -> list[str]:
            async with client_of(url) as client:
                return await asyncio.gather(*(streamed(client, body) for body in asked))

        with httpx2.Client(base_url=url, timeout=60) as client:
            found = {"same": in_a_thread(all_of_them()) == wanted, "health": client.get("/health").json()}
            time.sleep(0.7)  # the others rest, and are woken again
            found["refused"] = client.post(SAY, json=GOOD | {"max_tokens": MAX_LEN}).status_code
            texts = [client.post(SAY, json=drawn).json()["choices"][0]["text"] for _ in range(2)]
            found["drawn"] = texts[0] == texts[1]
            found["ranks"] = metrics(client)["zgraph_ranks"]
        gone = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        gone.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 51\r\n\r\n{"model": "small", "prompt": "a", "max_tokens": 90}'
        )
        end = time.monotonic() + 20
        while not server.worker.num_running and time.monotonic() < end:
            time.sleep(0.001)
        gone.close()
        found["freed"] = idle(server)
        found["error"] = str(server.worker.error)
        orders = server.worker._batch.leader
        found["order"] = orders.num_bytes
        found["keys"] = [orders.peers.store.check([orders.key(n)]) for n in range(orders.num_rests)]
    found["offline"] = kept == "int4" or [alone(one, body) for body in asked] == wanted
    return found


@pytest.mark.parametrize("kept", ["fp32", deep("int8 and its cache"), deep("int4")])
def test_answers_of_a_server_over_two_ranks_are_those_of_one(pair: Pool, kept: str) -> None:
    first, other = pair.run(served, 2, kept, 50 if DEEP else 6, limit_s=120)
    assert first["same"]
    assert first["offline"]
    assert first["drawn"]
    assert first["freed"]
    assert first["refused"] == 400
    assert first["health"] == {"status": "ok", "ranks": 2}
    assert first["ranks"] == 2
    assert first["error"] == "None"
    assert first["order"] == 8 * (3 + 3 * NUM_ROWS + 2 * 64)
    assert not any(first["keys"][:-2])  # what ended a rest is forgotten after the next
    assert other["busy"] < 0.05


def fails(_: DeviceMesh) -> dict[str, Any]:
    """The words that are told where the other rank's step fails under open streams."""
    both = zgraph.infer(model(), max_batch=NUM_ROWS, max_len=MAX_LEN, tensor_parallel=2)
    if dist.get_rank():
        whole, left = both.calls.decode, iter(range(3))

        def decode(*given: Any) -> Any:
            if next(left, None) is None:
                raise MemoryError("no memory")
            return whole(*given)

        both.calls.decode = decode  # type: ignore[method-assign]
        try:
            follow(both)
        except MemoryError as error:
            return {"error": str(error)}
        raise AssertionError("nothing was raised")
    with listening(both) as (server, url):
        began = time.monotonic()
        body = {"model": "small", "prompt": ["ab", "cd"], "max_tokens": 60, "temperature": 0.0, "stream": True}
        text = httpx2.post(url + SAY, json=body, timeout=60).text
        seconds = time.monotonic() - began
        end = time.monotonic() + 20
        while server.worker.error is None and time.monotonic() < end:
            time.sleep(0.01)
        return {"text": text, "seconds": seconds, "error": repr(server.worker.error)}


def test_a_step_that_fails_on_another_rank_ends_the_server_and_its_streams(pair: Pool) -> None:
    first, other = pair.run(fails, 2, limit_s=120, spoils=True)
    assert other["error"] == "no memory"
    assert first["error"].startswith("PeerError")
    assert "no memory" in first["error"]
    assert '"server_error"' in first["text"]
    assert "[DONE]" not in first["text"]
