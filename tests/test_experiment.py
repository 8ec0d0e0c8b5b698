"""benchmarks/experiment: its two commands and its table, on a tiny base; what its task and its comparison claim."""

import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "experiment"
TINY = "--steps 3 --dense-steps 1 --half-steps 1 --tokens 256 --hidden 64 --layers 1 --length 64 --vocab 512"
ONCE = ["x4_none_read-full", "x4_yarn_read", "all_trained-full_rate-0.0003"]
TO_BOTH_LENGTHS = ["linear_all_trained-leaking", "norms_trained-group64+shift", "all_trained-window64+"]
ROWS = [*ONCE, *TO_BOTH_LENGTHS]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_experiment_runs_goes_on_and_makes_its_table(tmp_path, capsys):
    import bases
    import extend
    import table

    made, out = tmp_path / "bases", tmp_path / "experiment.json"
    bases.main([*TINY.split(), "--out", str(made), "--seeds", "0", "--files", "40", "--windows", "2"])
    flags = ["--bases", str(made), "--parts", str(tmp_path / "parts"), "--out", str(out), "--quick", "--files", "40"]
    extend.main([*flags, "--seeds", "0", "--only", *ROWS])
    results = json.loads(out.read_text())
    assert len(results["rows"]) == len(ONCE) + 2 * len(TO_BOTH_LENGTHS)
    for row in results["rows"]:
        assert list(row["perplexity"]) == ["64", "128", "256", "512"] and min(row["perplexity"].values()) > 1
        assert ("training" in row) == (row["learns"] != "nothing")
    leaking = next(row for row in results["rows"] if row["train"] == "leaking")
    assert leaking["training"]["held_out_as_trained"] != leaking["training"]["held_out_as_read"]
    (layer,) = results["rows"][0]["attention_on_first"]
    assert len(layer) == 2 and all(0 < share < 1 for share in layer)
    tried = next(row for row in results["rows"] if row["rate"] is not None)
    assert tried["training"]["learning_rate"] == tried["rate"] == 3e-4
    capsys.readouterr()
    extend.main([*flags, "--seeds", "0", "--only", *ROWS])
    assert capsys.readouterr().out == ""  # all rows are there
    text = table.tables(results)
    assert all(name in text for name in ("yarn", "leaking", "lora+embeddings+norms", "0.0003", "most in layer 0"))


def test_recall_rows_have_one_answer_to_each_question():
    from corpus import NUM_KEYS, NUM_VALUES, Ids, recall_rows

    facts = torch.arange(1, 1 + NUM_KEYS * NUM_VALUES).view(NUM_KEYS, NUM_VALUES)
    ids = Ids(0, facts, torch.arange(200, 200 + NUM_KEYS), torch.arange(300, 300 + NUM_VALUES))
    text = torch.full((100,), 500)
    rows, places = recall_rows(text, ids, rows=5, length=61, keys=8, draw=torch.Generator().manual_seed(0))
    for row, place in zip(rows, places, strict=True):
        questions, answers, given = row[-16::2] - 200, row[-15::2] - 300, row[place]
        assert torch.equal(given, facts[questions, answers])
        assert sorted(place.tolist()) == (row[:-16].lt(200) & row[:-16].gt(0)).nonzero().flatten().tolist()


@pytest.mark.parametrize("changed, sees", [(15, True), (3, False)])
def test_rolled_attention_shows_the_first_half_group_the_end(changed, sees):
    import leaking

    module = torch.nn.Module()
    module.config = type("Config", (), {leaking.GROUP: 8})()
    query, key, value = torch.randn(3, 1, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    before, _ = leaking.rolled_attention(module, query, key, value, None)
    value[:, :, changed] += 1
    after, _ = leaking.rolled_attention(module, query, key, value, None)
    moved = (before != after).any(-1)[0]  # (S, H)
    assert moved[:3, 1].any() == sees and not moved[:3, 0].any()


def test_a_file_is_taken_by_one_and_not_again_when_it_is_there(tmp_path):
    from taking import taken

    path = tmp_path / "rows" / "one.json"
    with taken(path) as first, taken(path) as second:
        assert first and not second
    with taken(path) as again:  # the first did not make it
        assert again
        path.write_text("{}")
    with taken(path) as late:
        assert not late
    assert [file.name for file in path.parent.iterdir()] == ["one.json"]


def tiny_llama(**rope):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    positions = dict(max_position_embeddings=64, bos_token_id=0, rope_parameters={"rope_theta": 1e4, **rope})
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, **shape, **positions)).eval()


def test_attention_on_the_first_token_is_of_the_later_half_after_a_begin():
    from scores import attention_on_first

    model = tiny_llama(rope_type="default")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 50  # so that no two tokens get alike
    windows = torch.randint(1, 400, (3, 96), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.zeros(3, 1, dtype=torch.int64), windows[:, -39:]], 1)
    model.set_attn_implementation("eager")
    layers = model(rows, output_attentions=True).attentions
    expected = [[layer[:, head, 20:, 0].mean().item() for head in range(2)] for layer in layers]
    assert attention_on_first(model, windows, 40) == [pytest.approx(heads, abs=1e-4) for heads in expected]


def test_recall_reads_each_text_by_its_own_frequencies():
    from corpus import NUM_KEYS, NUM_VALUES, Ids
    from scores import recall

    model = tiny_llama(rope_type="dynamic", factor=4.0)
    facts = torch.arange(1, 1 + NUM_KEYS * NUM_VALUES).view(NUM_KEYS, NUM_VALUES)
    ids = Ids(0, facts, torch.arange(200, 200 + NUM_KEYS), torch.arange(300, 300 + NUM_VALUES))
    fresh = model.model.rotary_emb.inv_freq.clone()
    model(torch.ones(1, 200, dtype=torch.int64))
    assert not torch.equal(model.model.rotary_emb.inv_freq, fresh)
    recall(model, torch.full((300,), 350), ids, length=64, rows=2)
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh)
