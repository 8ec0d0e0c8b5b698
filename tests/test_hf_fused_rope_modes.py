"""Fused rope in one model: what stays untouched, copies, saving, restoring, surgery, compilers, wrappers."""

import copy
import json
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from fused_helpers import state_of
from hf_models import build, tokens
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama import modeling_llama

import longattn
from longattn.hf import fused_modules, use_fused_rope

FAR = torch.arange(20)[None] + 10_000_000  # where stock and fused rope differ by far more than rounding
YARN = longattn.Plan(rope={"rope_type": "yarn", "factor": 4.0})
WINDOWS = longattn.Plan(rope={"rope_type": "llama3", "factor": 4.0}, attention="window:6+sinks:1")


def logits(model, ids=None):
    return model(tokens(1, 20) if ids is None else ids, position_ids=FAR, use_cache=False).logits


@pytest.fixture
def stock():
    return build("llama")


@pytest.fixture
def fused():
    return use_fused_rope(build("llama"))


def test_other_models_and_the_modelling_file_are_untouched(stock):
    names = dict(vars(modeling_llama))
    classes = [modeling_llama.LlamaAttention, modeling_llama.LlamaRotaryEmbedding]
    members = [dict(vars(cls)) for cls in classes]
    before, changed = logits(stock), use_fused_rope(build("llama"))
    assert not torch.equal(logits(changed), before)
    assert torch.equal(logits(stock), before) and torch.equal(logits(build("llama")), before)
    assert {name: vars(modeling_llama)[name] for name in names} == names
    assert [dict(vars(cls)) for cls in classes] == members


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_renamed_arguments_are_taken_as_by_the_stock_attention(stock, fused):
    """transformers 5.24 calls the cache otherwise, and a decorator of the forward takes the older name."""
    hidden, positions = torch.randn(1, 8, 32, dtype=torch.float64), torch.arange(8)[None]
    found = []
    for model in (stock, fused):
        cache = DynamicCache(config=model.config)
        tables = model.model.rotary_emb(hidden, positions)
        attention = model.model.layers[0].self_attn
        found.append(attention(hidden, position_embeddings=tables, attention_mask=None, past_key_values=cache)[0])
        assert cache.get_seq_length() == 8
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_models_in_threads_keep_their_own_rotation(stock, fused):
    expected = {stock: logits(stock), fused: logits(fused)}
    wrong = []

    def run(model):
        for _ in range(8):
            if not torch.equal(logits(model), expected[model]):
                wrong.append(type(model.model.rotary_emb))

    threads = [threading.Thread(target=run, args=(model,)) for model in (stock, fused) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_calling_twice_is_calling_once(stock, fused):
    once, state = logits(fused), state_of(fused)
    assert use_fused_rope(fused) is fused
    assert state_of(fused) == state and torch.equal(logits(fused), once)
    longattn.restore(fused)
    assert torch.equal(logits(fused), logits(stock))


def test_nothing_of_it_is_saved(stock, fused, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    fused.save_pretrained(tmp_path / "fused")
    assert (tmp_path / "stock/config.json").read_text() == (tmp_path / "fused/config.json").read_text()
    assert "longattn" not in json.loads((tmp_path / "fused/config.json").read_text())
    assert set(fused.state_dict()) == set(stock.state_dict())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float64)
    assert state_of(reloaded)[-1] == state_of(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))[-1]
    assert torch.equal(logits(reloaded), logits(stock))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_restore_leaves_no_trace(family):
    stock = build(family, torch.float32)
    model = copy.deepcopy(stock)
    report = longattn.restore(use_fused_rope(model))
    assert [(change.what, change.after) for change in report.changes] == [("rotary op", "stock")]
    assert state_of(model) == state_of(stock)
    assert torch.equal(logits(model), logits(stock))
    with pytest.raises(ValueError, match="restore: config.longattn is missing"):
        longattn.restore(model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_fused_on_their_own(stock, fused, clone):
    expected = logits(fused)
    twin = clone(fused)
    assert torch.equal(logits(twin), expected)
    longattn.restore(fused)
    assert torch.equal(logits(twin), expected) and torch.equal(logits(fused), logits(stock))
    assert torch.equal(logits(longattn.restore(twin) and twin), logits(stock))


@pytest.mark.parametrize("plan", [YARN, WINDOWS])
def test_extend_may_come_before_or_after(stock, plan):
    before, after = copy.deepcopy(stock), copy.deepcopy(stock)
    longattn.extend(before, None, plan)
    extended = logits(before)
    use_fused_rope(before)
    longattn.extend(use_fused_rope(after), None, plan)
    assert torch.equal(logits(after), logits(before)) and not torch.equal(logits(after), extended)
    near = tokens(1, 20)
    plain = copy.deepcopy(stock)
    longattn.extend(plain, None, plan)
    torch.testing.assert_close(after(near).logits, plain(near).logits, rtol=0, atol=1e-4)
    for model in (before, after):
        longattn.restore(model)
        assert state_of(model) == state_of(stock) and torch.equal(logits(model), logits(stock))


def test_a_failed_extend_leaves_the_fused_model_as_it_was(fused, monkeypatch):
    expected, state = logits(fused), state_of(fused)

    def fail(model):
        raise RuntimeError("a check failed")

    monkeypatch.setattr("longattn.surgery.check_rotary_modules", fail)
    with pytest.raises(RuntimeError, match="a check failed"):
        longattn.extend(fused, None, YARN)
    assert state_of(fused) == state and torch.equal(logits(fused), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "cohere"])
