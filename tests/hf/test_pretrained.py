"""Every weight of a pretrained model has a file that it came from, or is named as new."""

import pytest
import torch
import transformers

import zgraph
from tests.hf.training import llama, t5
from zgraph.errors import StateDictError, UsageError
from zgraph.hf import load_pretrained, loaded


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config)


def test_each_weight_has_its_file(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("ZGRAPH_LOGS", "capture")
    caplog.set_level("INFO", "zgraph")
    saved = llama()
    saved.save_pretrained(tmp_path / "one")
    saved.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    index = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert len(index) > 2
    names = [name for name, _ in saved.named_parameters()]
    for folder, files in (("one", {"model.safetensors"}), ("many", index)):
        model = load_pretrained(transformers.AutoModelForCausalLM, tmp_path / folder, new="error")
        account = loaded(model)
        assert list(account.sources) == names
        assert {*account.sources.values()} == files
        assert (account.new, account.unexpected) == ((), ())
        assert account.line in caplog.text
        assert f"{len(names)} of {len(names)} weights of {tmp_path / folder} loaded from model" in account.line
    assert loaded(zgraph.compile(model, stage=3)) is account


def test_new_parameters_are_named_or_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    kind = transformers.LlamaForSequenceClassification
    with pytest.warns(UserWarning, match=r"1 parameters of LlamaForSequenceClassification .* newly made: score.weight"):
        account = loaded(load_pretrained(kind, tmp_path))
    assert account.missing == ("score.weight",)
    assert account.unexpected == ("lm_head.weight",)
    assert "score.weight" not in account.sources
    with pytest.raises(StateDictError, match=r"from new values: score.weight. Load a class"):
        load_pretrained(kind, tmp_path, new="error")
    shape = {"ignore_mismatched_sizes": True, "vocab_size": 60}
    account = loaded(load_pretrained(transformers.LlamaForCausalLM, tmp_path, new="allow", **shape))
    assert account.mismatched == account.new == ("lm_head.weight", "model.embed_tokens.weight")


def test_tied_and_fused_weights_have_files(tmp_path):
    for made in (t5(), mixtral()):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder)
        account = loaded(load_pretrained(type(made), folder, new="error"))
        assert {*account.sources} == {name for name, _ in made.named_parameters()}
        assert {*account.sources.values()} == {"model.safetensors"}


def test_what_is_not_in_memory_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="would be trained from new values"):
        load_pretrained(transformers.LlamaForCausalLM, tmp_path, device_map="meta")
    with pytest.raises(UsageError, match="would be trained from new values"):
        zgraph.compile(transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="meta"), device="cpu")
    with pytest.raises(UsageError, match=r"load it by zgraph.hf.load_pretrained"):
        loaded(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match='must be "warn", "error" or "allow"'):
        load_pretrained(transformers.LlamaForCausalLM, tmp_path, new="maybe")
