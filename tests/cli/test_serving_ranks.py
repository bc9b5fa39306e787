"""`zgraph serve --tensor-parallel`: processes that it starts, or a launcher's, and how all of them end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from tests.deep import DEEP
from tests.patience import slowness
from tests.server.small import model, save, tokenizer

SIZES = "--port", "0", "--max-batch", "2", "--max-len", "96"

pytestmark = pytest.mark.skipif(not DEEP, reason="make test-deep")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    found = tmp_path_factory.mktemp("models") / "bytes"
    save(found)
    return str(found)


@contextmanager
def serving(*args: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A command that serves, as a process, and the address that it prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "zgraph", *args], **pipes) as running:
        try:
            line = running.stdout.readline()
            assert line.startswith("bytes answers at http://127.0.0.1:"), (line, running.stderr.read())
            yield running, line.split()[-1]
        finally:
            running.kill()


def descendants(of: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    text = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in text.splitlines()[1:]]
    found = [child for child, parent in parents if parent == of]
    return found + [deeper for child in found for deeper in descendants(child)]


def are_gone(processes: list[int], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds * slowness()
    while any(os.path.exists(f"/proc/{process}") for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{process}") for process in processes)


def answer(url: str, prompt: str = "the", max_tokens: int = 12) -> str:
    body = {"model": "bytes", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    end = time.monotonic() + 30 * slowness()
    while True:
        try:
            return httpx2.post(f"{url}/completions", json=body, timeout=60).json()["choices"][0]["text"]
        except httpx2.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.05)


def alone(prompt: str, max_tokens: int = 12) -> str:
    import torch

    from zgraph.server.text import Words

    words = Words(tokenizer())
    ids = torch.tensor([words.tokens(prompt)])
    made = model().generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    return words.whole(made[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("launcher", [(), ("launch", "--nproc-per-node", "2", "-m", "zgraph")])
def test_it_answers_and_sigterm_ends_all_ranks_after_those_under_way(saved, launcher):
    with serving(*launcher, "serve", saved, *SIZES, "--tensor-parallel", "2") as (running, url):
        assert answer(url) == alone("the")
        assert httpx2.get(url.replace("/v1", "/health")).json()["ranks"] == 2
        others = descendants(running.pid)
        prompts, texts = ["a", "b", "the", "cd"] * 4, [""] * 16
        body = {"model": "bytes", "prompt": prompts, "max_tokens": 90, "stream": True, "temperature": 0}
        with httpx2.stream("POST", f"{url}/completions", json=body, timeout=60) as stream:
            lines = filter(None, stream.iter_lines())
            found = [next(lines)]
            running.send_signal(signal.SIGTERM)
            found += lines
        assert found.pop() == "data: [DONE]"
        for line in found:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
        assert running.wait(30 * slowness()) in (0, 128 + signal.SIGTERM)
        assert texts == [alone(prompt, 90) for prompt in prompts[:4]] * 4
        assert others
        assert are_gone(others)


def test_a_rank_that_is_killed_ends_the_server_with_an_error(saved):
    with serving("serve", saved, *SIZES, "--tensor-parallel", "2") as (running, url):
        answer(url)
        (other,) = descendants(running.pid)
        os.kill(other, signal.SIGKILL)
        assert running.wait(20 * slowness()) == 1
        assert "rank 1 was killed by signal 9" in running.stderr.read()


def test_under_open_streams_too(saved):
    with serving("serve", saved, *SIZES, "--tensor-parallel", "2") as (running, url):
        answer(url)
        (other,) = descendants(running.pid)
        body = {"model": "bytes", "prompt": ["a", "b"] * 8, "max_tokens": 90, "stream": True, "temperature": 1.0}
        with httpx2.stream("POST", f"{url}/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(other, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert "server_error" in rest[-1]
        assert running.wait(20 * slowness()) == 1
        assert "rank 1" in running.stderr.read()


@pytest.mark.parametrize("launcher", [(), ("launch", "--nproc-per-node", "2", "-m", "zgraph")])
@pytest.mark.parametrize("streams", [True, False])
def test_a_rank_that_is_stopped_is_named_and_ends_the_server(saved, streams, launcher):
    with serving(*launcher, "serve", saved, *SIZES, "--tensor-parallel", "2") as (running, url):
        answer(url)
        other = next(pid for pid in descendants(running.pid) if rank_of(pid) == "1")
        body = {"model": "bytes", "prompt": ["a", "b"] * 8, "max_tokens": 90, "stream": True, "temperature": 1.0}
        if streams:
            with httpx2.stream("POST", f"{url}/completions", json=body, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                began = stopped(other)
                rest = [line for line in lines if line]
            assert "server_error" in rest[-1]
            assert time.monotonic() - began < 10 * slowness()
        else:
            began = stopped(other)
        code = running.wait(60 * slowness())
        seconds = time.monotonic() - began
        assert code == 1
        assert "rank 1 of [0, 1] is gone" in (said := running.stderr.read())
        assert "no heartbeat came" in said
        assert seconds < (45 if launcher else 15) * slowness(), "a launcher gives its ranks 30 s to end"
        assert are_gone([other])


def rank_of(pid: int) -> str:
    """The rank that a process was started as; empty if as none."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        found = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
    return found.get(b"RANK", b"").decode()


def stopped(pid: int) -> float:
    """Stop a process; when it was."""
    os.kill(pid, signal.SIGSTOP)
    return time.monotonic()


def test_nothing_is_left_where_the_first_is_killed(saved):
    with serving("serve", saved, *SIZES, "--tensor-parallel", "2") as (running, url):
        answer(url)
        others = descendants(running.pid)
        running.kill()
        assert are_gone(others)


def test_mistakes(saved, command, monkeypatch):
    for args, code, words in (
        (("--tensor-parallel", "0"), 2, "tensor-parallel"),
        (("--tensor-parallel", "2", "--activations", "int8", "--weights", "int8"), 2, "activations"),
        (("--tensor-parallel", "4"), 2, "2 heads of keys and values do not divide over 4 ranks"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "zgraph", "serve", saved, *SIZES, *args], capture_output=True, text=True, check=False
        )
        assert ended.returncode == code
        assert words in ended.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    found, _, error = command("chat", saved)
    assert found == 2
    assert "pass --tensor-parallel 2" in error


def test_a_conversation_over_ranks(saved):
    args = "chat", saved, "--max-len", "64", "--max-tokens", "6", "--temperature", "0", "--tensor-parallel", "2"
    ended = subprocess.run(
        [sys.executable, "-m", "zgraph", *args], input="hi\n\n", capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert alone("<user>hi<assistant>", 6).strip()[:1] in ended.stdout
