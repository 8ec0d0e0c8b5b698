"""Checkpoints that torch.save pickled: read only where that is asked for, never run, and written as safetensors."""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, digests, read_json, same_bits, stored
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import longattn
from longattn.checkpoint import extend_checkpoint, preview_checkpoint
from longattn.cli import app
from longattn.pickled_shards import open_weights

ROPE = longattn.Plan(rope={"rope_type": "yarn", "factor": 4.0})
TOKENS = longattn.Plan(tokens={"tokens": [f"<t{i}>" for i in range(9)]})


@pytest.fixture(params=["one file", "shards"])
def pickled(src, tmp_path, request):
    """The checkpoint of `src` as transformers 4 and torch.save wrote them, with the attributes of a state dict."""
    folder = tmp_path / "pickled"
    shutil.copytree(src, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = torch.nn.Module().state_dict()
    for path in sorted(src.glob("*.safetensors")):
        part = load_file(path)
        if request.param == "shards":
            torch.save(part, folder / f"pytorch_{path.stem}.bin")
        weights.update(part)
    if request.param == "one file":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        index = read_json(src / INDEX)
        files = {name: f"pytorch_{file.removesuffix('.safetensors')}.bin" for name, file in index["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({**index, "weight_map": files}))
    return folder


@pytest.mark.parametrize("plan", [ROPE, TOKENS])
def test_pickles_become_what_their_safetensors_become(src, pickled, tmp_path, plan):
    before = digests(pickled)
    expected = extend_checkpoint(src, tmp_path / "expected", plan)
    assert preview_checkpoint(pickled, plan, allow_pickle=True) == expected
    assert extend_checkpoint(pickled, tmp_path / "dst", plan, allow_pickle=True) == expected
    assert digests(pickled) == before
    found, meant = stored(tmp_path / "dst"), stored(tmp_path / "expected")
    assert found.keys() == meant.keys()
    assert all(same_bits(found[name][1], meant[name][1]) for name in meant)
    if (pickled / "pytorch_model.bin").exists():
        assert {file for file, _ in found.values()} == {"model.safetensors"}
    else:
        assert read_json(tmp_path / "dst" / INDEX) == read_json(tmp_path / "expected" / INDEX)
    assert not list((tmp_path / "dst").glob("*.bin*"))
    ids = torch.arange(40)[None] % 60
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dst", "expected"))
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_pickles_are_refused_unless_asked_for(pickled, tmp_path):
    with pytest.raises(ValueError, match="a pickle, which can run any code .* allow_pickle"):
        extend_checkpoint(pickled, tmp_path / "dst", ROPE)
    flags = ["extend", str(pickled), str(tmp_path / "dst"), "--rope-type", "yarn", "--factor", "4"]
    assert CliRunner().invoke(app, flags).exit_code == 2
    result = CliRunner().invoke(app, [*flags, "--allow-pickle"])
    assert result.exit_code == 0 and list((tmp_path / "dst").glob("*.safetensors")), result.stderr


def test_safetensors_go_before_pickles(src, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(src, both)
    (both / "pytorch_model.bin").write_bytes(b"no pickle")
    extend_checkpoint(both, tmp_path / "dst", ROPE, allow_pickle=True)
    assert digests(tmp_path / "dst")[INDEX] == digests(src)[INDEX]


def test_views_of_one_storage_and_every_dtype_are_read(src, pickled, tmp_path):
    """Rows of one storage, a tensor of no elements, one of none of its own sizes, and dtypes that no model has."""
    name = next(iter(sorted(path.name for path in pickled.glob("*.bin"))))
    weights = torch.load(pickled / name, weights_only=True)
    rows = torch.arange(24.0).reshape(4, 6)
    more = {"extra.first": rows[:2], "extra.last": rows[3], "extra.none": rows[:0], "extra.one": rows[2:3, None]}
    for dtype in (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        more[f"extra.{dtype}"] = rows.to(dtype)
    more["extra.bool"] = rows > 3
    more["extra.scalar"] = torch.tensor(5.0)
    torch.save({**weights, **more}, pickled / name)
    index = pickled / "pytorch_model.bin.index.json"
    if index.exists():
        fields = read_json(index)
        fields["weight_map"].update(dict.fromkeys(more, name))
        index.write_text(json.dumps(fields))
    extend_checkpoint(pickled, tmp_path / "dst", ROPE, allow_pickle=True)
    found = stored(tmp_path / "dst")
    assert all(
        found[key][1].dtype == tensor.dtype and torch.equal(found[key][1], tensor) for key, tensor in more.items()
    )


@given(edits=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4))
@example(edits=[(30, b"r\xff\xff\xff\xff")])  # a value's number that asks for a list of 2^32
@example(edits=[(119, b"\x00\x96")])  # bytes of a length beyond all memory
@settings(max_examples=150, deadline=None)
def test_pickle_of_any_bytes_is_read_or_refused(edits):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pytorch_model.bin")
        torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, path)
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, edited(content, edits) if name.endswith("data.pkl") else content)
        size = path.stat().st_size
        try:
            (shard,) = open_weights(Path(folder), allow_pickle=True).shards
        except ValueError as error:
            assert "pytorch_model.bin can't be read as tensors" in str(error)
        else:
            assert all(0 <= tensor.start <= tensor.start + tensor.num_bytes <= size for tensor in shard.tensors)


def edited(content, edits):
    changed = bytearray(content)
    for place, new in edits:
        start = place % len(changed)
        changed[start : start + len(new)] = new
    return bytes(changed)
