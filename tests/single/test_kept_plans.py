"""Kept plans on one rank: a second run takes the plan of the first, and never one of anything that differs."""

from __future__ import annotations

import dataclasses
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zgraph
from zgraph.compiler import plan_folder, plan_key
from zgraph.compiler.compiled_model import CompiledModel, compiled_model
from zgraph.compiler.plan_folder import PlanFolder
from zgraph.compiler.plan_key import APART, foreign, key_of, settings_text
from zgraph.cost import CostTable, hardware
from zgraph.errors import KeptPlanWarning
from zgraph.ir import Axis, DType, Graph, parse_graph, print_graph
from zgraph.options.settings import Options, Settings, resolve
from zgraph.passes import Context, Pass, Pipeline, known_passes, parse_recipe
from zgraph.passes.partition import Partition
from zgraph.runfile.kept import read_kept

X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(5, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.last(F.dropout(torch.tanh(self.norm(self.first(x))), 0.2, self.training)), y)


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return zgraph.compile(Net(), **options)


def train(model: nn.Module) -> list[float]:
    """Losses, gradients and buffers of two steps."""
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        loss = model(X, Y)
        loss.backward()
        found += [loss.item(), *(p.grad.sum().item() for p in model.parameters())]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    return [*found, *(b.sum().item() for b in model.buffers())]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where plans are kept in this test."""
    monkeypatch.setenv("ZGRAPH_PLANS", str(tmp_path))
    return tmp_path / plan_folder.NAME


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KeptPlanWarning)
        yield


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.plan"))


def reused(model: nn.Module) -> int:
    """How many plans were reused."""
    plans = compiled_model(model).plans
    assert plans is not None
    return plans.counts.total()


def final_text(model: nn.Module) -> str:
    return "\n".join(print_graph(entry.plan.graph) for entry in compiled_model(model).entries)


def test_a_second_run_has_the_plan_of_the_first_to_the_last_letter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = net(memory_budget="64MiB")
    numbers = train(first)
    (path,) = files(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv("ZGRAPH_LOGS", "capture")
    caplog.set_level("INFO", "zgraph")
    monkeypatch.setattr(Partition, "run", None)  # the passes do not run
    second = net(memory_budget="64MiB")
    assert train(second) == numbers
    assert (reused(first), reused(second)) == (0, 1)
    assert final_text(second) == final_text(first)
    ours, theirs = (compiled_model(model).entries[0] for model in (first, second))
    assert (ours.steps, ours.timeline, ours.memory) == (theirs.steps, theirs.timeline, theirs.memory)
    assert theirs.certificate is not None
    assert f"the plan is reused from {folder}, which saves" in caplog.text
    assert f"plans: 1 reused from {folder}" in str(zgraph.report(second)).replace("\n", "")


def test_a_run_file_of_a_plan_that_was_reused_has_all_passes(folder: Path) -> None:
    first, second = net(), net()
    train(first)
    train(second)
    assert reused(second) == 1
    runs = [compiled_model(model).entries[0].run() for model in (first, second)]
    assert runs[0].texts == runs[1].texts


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def of_another(path: Path) -> None:
    plans = PlanFolder(path.parent)
    held = plans.find(path.stem)
    path.unlink()
    assert held is not None
    plans.keep(path.stem, read_kept_as_other(held, path.stem))


def read_kept_as_other(held: bytes, key: str) -> bytes:
    return dataclasses.replace(read_kept(held, key), key=64 * "0").to_bytes()


def other_program(path: Path) -> None:
    plans, key = PlanFolder(path.parent), path.stem
    held = plans.find(key)
    assert held is not None
    plan = read_kept(held, key)
    text = plan.texts[0].replace("aten.tanh.default", "aten.sigmoid.default")
    assert text != plan.texts[0]
    path.unlink()
    plans.keep(key, dataclasses.replace(plan, texts=(text,)).to_bytes())


@pytest.mark.parametrize("change", [spoil, flip, link, of_another, other_program])
def test_a_file_that_is_damaged_foreign_or_wrong_is_removed_with_a_line(
    folder: Path, change: Callable[[Path], None]
) -> None:
    numbers = train(net())
    (path,) = files(folder)
    change(path)
    model = net()
    with pytest.warns(KeptPlanWarning, match="is removed"):
        found = train(model)
    assert found == numbers
    assert reused(model) == 0
    again = net()
    assert train(again) == numbers
    assert reused(again) == 1


def test_the_folder_is_bounded_and_the_oldest_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plan_folder.plan_folder()
    assert plans is not None
    monkeypatch.setattr(plan_folder, "MAX_FOLDER_BYTES", 3000)
    for number in range(4):
        plans.keep(str(number), bytes(900))
        os.utime(plans.path(str(number)), (number, number))
        if number == 2:
            assert plans.find("0") is not None  # used now
    assert [plans.find(str(number)) is not None for number in range(4)] == [True, False, True, True]
    monkeypatch.setattr(plan_folder, "MAX_BYTES", 800)
    plans.keep("long", bytes(900))
    assert plans.find("long") is None


@pytest.mark.parametrize(
    "variables", [{"ZGRAPH_PLANS": "0"}, {"ZGRAPH_VERIFY": "0"}, {"ZGRAPH_VERIFY": "2"}, {"ZGRAPH_DUMP": "dump"}]
)
def test_a_variable_that_wants_the_passes_has_them_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value if value != "dump" else str(tmp_path / "dump"))
    for _ in range(2):
        model = net()
        train(model)
        assert reused(model) == 0
    assert not files(folder)


def test_a_run_that_is_saved_runs_the_passes(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        model = net(save=tmp_path / "run.zg")
        train(model)
        assert reused(model) == 0
    replayed = net(passes=tmp_path / "run.zg")
    train(replayed)
    assert not files(folder)


@pytest.mark.filterwarnings("default")
def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(KeptPlanWarning, match="no plan is kept: .* may be written by everyone.*ZGRAPH_PLANS"):
        model = net()
    train(model)
    assert not files(folder)


# --- keys -----------------------------------------------------------------------------------------------------------

GRAPH = parse_graph((Path(__file__).parents[1] / "passes/programs/tied.zir").read_text())


def key(model: nn.Module, graph: Graph = GRAPH, context: Context | None = None) -> str:
    """The key of a graph that this model is captured as."""
    compiled: CompiledModel = compiled_model(model)
    assert compiled.plans is not None
    return key_of(compiled.plans.options, compiled.pipeline, context or compiled.context, graph)


CHANGED: dict[str, dict[str, Any]] = {
    "stage": {"stage": lambda name: 2 if "first" in name else 3},
    "param_dtype": {"param_dtype": torch.bfloat16},
    "reduce_dtype": {"reduce_dtype": torch.float64},
    "hardware": {"hardware": "h100"},
    "memory_budget": {"memory_budget": "1GiB"},
    "recompute": {"recompute": True},
    "offload": {"offload": "activations"},
    "kernels": {"kernels": "inductor"},
    "compute": {"compute": "float8"},
    "passes": {"passes": "canonicalize,partition(stage=3),all-gather,reduce-scatter,dce,release"},
    "fullgraph": {"fullgraph": False},
    "dynamic": {"dynamic": True},
    "lengths": {"lengths": zgraph.Lengths((8, 16), {"x": 0, "y": 0})},
    "regions": {"regions": "auto", "kernels": "inductor"},
}
"""Another value of each option."""

ELSEWHERE = {
    "mesh": "the mesh of the settings and of the context",
    "compress": "options of passes; one rank sends nothing",
    "device": "the device of the settings; there is one here",
    "tensor_parallel": "the mesh and the cuts, which are in the settings",
    "sequence_parallel": "an option of a pass",
    "context_parallel": "the mesh and the cuts",
    "expert_parallel": "the mesh and the cuts",
    "placements": "the cuts and an option of a pass",
    "cuda_graphs": "of GPUs: a field of the settings",
    "record": "no plan is kept",
    "save": "no plan is kept",
}
"""Options whose values take several ranks or a GPU, and what of them is in the key: see the tests below."""


def test_each_option_is_named_here() -> None:
    assert CHANGED.keys() | ELSEWHERE.keys() == Options.__annotations__.keys()
    assert not CHANGED.keys() & ELSEWHERE.keys()


def test_the_key_changes_with_each_option() -> None:
    keys = {"none": key(net())}
    assert keys["none"] == key(net())
    for name, options in CHANGED.items():
        keys[name] = key(net(**options))
    alike = [(a, b) for a, b in combinations(keys, 2) if keys[a] == keys[b]]
    assert not alike


def settings() -> Settings:
    given: dict[str, Any] = dict.fromkeys(Options.__annotations__, None)
    given |= {"stage": 3, "recompute": "auto", "offload": None, "fullgraph": True, "sequence_parallel": False}
    given |= {"tensor_parallel": 1, "context_parallel": 1, "expert_parallel": 1, "cuda_graphs": False}
    return resolve(Net(), **given | {"regions": "python"})


def test_the_key_changes_with_each_setting() -> None:
    own = settings()
    texts = {"": settings_text(own)}
    for field in dataclasses.fields(own):
        value: Any = torch.device("meta") if field.name == "device" else "another"
        texts[field.name] = settings_text(dataclasses.replace(own, **{field.name: value}))
    same = {name for name, text in texts.items() if name and text == texts[""]}
    assert same == APART - {"mesh"}


CONTEXTS: dict[str, Any] = {
    "mesh": (Axis("shard", 2),),
    "reduce_dtype": DType.f64,
    "hints": {"s0": 9},
    "costs": CostTable(hardware=hardware("h100"), per_host=3),
    "memory_budget": 1 << 30,
    "rest_bytes": 1,
    "update_bytes": 1,
    "fit_bytes": 1,
    "groups_calls": True,
    "keeps_blocks": True,
    "recomputes": "always",
    "offloads": "always",
    "lowering": (),
}
"""Another value of each field of the context, but for what the pipeline sets by itself."""


def test_the_key_changes_with_all_that_passes_know() -> None:
    assert CONTEXTS.keys() == {field.name for field in dataclasses.fields(Context)}
    pipeline = parse_recipe("canonicalize,partition(stage=3),all-gather,reduce-scatter,dce,release")
    keys = [key_of("", pipeline, Context(), GRAPH)]
    for name, value in CONTEXTS.items():
        if name != "lowering":
            keys.append(key_of("", pipeline, dataclasses.replace(Context(), **{name: value}), GRAPH))
    measured = Context().costs.model_copy(update={"ops": {"aten.mm": 1.0}})
    keys.append(key_of("", pipeline, Context(costs=measured), GRAPH))
    keys.append(key_of("", pipeline, Context(hints={"s0": 8}), GRAPH))
    keys.append(key_of("", pipeline, Context(mesh=(Axis("shard", 3),)), GRAPH))
    keys.append(key_of("", pipeline, Context(mesh=(Axis("tensor", 2),)), GRAPH))
    assert len({*keys}) == len(keys)


def test_the_key_changes_with_each_option_of_each_pass() -> None:
    num_options = 0
    for name, kind in known_passes().items():
        if kind.__module__.partition(".")[0] != "zgraph":
            continue
        own = kind()
        keys = [key_of("", Pipeline((own,)), Context(), GRAPH)]
        for field in dataclasses.fields(own):
            changed = kind()
            value = getattr(own, field.name)
            other: Any = (
                not value if isinstance(value, bool) else value + (1 if isinstance(value, int | float) else "x")
            )
            object.__setattr__(changed, field.name, other)  # past the checks: only the key is made of it
            keys.append(key_of("", Pipeline((changed,)), Context(), GRAPH))
            num_options += 1
        assert len({*keys}) == len(keys), name
    assert num_options > 20
    orders = [parse_recipe("canonicalize,dce"), parse_recipe("dce,canonicalize"), parse_recipe("canonicalize")]
    assert len({key_of("", pipeline, Context(), GRAPH) for pipeline in orders}) == 3


def test_the_key_changes_with_each_line_of_the_graph() -> None:
    pipeline = parse_recipe("canonicalize")
    graphs = [dataclasses.replace(GRAPH, nodes=GRAPH.nodes[:at] + GRAPH.nodes[at + 1 :]) for at in range(40)]
    keys = {key_of("", pipeline, Context(), graph) for graph in [GRAPH, *graphs]}
    assert len(keys) == len({print_graph(graph) for graph in [GRAPH, *graphs]})
    node = GRAPH.nodes[0]
    moved = dataclasses.replace(node, origin=dataclasses.replace(node.origin, file="other.py", line=7))
    assert key_of("", pipeline, Context(), dataclasses.replace(GRAPH, nodes=(moved, *GRAPH.nodes[1:]))) not in keys


def test_the_key_changes_with_source_versions_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> str:
        return key_of("", parse_recipe("canonicalize"), Context(), GRAPH)

    keys = [now()]
    monkeypatch.setattr(plan_key, "source_digest", lambda: "another")
    keys.append(now())
    for name in ("zgraph", "python", *plan_key.PACKAGES):
        monkeypatch.setattr(plan_key, "_versions", lambda name=name: {name: "another"})
        keys.append(now())
    monkeypatch.setattr(plan_key, "processor", lambda: "another")
    keys.append(now())
    for variable, value in (("ZGRAPH_DISABLE", "dce"), ("ZGRAPH_ARENAS", "plain")):
        monkeypatch.setenv(variable, value)
        keys.append(now())
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    keys.append(now())
    assert len({*keys}) == len(keys)


def test_the_digest_of_the_source_is_that_of_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_key, "__file__", str(tmp_path / "compiler" / "plan_key.py"))
    (tmp_path / "compiler").mkdir()
    found = []
    for path, text in (("a.py", "1"), ("a.py", "2"), ("compiler/b.toml", "2"), ("c", "")):
        (tmp_path / path).write_text(text)
        plan_key.source_digest.cache_clear()
        found.append(plan_key.source_digest())
    plan_key.source_digest.cache_clear()
    assert len({*found}) == len(found)


@dataclasses.dataclass(frozen=True)
class Own(Pass):
    """A pass of the user's."""

    name: ClassVar[str] = "own"

    def run(self, graph: Graph, context: Context) -> Graph:
        return graph


def test_passes_of_the_users_have_no_key(folder: Path) -> None:
    recipe = parse_recipe("canonicalize,partition(stage=3),all-gather,reduce-scatter,dce,release").passes
    assert foreign(Pipeline((*recipe, Own()))) == "own"
    assert foreign(Pipeline(recipe)) == ""
    train(net(passes=[*recipe, Own()]))
    assert not files(folder)
