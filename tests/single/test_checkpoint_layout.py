"""Where parts of tensors are, computed from how they are cut: among few ranks against trying all, and among many."""

from __future__ import annotations

import math
import random
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import many_ranks
from tests.deep import DEEP
from zgraph.engine.checkpoint.index import Entry, Index, index_of
from zgraph.engine.checkpoint.layout import Layout, Spans, copies_to_write, pieces, sizes_of
from zgraph.engine.checkpoint.storage import INDEX, Reader, Writer
from zgraph.errors import CheckpointError
from zgraph.ir.layout import local_rows


def drawn(draw: random.Random) -> tuple[tuple[int, ...], Layout]:
    """A shape, and how it is cut over at most twelve ranks in any order."""
    num_dims = draw.randrange(3)
    mesh = draw.choice([(1,), (4,), (5,), (2, 3), (3, 2), (2, 2, 3)])
    shape, cuts = [draw.randrange(9) for _ in range(num_dims)], []
    for _ in mesh:
        cut = (draw.randrange(num_dims), draw.choice([1, 1, 2])) if num_dims and draw.random() < 0.7 else None
        if cut is not None:
            shape[cut[0]] = -(-shape[cut[0]] // cut[1]) * cut[1]
        cuts.append(cut)
    ranks = [*range(math.prod(mesh))]
    draw.shuffle(ranks)
    found = Layout(mesh=mesh, cuts=tuple(cuts), ranks=tuple(ranks) if draw.random() < 0.5 else ())
    return (tuple(shape), found) if found.fits(shape, len(ranks)) else drawn(draw)


def taken(whole: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Part of a tensor that a rank has."""
    for dim, runs in enumerate(spans):
        whole = torch.cat([whole.narrow(dim, *run) for run in runs] or [whole.narrow(dim, 0, 0)], dim)
    return whole


def test_any_layout_is_read_at_any_other() -> None:
    draw = random.Random(0)
    for _ in range(2000 if DEEP else 60):
        shape, stored = drawn(draw)
        wanted = drawn(draw)[1]
        if not wanted.fits(shape, wanted.num_ranks):
            continue
        whole = torch.arange(1.0, math.prod(shape) + 1).view(shape)
        copy = draw.randrange(stored.num_copies)
        files = {
            rank: taken(whole, stored.spans(shape, rank))
            for rank in range(stored.num_ranks)
            if stored.writes(shape, copy, rank)
        }
        assert sum(part.numel() for part in files.values()) == whole.numel(), "each number is written once"
        for rank in range(wanted.num_ranks):
            spans = wanted.spans(shape, rank)
            found = torch.zeros(sizes_of(spans))
            for home, held in stored.parts(shape, copy, spans):
                for piece in pieces(held, spans):
                    found[piece.wanted] = files[home][piece.stored]
            assert torch.equal(found, taken(whole, spans)), (shape, stored, wanted, rank)


def test_what_fits_is_what_no_rank_drops() -> None:
    """Blocks of a second cut must divide what every rank has left, and `fits` knows the sizes of all of them."""
    refused = 0
    for size, first, second, blocks in product(range(13), (1, 2, 3, 5), (1, 2, 3), (1, 2, 3)):
        layout = Layout(mesh=(first, second), cuts=((0, 1), (0, blocks)))
        held = [
            index
            for r in range(layout.num_ranks)
            for at, n in layout.spans((size,), r)[0]
            for index in range(at, at + n)
        ]
        fits = layout.fits((size,), layout.num_ranks)
        left = [local_rows(size, first, rank) for rank in range(first)]
        assert fits == all(rows % blocks == 0 for rows in left)
        assert not fits or sorted(held) == [*range(size)]
        refused += not fits
    assert refused
    assert not Layout(mesh=(2, 2), cuts=((0, 1), (0, 2))).fits((6,), 4)


def test_places_of_a_mesh_in_another_order_are_found_at_once() -> None:
    layout = Layout(mesh=(4096,), cuts=((0, 1),), ranks=tuple(reversed(range(4096))))
    began = time.process_time()
    assert [layout.spans((8192,), rank)[0] for rank in (0, 4095)] == [[(8190, 2)], [(0, 2)]]
    for _ in range(20000):
        layout.writes((8192,), 0, 17)
    assert time.process_time() - began < 1.0
    assert layout == Layout(**layout.model_dump()), "what is kept is no part of it"


def test_a_tensor_without_elements_is_read(tmp_path: Path) -> None:
    whole = {"none": torch.empty(0), "rows": torch.empty(3, 0), "w": torch.ones(4)}
    index = index_of(whole, [0])
    Writer(tmp_path, 0, {}, lambda: None, lambda: None).write(index, whole)
    Writer(tmp_path, 0, {}, lambda: None, lambda: None).finish(index)
    reader = Reader(tmp_path)
    reader.check()
    assert {name: reader.whole(name).shape for name in whole} == {n: t.shape for n, t in whole.items()}


def test_copies_are_shared_out() -> None:
    layout = Layout(mesh=(4,), cuts=(None,))
    sizes = {f"w{i}": 1000 // (i + 1) for i in range(40)}
    copies = copies_to_write({name: (layout, size) for name, size in sizes.items()})
    loads = [sum(size for name, size in sizes.items() if copies[name] == copy) for copy in range(4)]
    assert max(loads) - min(loads) <= 30


def test_4096_ranks_are_indexed_in_less_than_a_second() -> None:
    began = time.process_time()
    text = many_ranks(4096).model_dump_json()
    index = Index.model_validate_json(text)
    assert index.problem() == ""
    assert index.written_by(4095)
    assert index.written_by(0)
    assert time.process_time() - began < 1.0
    assert len(text) < 200_000, "it grows with the tensors, not with the ranks"


def test_what_a_rank_reads_is_found_without_a_look_at_all_ranks() -> None:
    layout = Layout(mesh=(4096,), cuts=((0, 1),))
    began = time.process_time()
    for start in range(1000):
        found = [rank for rank, _ in layout.parts((40960, 64), 0, [[(start * 10, 20)], [(0, 64)]])]
        assert found == [start, start + 1]
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"copy_written": 1}, "no copy 1"),
        ({"layout": 3}, "how w is cut"),
        ({"shape": (5,)}, "how w is cut"),
        ({"dtype": "complex64"}, "how w is cut"),
    ],
)
def test_an_index_that_cannot_be_is_damage(tmp_path: Path, change: dict[str, object], said: str) -> None:
    entry = Entry(dtype="float32", shape=(4, 4), layout=0)
    layouts = (Layout(mesh=(2,), cuts=((1, 2),)),)
    index = Index(num_ranks=2, layouts=layouts, tensors={"w": entry.model_copy(update=change)})
    (tmp_path / INDEX).write_text(index.model_copy(update={"checksum": index.computed()}).model_dump_json())
    with pytest.raises(CheckpointError, match=said):
        Reader(tmp_path)


def test_ranks_write_and_another_reads(tmp_path: Path) -> None:
    """Parts of four ranks, one of which has nothing, as four processes would write them."""
    whole = {"w": torch.arange(21.0).view(7, 3), "b": torch.arange(3), "n": torch.tensor(5.0, dtype=torch.bfloat16)}
    layouts = (Layout(mesh=(4,), cuts=((0, 1),)), Layout(mesh=(4,), cuts=(None,)))
    tensors = {
        "w": Entry(dtype="float32", shape=(7, 3), layout=0),
        "b": Entry(dtype="int64", shape=(3,), layout=1, copy_written=2),
        "n": Entry(dtype="bfloat16", shape=(), layout=1, copy_written=3),
    }
    index = Index(num_ranks=4, layouts=layouts, tensors=tensors)
    index = index.model_copy(update={"checksum": index.computed()})
    for rank in range(4):
        parts = {n: taken(t, layouts[tensors[n].layout].spans(t.shape, rank)) for n, t in whole.items()}
        Writer(tmp_path, rank, {f"rank_{rank}.json": "{}"}, lambda: None, lambda: None).write(index, parts)
    assert not (tmp_path / INDEX).exists(), "no checkpoint before the first rank says so"
    Writer(tmp_path, 0, {}, lambda: None, lambda: None).finish(index)
    reader = Reader(tmp_path)
    reader.check()
    for name, tensor in whole.items():
        assert torch.equal(reader.whole(name), tensor)
    (tmp_path / "rank_1_files.json").unlink()
    with pytest.raises(CheckpointError, match=r"rank_1_files\.json"):
        reader.check()
