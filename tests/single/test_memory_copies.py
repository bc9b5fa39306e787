"""Copies in memory on one rank: which are chosen, what is served, what is refused, and what is left behind."""

from __future__ import annotations

import json
import random
import socket
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import zgraph
from tests.deep import DEEP
from tests.single.memory_engines import MARK, engine_of, killed, marks, settled, step
from zgraph.engine.checkpoint import background
from zgraph.engine.checkpoint.memory import links
from zgraph.engine.checkpoint.memory.choice import Copy, choose, neighbours
from zgraph.engine.checkpoint.memory.copies import Copies
from zgraph.engine.checkpoint.memory.links import Address, Client, Server
from zgraph.engine.checkpoint.memory.shelf import Mark, Shelf
from zgraph.engine.checkpoint.ranks import Beside
from zgraph.errors import CheckpointError, UsageError

# --- one rank --------------------------------------------------------------------------------------------------------


def test_a_process_that_starts_again_goes_on_where_its_memory_is(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    for _ in range(8):
        step(engine)
    settled(engine)
    assert marks(tmp_path) == [6, 8]
    expected = [step(engine) for _ in range(3)]
    settled(engine)
    assert marks(tmp_path) == [8, 10]
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    (_,) = tmp_path.glob("zgraph-*/alone/rank_0/*.10.*/state.json")
    next(tmp_path.glob("zgraph-*/alone/rank_0/*.10.*/state.json")).unlink()
    killed()
    again = engine_of(tmp_path)
    where, client_state = again.load_checkpoint(tmp_path / "none")
    assert where is not None
    assert where.startswith(str(tmp_path))
    assert (again.global_steps, client_state) == (8, {})
    assert [step(again) for _ in range(3)] == expected
    settled(again)
    assert marks(tmp_path) == [8, 10], "the copy to go on from, and the new one"
    again.destroy()
    assert marks(tmp_path) == []


def test_a_job_that_begins_anew_does_not_find_what_was_before(tmp_path: Path) -> None:
    first = engine_of(tmp_path)
    for _ in range(4):
        step(first)
    settled(first)
    killed()
    anew = engine_of(tmp_path)
    for _ in range(2):
        step(anew)
    settled(anew)
    assert marks(tmp_path) == [2]


def test_a_checkpoint_on_disk_that_is_as_new_is_taken(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    step(engine)
    step(engine)
    engine.save_checkpoint(tmp_path / "disk", client_state={"on": "disk"})
    settled(engine)
    killed()
    assert engine_of(tmp_path).load_checkpoint(tmp_path / "disk")[1] == {"on": "disk"}
    step(engine)
    step(engine)
    settled(engine)
    assert engine_of(tmp_path).load_checkpoint(tmp_path / "disk")[1] == {}
    assert engine_of(tmp_path).load_checkpoint(tmp_path / "disk", "global_step2")[1] == {"on": "disk"}
    assert engine_of(tmp_path).load_checkpoint(tmp_path / "disk", load_module_only=True)[1] == {"on": "disk"}


def test_copies_that_take_too_much_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    keys = {"every": 1, "job": "alone", "folder": str(tmp_path), "limit": "64KiB"}
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}, "checkpoint": {"memory": keys}}
    engine = zgraph.initialize_engine(model=nn.Linear(6, 500), config=config)[0]  # type: ignore[arg-type]
    step(engine)
    with pytest.raises(CheckpointError, match=r"take 84\d\d\d bytes, and checkpoint\.memory\.limit is 65536"):
        settled(engine)
    assert marks(tmp_path) == []


def test_a_copy_that_fails_is_told_and_those_before_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(tmp_path)
    with patch.object(Shelf, "complete", side_effect=OSError(28, "No space left on device")):
        step(engine)
        step(engine)
        with pytest.raises(CheckpointError, match="No space left"):
            settled(engine)
    step(engine)
    step(engine)
    settled(engine)
    with patch.object(Shelf, "complete", side_effect=OSError(28, "No space left on device")):
        step(engine)
        step(engine)
        settled(engine)
    assert "no copy in memory of step 6" in caplog.text
    assert "that of step 4 stays" in caplog.text
    assert marks(tmp_path) == [4]


def test_a_job_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UsageError, match='give "job" there, or torchrun --rdzv-id'):
        engine_of(tmp_path, job=None)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    engine_of(tmp_path, job=None)


def test_a_folder_of_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    Shelf.of(tmp_path, "job")
    (home,) = tmp_path.glob("zgraph-*")
    (home / "alone").symlink_to(tmp_path / "else")
    engine = engine_of(tmp_path)
    step(engine)
    with pytest.raises(CheckpointError, match=r"is a link.*give another checkpoint\.memory\.folder"):
        step(engine)


