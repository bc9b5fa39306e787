"""Fixtures that all tests of the command share: a folder to run it in, and how to."""

import io
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from zgraph.cli.main import main
from zgraph.runfile.format import load_run
from zgraph.runfile.records import RUN, RankRecord, rank_files, save_rank

MODEL = """
from types import SimpleNamespace

from torch import nn

class Gone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x.sum()

def gone():
    import torch
    return Gone(), {"x": torch.ones(8, 64)}

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=64)
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)

    def forward(self, input_ids, labels):
        return nn.functional.cross_entropy(self.head(self.embed(input_ids)).flatten(0, 1), labels.flatten())

def words():
    return Words()

def fails():
    return 1 // 0

class Other(Words):
    def forward(self, idx, targets=None):
        return super().forward(idx, targets)

def other():
    return Other()

def misnamed():
    import torch
    return Gone(), {"y": torch.ones(8, 64)}
"""

SCRIPT = """
import os, sys, time
from pathlib import Path
rank = os.environ["RANK"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']} threads, {sys.argv[1:]}", flush=True)
if "--fail" in sys.argv:  # a launcher ends the others when one fails: after all have printed
    Path(f"printed-{rank}").touch()
    while not all(Path(f"printed-{other}").exists() for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)
sys.exit(7 if "--fail" in sys.argv and rank == "1" else 0)
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of a small model, its function in a file, a configuration of Hugging Face's, and a script."""
    made = tmp_path_factory.mktemp("cli")
    (made / "model.py").write_text(MODEL)
    (made / "train.py").write_text(SCRIPT)
    (made / "wrong.py").write_text(Path(__file__).with_name("wrong.py").read_text())
    config = hf.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(made / "llama-70b")
    return made


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the zgraph command: its exit code, what it wrote, and what it said of errors."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # and again afterwards: launch sets it

    def run(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        torch.compiler.reset()
        monkeypatch.setattr(sys, "argv", ["zgraph", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def zgraph_command(folder, monkeypatch, command):
    """The same, in that folder."""
    monkeypatch.chdir(folder)
    if not Path("run.zg").exists():
        code, _, error = command("trace", "model.py:gone", "--world", "2", "--dtype", "f32", "-o", "run.zg")
        assert code == 0, error
    return command


def record_costs() -> None:
    """Make the folder `costs`: a training of `run.zg` on two ranks that took three times as long as was planned."""
    made = Path("costs")
    if made.exists():
        return
    made.mkdir()
    (made / RUN).write_bytes(Path("run.zg").read_bytes())
    timeline = load_run(made / RUN).timeline
    assert timeline is not None
    nodes = {s.node: 3 * (s.end_us - s.start_us) for s in timeline.spans if s.lane == "compute"}
    for rank in range(2):
        save_rank(RankRecord(rank=rank, num_steps=1, nodes=nodes), made)
        rank_files(made, rank)[1].write_text(f"{3 * timeline.step_us}\n" * 10)
