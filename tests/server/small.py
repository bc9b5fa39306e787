"""A small language model whose tokens are bytes, and a server of it that listens."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zgraph.server.app import Limits, Server
from zgraph.server.serve import bound, hosts_of, listener
from zgraph.server.text import Words
from zgraph.server.worker import Worker

MAX_LEN, NUM_ROWS = 96, 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte, and one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    found = hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    found.chat_template = TEMPLATE
    return found


def model(width: int = 32) -> torch.nn.Module:
    """A model of 257 tokens whose likeliest ones vary."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=256,
    )
    found = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3)
        found.lm_head.weight[128:256] *= 0.3  # mostly letters
    return found


def save(folder: Path) -> None:
    """Save both as transformers does."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@contextmanager
def listening(generator, limits: Limits | None = None, max_waiting: int = 256) -> Iterator[tuple[Server, str]]:
    """A server, and its address."""
    worker = Worker(generator, max_waiting)
    server = Server(worker, Words(tokenizer()), "small", limits, hosts_of("127.0.0.1"))
    socket, runs = bound("127.0.0.1", 0), listener(server)
    thread = threading.Thread(target=runs.run, args=([socket],))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        runs.should_exit = True
        thread.join()
        assert not worker.is_alive
