"""Checkpoints that are refused, interrupted or have no room: the words, and that SRC stays and DST never appears."""

import json
from types import SimpleNamespace

import pytest
from checkpoints import digests, edit_json, read_json, write_checkpoint

import longattn
from longattn.checkpoint import extend_checkpoint

ROPE = longattn.Plan(rope={"rope_type": "yarn", "factor": 4.0})
TOKENS = longattn.Plan(tokens={"tokens": ["<tool>"]})


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama") / "src")


@pytest.fixture(autouse=True)
def src_is_untouched(src):
    before = digests(src)
    yield
    assert digests(src) == before


class Stop(BaseException):
    """As KeyboardInterrupt, not an Exception."""


def test_interrupted_write_leaves_nothing(src, tmp_path):
    def stop(name, done, total):
        if done > total // 2:
            assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
            raise Stop

    with pytest.raises(Stop):
        extend_checkpoint(src, tmp_path / "dst", ROPE, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_noticed_before_anything_is_written(src, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="the disk has 0.00 GiB left"):
        extend_checkpoint(src, tmp_path / "dst", ROPE)
    assert list(tmp_path.iterdir()) == []


def test_existing_dst_is_refused(src, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("dst", "link"):
        with pytest.raises(FileExistsError, match=f"DST .*{name} exists"):
            extend_checkpoint(src, tmp_path / name, ROPE)


def test_dst_inside_src_is_refused(src, tmp_path):
    (tmp_path / "link").symlink_to(src)
    for dst in (src / "new", src / "a" / "b", tmp_path / "link" / "new"):
        with pytest.raises(ValueError, match="must not lie in SRC"):
            extend_checkpoint(src, dst, ROPE)


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def cut_off(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-7])


def trailing_bytes(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes() + b"xx")


def broken_header(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:8] + b"?" + path.read_bytes()[9:])


def no_header(folder):
    first_shard(folder).write_bytes(b"\xff" * 8)


def overlapping(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[2,', 1))


def missing_shard(folder):
    first_shard(folder).unlink()


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = read_json(path)
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def index_with_too_much(folder):
    edit_index(folder, lambda names: names.update({"model.more.weight": first_shard(folder).name}))


def index_with_too_little(folder):
    edit_index(folder, lambda names: names.pop("model.norm.weight"))


def index_elsewhere(folder):
    edit_index(folder, lambda names: names.update({"model.norm.weight": "../secret.safetensors"}))


def index_broken(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def pickles_only(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")


def no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def quantised(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def other_sizes(folder):
    edit_json(folder / "config.json", vocab_size=80)


def config_of_wrong_type(folder):
    edit_json(folder / "config.json", max_position_embeddings="many")


def unknown_family(folder):
    edit_json(folder / "config.json", model_type="persimmon", architectures=["PersimmonForCausalLM"])


DAMAGE = [
    (cut_off, "is cut off: its header describes"),
    (trailing_bytes, "is corrupt: its header describes"),
    (broken_header, "is corrupt: its header can't be read"),
    (no_header, "do not hold its header"),
    (overlapping, "is corrupt"),
    (missing_shard, "names model-00001-of-.*, which is missing"),
    (index_with_too_much, "disagrees with the shards: model.more.weight is not in"),
    (index_with_too_little, "disagrees with the shards: .* holds model.norm.weight, which it does not list"),
    (index_elsewhere, "must name files beside it, got '../secret.safetensors'"),
    (index_broken, "model.safetensors.index.json is corrupt"),
    (pickles_only, "pytorch_model.bin, a pickle, which can run any code"),
    (no_weights, "has neither model.safetensors nor"),
    (no_config, "has no config.json"),
    (quantised, r"is quantised \(gptq\)"),
    (other_sizes, r"config.json makes model.embed_tokens.weight \[80, 32\], but .* holds \[64, 32\]"),
    (config_of_wrong_type, "transformers refuses the config"),
    (unknown_family, "model_type 'persimmon' is not served: it is not among those"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_source_is_refused_with_reason(tmp_path, damage, message):
    bad = write_checkpoint(tmp_path / "bad")
    damage(bad)
    before = digests(bad)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        extend_checkpoint(bad, tmp_path / "dst", ROPE)
    assert str(caught.value).startswith("extend: ")
    assert digests(bad) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_missing_tokenizer_is_refused_where_tokens_are_added(tmp_path):
    src = write_checkpoint(tmp_path / "src")
    for path in src.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer, so no tokens can be added"):
        extend_checkpoint(src, tmp_path / "dst", TOKENS)
    extend_checkpoint(src, tmp_path / "dst", ROPE)


def test_plan_that_changes_nothing_is_refused(src, tmp_path):
    with pytest.raises(ValueError, match="changes no rotary frequency"):
        extend_checkpoint(src, tmp_path / "dst", longattn.Plan(rope={"rope_type": "linear", "factor": 1.0}))
    assert list(tmp_path.iterdir()) == []


def test_source_must_be_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got the file"):
        extend_checkpoint(tmp_path / "file", tmp_path / "dst", ROPE)
    with pytest.raises(ValueError, match="neither a folder nor the id of a model"):
        extend_checkpoint("./no/such/folder", tmp_path / "dst", ROPE)
    with pytest.raises(OSError, match="SRC nobody/nothing is no folder here, and as a Hub id it can't be fetched"):
        extend_checkpoint("nobody/nothing", tmp_path / "dst", ROPE)