# --- faults of one rank ----------------------------------------------------------------------------------------------


def test_a_full_memory_leaves_nothing_half_written(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    full = OSError(28, "No space left on device")
    with patch.object(background, "write_parts", side_effect=full):
        for _ in range(2):
            step(engine)
        with pytest.raises(CheckpointError, match="No space"):
            settled(engine)
    assert not list(tmp_path.glob("zgraph-*/alone/rank_0/.[!l]*")), "no draft takes up what is left"
    assert marks(tmp_path) == []


def test_a_copy_that_others_could_not_make_is_removed(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    for _ in range(2):
        step(engine)
    settled(engine)
    with patch.object(Beside, "gather", lambda _, problem: [problem, "no room"]):
        for _ in range(2):
            step(engine)
        settled(engine)
    assert marks(tmp_path) == [2]


@pytest.mark.parametrize("name", ["remove_but", "begin"])
def test_a_snapshot_that_is_not_written_holds_up_nobody(tmp_path: Path, name: str) -> None:
    """Training waits while the snapshot is larger than the memory that it may take, and somebody must take it."""
    torch.manual_seed(0)
    keys = {"every": 1, "job": "alone", "folder": str(tmp_path)}
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW"},
        "checkpoint": {"memory": keys, "memory_limit": "64KiB"},
    }
    engine = zgraph.initialize_engine(model=nn.Linear(6, 20_000), config=config)[0]  # type: ignore[arg-type]
    with patch.object(Shelf, name, side_effect=OSError(28, "No space left on device")):
        trained = threading.Thread(target=step, args=(engine,), daemon=True)
        trained.start()
        trained.join(30)
        assert not trained.is_alive(), "it waits for memory that nobody gives back"
        with pytest.raises(CheckpointError, match="No space left"):
            settled(engine)


def test_what_nobody_foresaw_is_told_to_all(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    with patch.object(Shelf, "complete", side_effect=KeyError("what")):
        for _ in range(2):
            step(engine)
        with pytest.raises(CheckpointError, match="'what'"):
            settled(engine)


def test_copies_of_another_run_are_refused_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(tmp_path)
    for _ in range(2):
        step(engine)
    settled(engine)
    killed()
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}}
    memory = {"every": 2, "job": "alone", "folder": str(tmp_path)}
    other = zgraph.initialize_engine(
        model=nn.Linear(6, 7),
        config={**config, "checkpoint": {"memory": memory}},  # type: ignore[arg-type]
    )[0]
    with pytest.raises(CheckpointError, match=r"(?s)job alone, step 2: .*give another checkpoint\.memory\.job"):
        other.load_checkpoint(tmp_path / "none")
    assert "of job alone, made " in caplog.text


def test_the_end_leaves_no_copies_of_other_numbers_of_ranks(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    for _ in range(2):
        step(engine)
    settled(engine)
    shelf = Shelf.of(tmp_path, "alone")
    draft = shelf.draft(3, MARK)
    shelf.begin(draft)
    shelf.complete(draft, 3, MARK)
    engine.destroy()
    assert not list(tmp_path.glob("zgraph-*/*"))


def test_replicas_of_an_elastic_job_have_copies_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZGRAPH_ELASTIC_REPLICA", "1")
    copies = engine_of(tmp_path)._checkpoints.copies
    assert copies is not None
    assert copies.job == "alone.replica_1"


def test_ranks_that_share_a_folder_are_on_one_host(tmp_path: Path) -> None:
    """As those of two containers are, which share the memory of one machine."""
    here, told = threading.Barrier(3), dict[int, Any]()

    class Told:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def together(self, action: Callable[[], Any]) -> Any:
            return action()

        def gather(self, value: Any) -> list[Any]:
            told[self.rank] = value
            here.wait(10)
            found = [told[rank] for rank in range(3)]
            here.wait(10)
            return found

    shelves = [Shelf.of(tmp_path / name, "alone") for name in ("a", "b", "a")]
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(Copies._hosts, SimpleNamespace(ranks=Told(rank)), shelf)  # type: ignore[arg-type]
            for rank, shelf in enumerate(shelves)
        ]
        assert [one.result() for one in asked] == [["0", "1", "0"]] * 3
    assert neighbours(["0", "1", "0"]) == {0: 1, 1: 0, 2: 1}
    assert not list(tmp_path.rglob(".here_*"))


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_newest_that_are_complete_are_chosen() -> None:
    draw = random.Random(0)
    for _ in range(2000 if DEEP else 200):
        num_ranks = draw.randint(1, 4)
        held = [
            Copy(Mark(draw.randint(1, 2), draw.randint(1, 3), "0" * 16), draw.randrange(num_ranks), num_ranks, 7, at)
            for at in range(draw.randint(1, 4))
            for _ in range(draw.randint(0, 8))
        ]
        whole = [m for m in {c.mark for c in held} if {c.rank for c in held if c.mark == m} == {*range(num_ranks)}]
        choice, lack = choose(held)
        assert (choice.mark if choice is not None else None) == max(whole, default=None)
        newest = max((c.mark for c in held), default=None)
        assert bool(lack) == (newest is not None and newest not in whole)
        if choice is not None:
            for rank, holder in choice.holders.items():
                assert any((c.mark, c.rank, c.holder) == (choice.mark, rank, holder) for c in held)


