"""A headless Chromium without a network, and pages of runs."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from playwright.sync_api import Browser, Page, sync_playwright

from zgraph.estimate.trace import traced
from zgraph.passes import RECIPES, parse_recipe
from zgraph.runfile.format import RunFile
from zgraph.viz.page import page as page_of

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

Opener = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=[*FLAGS])


def a_run(stage: int) -> RunFile:
    """A small Llama on two ranks of hardware that has reason to wait."""
    config = hf.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2000,
        use_cache=False,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    ids = torch.zeros(2, 128, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    return traced(model, inputs, parse_recipe(RECIPES[stage]), hardware="2x1-h100", memory_budget="60MB")


@pytest.fixture(scope="session")
def run() -> RunFile:
    """That Llama at stage 3."""
    return a_run(3)


@pytest.fixture(scope="session")
def other() -> RunFile:
    """The same at stage 2."""
    return a_run(2)


@pytest.fixture(scope="session")
def drawn(run: RunFile) -> str:
    """The page of that run."""
    return page_of(run)


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Opens a run's page with the network off; the test fails if the page says anything to the console but `ready`."""
    said: list[str] = []
    contexts = []

    def open_page(
        run: RunFile | str, *, width: int = 1280, scheme: str = "light", address: str = "", **more: Any
    ) -> Page:
        file = tmp_path / "report.html"
        file.write_text(run if isinstance(run, str) else page_of(run))
        size = {"width": width, "height": 844 if width < 700 else width * 5 // 8}
        context = browser.new_context(offline=True, viewport=size, color_scheme=scheme, **more)
        contexts.append(context)
        made = context.new_page()
        made.on("console", lambda message: message.type == "debug" or said.append(message.text))
        made.on("pageerror", lambda error: said.append(str(error)))
        made.on("dialog", lambda dialog: said.append(dialog.message))
        made.goto(file.as_uri() + address)
        return made

    yield open_page
    for context in contexts:
        context.close()
    assert not said