def test_compiles_whole_and_once_for_all_lengths(family):
    torch._dynamo.reset()
    fused = use_fused_rope(build(family, torch.float32))
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=graphs)
    texts = [tokens(1, length) for length in (20, 12)]
    expected = [fused(ids, use_cache=False).logits for ids in texts]
    for ids, ref in zip(texts, expected, strict=True):
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, ref)
    assert graphs.frame_count == 1


def test_a_compiled_model_follows_fusing_and_restoring(stock):
    torch._dynamo.reset()
    before, model = logits(stock), copy.deepcopy(stock)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(logits(compiled), before, rtol=0, atol=1e-5)
        expected = logits(use_fused_rope(model))
        got = logits(compiled)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        grads = [torch.autograd.grad(out.square().mean(), model.model.embed_tokens.weight) for out in (got, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-5)
        assert (expected - before).abs().max() > 1e-3
        longattn.restore(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(fused, use_reentrant):
    plain = copy.deepcopy(fused).train()
    fused.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    fused.enable_input_require_grads()
    for model in (fused, plain):
        logits(model).square().mean().backward()
    for mine, its in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


def test_adapters_may_come_before_or_after(stock, fused):
    lora = LoraConfig(target_modules=["q_proj", "k_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(1)
    after = get_peft_model(fused, lora)
    torch.manual_seed(1)
    before = get_peft_model(stock, lora)
    different = logits(before)
    use_fused_rope(before.get_base_model())
    assert torch.equal(logits(after), logits(before)) and not torch.equal(logits(after), different)
    logits(after).square().mean().backward()
    assert all(p.grad is not None for name, p in after.named_parameters() if "lora_" in name)


def test_hooks_of_accelerate_stay_around_it(stock, fused):
    hooked, plain = copy.deepcopy(stock), logits(stock)
    for module in hooked.modules():
        add_hook_to_module(module, ModelHook())
    assert torch.equal(logits(use_fused_rope(hooked)), logits(fused))
    longattn.restore(hooked)
    assert torch.equal(logits(hooked), plain)
    use_fused_rope(hooked)
    remove_hook_from_submodules(hooked)
    assert torch.equal(logits(hooked), logits(fused))
    longattn.restore(hooked)
    assert torch.equal(logits(hooked), plain)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_mixed_precision_of_fsdp_does_not_round_the_phases(one_rank, monkeypatch):
    fused = use_fused_rope(build("llama", torch.float32))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in fused.model.layers:
        fully_shard(layer, mesh=one_rank, mp_policy=policy)
    fully_shard(fused, mesh=one_rank, mp_policy=policy)
    tables = []

    def spy(query, key, cos, sin, **options):
        tables.append((query.dtype, cos))
        return longattn.apply_rope(query, key, cos, sin, **options)

    monkeypatch.setattr(fused_modules, "apply_rope", spy)
    logits(fused).float().square().mean().backward()
    inv_freq, _ = longattn.rope_frequencies({"rope_theta": 1e4}, 8)
    exact, _ = longattn.rope_cos_sin(FAR, inv_freq)
    assert len(tables) == 4
    for dtype, cos in tables:
        assert dtype == torch.bfloat16 and torch.equal(cos, exact)


def test_a_class_put_around_it_is_not_undone(one_rank, fused):
    fully_shard(fused.model.layers[1].self_attn, mesh=one_rank)
    expected = logits(fused)
    with pytest.raises(ValueError, match=r"restore: model.layers.1.self_attn became a FSDPLlamaAttention after"):
        longattn.restore(fused)
    assert torch.equal(logits(fused), expected)