def test_copies_of_other_layouts_are_not_put_together() -> None:
    choice, lack = choose([Copy(MARK, 0, 2, 1, 0), Copy(MARK, 1, 2, 9, 1)])
    assert choice is None
    assert lack == "of step 4 there is no copy of rank 1"


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (4, 1), (3, 2, 5)])
def test_each_rank_is_kept_on_another_host(sizes: tuple[int, ...]) -> None:
    hosts = [str(host) for host, size in enumerate(sizes) for _ in range(size)]
    keepers = neighbours(hosts)
    assert sorted(keepers) == [*range(len(hosts))]
    assert all(hosts[keeper] != hosts[rank] for rank, keeper in keepers.items())
    assert neighbours(["one"] * 3) == {}


# --- serving ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    made = Shelf.of(tmp_path, "alone")
    draft = made.draft(3, MARK)
    made.begin(draft)
    (draft / "rank_3_0.safetensors").write_bytes(bytes(range(256)) * 9000)
    made.complete(draft, 3, MARK)
    (tmp_path / "secret.json").write_text("{}")
    return made


def test_a_file_comes_as_it_is(shelf: Shelf, tmp_path: Path) -> None:
    server = Server(shelf, "127.0.0.1")
    with Client(server.address) as client:
        assert client.fetch(3, MARK, "rank_3_0.safetensors", tmp_path / "out", 1 << 30)
        assert (tmp_path / "out").read_bytes() == bytes(range(256)) * 9000
        assert not client.fetch(3, MARK, "rank_3_1.safetensors", tmp_path / "none", 1 << 30)
        assert not client.fetch(2, MARK, "rank_3_0.safetensors", tmp_path / "none", 1 << 30)
        server.give_up(MARK)
        with pytest.raises(CheckpointError, match="rank 2 could not write its copy"):
            client.fetch(2, MARK, "rank_3_0.safetensors", tmp_path / "none", 1 << 30)
        with pytest.raises(CheckpointError, match="and at most 100 here"):
            client.fetch(3, MARK, "rank_3_0.safetensors", tmp_path / "none", 100)
    server.close()
    with pytest.raises(OSError, match="refused"):
        Client(server.address)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"secret": ""},
        {"secret": "é"},
        {"secret": None},
        [[[]]],
        {"file": "../../../secret.json"},
        {"file": "/etc/passwd"},
        {"mark": "../.."},
        {"rank": -1},
        {"rank": "3"},
        {"rank": True},
        [],
        7,
    ],
)
def test_what_is_no_question_is_not_answered(shelf: Shelf, asked: Any) -> None:
    server = Server(shelf, "127.0.0.1")
    good = {"secret": server.address.secret, "rank": 3, "mark": str(MARK), "file": "rank_3_0.safetensors"}
    for line in (json.dumps({**good, **asked} if isinstance(asked, dict) else asked).encode() + b"\n", b"\xff\n"):
        with socket.create_connection(server.address[:2], 10) as connection:
            connection.sendall(line)
            assert connection.recv(100) == b""
    server.close()


def test_a_server_that_ends_is_an_error(shelf: Shelf, tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, Client(Address("127.0.0.1", listener.getsockname()[1], "")) as client:
        connection, _ = listener.accept()
        connection.sendall((100).to_bytes(8, "big") + b"too little")
        connection.close()
        with pytest.raises(OSError, match=r"ended the connection|reset"):
            client.fetch(3, MARK, "rank_3_0.safetensors", tmp_path / "out", 1 << 20)


def test_pieces_wait_for_collectives_but_not_for_ever(shelf: Shelf, tmp_path: Path) -> None:
    server = Server(shelf, "127.0.0.1")
    with Client(server.address) as client:
        for at, busy in enumerate(([False, False, True, True, True], [False] * 10000)):
            with patch.object(links, "is_idle", side_effect=iter(busy)) as asked:
                assert client.fetch(3, MARK, "rank_3_0.safetensors", tmp_path / f"out{at}", 1 << 30)
            assert asked.call_count == 5 if True in busy else asked.call_count > 6
    server.close()
