"""Stock exports of every served family: its own windows, windows elsewhere, or the reason why not."""

import pytest
from checkpoints import digests, read_json, write_checkpoint
from hf_models import ALL_FAMILIES, FULL, SLIDING, build
from stock_process import assert_same_model, run_without_longattn
from transformers import AutoConfig

import longattn
from longattn.checkpoint import extend_checkpoint
from longattn.export import stock_config
from longattn.hf.families import FAMILIES
from longattn.hf.stock_windows import SIBLINGS

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0}
PLANS = {
    "cwm": dict(rope=LLAMA3, attention="window:6, full"),
    "gpt_oss": dict(rope={"factor": 2.0}, attention="full, window:6"),
    "phi3": dict(rope={"factor": 2.0, "long_factor": [4.0, 6.0]}, attention="window:6"),
    # whose rope is chosen by layer_types: another size in the same layers
    "cohere2": dict(rope=YARN, attention="window:6, full"),
    "gemma3_text": dict(rope=YARN, attention="window:6, full"),
    "olmo3": dict(rope=YARN, attention="window:6, full"),
    "olmo2": dict(rope=YARN, attention="full, window:6"),
}
BECOMES = {"llama": "ministral", "mistral": "ministral", "olmo2": "olmo3"}


def plan_of(family: str) -> longattn.Plan:
    """Rope, and windows where some architecture has them: in some of the layers where it can."""
    if family in PLANS:
        return longattn.Plan(**PLANS[family])
    windows = FAMILIES[family].windows
    if windows == "none" and family not in SIBLINGS:
        return longattn.Plan(rope=YARN)
    return longattn.Plan(rope=YARN, attention="window:6" if windows == "shared" else "2 x window:6, full")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in ALL_FAMILIES:
        made[family] = folder = tmp_path_factory.mktemp(family)
        src = write_checkpoint(folder / "src", family)
        before = digests(src)
        extend_checkpoint(src, folder / "longattn", plan_of(family))
        extend_checkpoint(src, folder / "stock", plan_of(family), export="stock")
        assert digests(src) == before
    run_without_longattn([folder / "stock" for folder in made.values()], tmp_path_factory.mktemp("ids"))
    return made


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_and_texts_equal_those_with_longattn(folders, family):
    assert_same_model(folders[family] / "longattn", folders[family] / "stock")
    fields = read_json(folders[family] / "stock" / "config.json")
    expected = BECOMES.get(family, family) if plan_of(family).attention == "2 x window:6, full" else family
    assert fields["model_type"] == ("olmo3" if family == "olmo2" else expected)
    assert "longattn" not in fields and "attn_implementation" not in fields


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rope_reads_back_equal(folders, family):
    with_longattn, stock = (
        AutoConfig.from_pretrained(folders[family] / which).rope_parameters for which in ("longattn", "stock")
    )
    if family == "olmo2":  # both kinds of layer of an OLMo 3 have a rope of their own
        assert stock == {FULL: with_longattn, SLIDING: with_longattn}
    elif family == "phi3":  # version 4 names the type so, and has the factor from the lengths
        assert stock.pop("type") == stock["rope_type"]
        assert stock == {key: value for key, value in with_longattn.items() if key != "factor"}
    else:
        assert stock == with_longattn


REFUSED = [
    ("gpt_neox", "window:8", "gpt_neox has no windows; write the checkpoint without export"),
    ("granite", "window:8, full", "granite has no windows"),
    ("phi3", "window:8, full", "phi3 has the same window in all layers"),
    ("starcoder2", "window:8, full", "starcoder2 has the same window in all layers"),
    ("cohere2", "full", "cohere2 rotates the layers that have windows and no others"),
    ("gemma3_text", "full, window:8", "gemma3_text has one rope for layers with windows and one for the others"),
]


@pytest.mark.parametrize(("family", "attention", "message"), REFUSED)
def test_windows_that_an_architecture_lacks_are_refused(family, attention, message):
    fields = {}
    if family == "gemma3_text":
        fields["rope_parameters"] = {
            FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        }
    model = build(family, **fields)
    longattn.extend(model, None, longattn.Plan(attention=attention))
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        stock_config(model.config)
    assert model.config.to_dict() == before


def test_layers_may_change_where_both_ropes_are_equal():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = build("gemma3_text", rope_parameters={FULL: rope, SLIDING: dict(rope)})
    longattn.extend(model, None, longattn.Plan(attention="full, window:8"))
    assert stock_config(model.config).fields["layer_types"] == [FULL, SLIDING] * 2
