"""The commands that answer: a server as a process of its own, a conversation, and what is refused."""

import signal
import subprocess
import sys
import time

import httpx2
import pytest

from tests.server.small import save, tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    found = tmp_path_factory.mktemp("models") / "bytes"
    save(found)
    return found


def test_a_server_answers_until_it_is_told_to_stop(saved):
    args = "serve", str(saved), "--port", "0", "--max-batch", "2", "--max-len", "64", "--weights", "int8"
    running = subprocess.Popen([sys.executable, "-m", "zgraph", *args], stdout=subprocess.PIPE, text=True)
    try:
        line = running.stdout.readline()
        assert line.startswith("bytes answers at http://127.0.0.1:"), line
        url = line.split()[-1]
        asked = {"model": "bytes", "prompt": "a", "max_tokens": 3}
        end = time.monotonic() + 30
        while True:
            try:
                answer = httpx2.post(f"{url}/completions", json=asked, timeout=60)
                break
            except httpx2.ConnectError:
                assert time.monotonic() < end
                time.sleep(0.05)
        assert answer.json()["usage"]["completion_tokens"] in (1, 2, 3)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) in (0, -signal.SIGTERM)
    finally:
        running.kill()
        running.wait()


def test_a_conversation(command, saved, monkeypatch):
    said = iter(["hello", ""])
    monkeypatch.setattr("rich.prompt.Prompt.ask", lambda *_, **__: next(said))
    code, out, _ = command("chat", str(saved), "--max-len", "64", "--max-tokens", "8", "--temperature", "0")
    assert code == 0
    assert out.strip()


def test_a_conversation_with_weights_that_a_text_calibrated(command, saved, monkeypatch, tmp_path):
    from zgraph.inference import model

    seen, real = [], model.rounded_integers
    monkeypatch.setattr(model, "rounded_integers", lambda *given: seen.append(given[1]) or real(*given))
    monkeypatch.setattr("rich.prompt.Prompt.ask", lambda *_, **__: "")
    text = tmp_path / "text.txt"
    text.write_text("abc " * 100)
    options = "--max-len", "64", "--group", "32", "--calibrate", str(text)
    assert command("chat", str(saved), "--weights", "int4", *options)[0] == 0
    assert seen[0].shape == (1, 256)
    code, _, error = command("chat", str(saved), *options)
    assert code == 2
    assert "calibrate=" in error


def test_what_was_said_is_part_of_the_next_prompt():
    import torch

    import zgraph
    from tests.server.small import model
    from zgraph.errors import ContextLengthError
    from zgraph.inference.sampling import Sampling
    from zgraph.server.talk import Talk
    from zgraph.server.text import Words

    whole, words = model(), Words(tokenizer())
    inference = zgraph.infer(whole, max_len=64)
    talk = Talk(inference, words, Sampling(), 0, "s")
    first = "".join(talk.answer("hi", 6))
    taken = next(talk.answer("you", 40))
    assert [m["content"] for m in talk.messages] == ["s", "hi", first, "you", taken]
    ids = torch.tensor([words.chat(talk.messages[:2])])
    made = inference.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
    assert first == words.whole(made.tolist())
    assert not talk.batch.is_busy
    with pytest.raises(ContextLengthError, match="larger --max-len"):
        next(talk.answer("a" * 60, 6))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("serve", "nowhere", "--port", "0"), "no folder nowhere"),
        (("serve", "{saved}", "--weights", "int3"), "int8, int4"),
        (("serve", "{saved}", "--host", "192.0.2.1"), "cannot listen"),
        (("chat", "{saved}", "--activations", "int8"), "weights"),
    ],
)
def test_mistakes(command, saved, args, words):
    code, _, err = command(*(arg.format(saved=saved) for arg in args))
    assert code == 2
    assert words in err
