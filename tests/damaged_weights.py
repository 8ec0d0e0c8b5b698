"""Ways in which a checkpoint's weights can be wrong, each with the words that refuse it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from checkpoints import INDEX, edit_json, read_json, rewrite

TOKEN = ["--add-token", "<tool>"]


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def cut_off(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-7])


def cut_off_in_header(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:40])


def empty_shard(folder):
    first_shard(folder).write_bytes(b"")


def trailing_bytes(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes() + b"xx")


def broken_header(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:8] + b"?" + path.read_bytes()[9:])


def no_header(folder):
    first_shard(folder).write_bytes(b"\xff" * 8)


def huge_header(folder):
    path = first_shard(folder)
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def deep_header(folder):
    text = b'{"a":' * 100_000
    first_shard(folder).write_bytes(len(text).to_bytes(8, "little") + text)


def edit_header(folder, edit):
    """Rewrite the header of the first shard, its tensors' bytes as they are."""
    path = first_shard(folder)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    edit(entries, next(name for name in entries if name != "__metadata__"))
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def overlapping(folder):
    edit_header(folder, lambda entries, name: entries.update(copy=entries[name]))


def past_the_end(folder):
    def edit(entries, name):
        last = max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")
        entries["more"] = {"dtype": "F32", "shape": [8], "data_offsets": [last, last + 32]}

    edit_header(folder, edit)


def size_and_bytes_differ(folder):
    edit_header(folder, lambda entries, name: entries[name].update(shape=[3, 3]))


def size_below_zero(folder):
    edit_header(folder, lambda entries, name: entries[name].update(shape=[-1]))


def size_in_parts(folder):
    edit_header(folder, lambda entries, name: entries[name].update(shape=[64.0, 32]))


def unknown_dtype(folder):
    edit_header(folder, lambda entries, name: entries[name].update(dtype="F128"))


def missing_shard(folder):
    first_shard(folder).unlink()


def edit_index(folder, edit):
    index = read_json(folder / INDEX)
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def index_with_too_much(folder):
    edit_index(folder, lambda names: names.update({"model.more.weight": first_shard(folder).name}))


def index_with_too_little(folder):
    edit_index(folder, lambda names: names.pop("model.norm.weight"))


def index_above(folder):
    edit_index(folder, lambda names: names.update({"model.norm.weight": "../secret.safetensors"}))


def index_absolute(folder):
    edit_index(folder, lambda names: names.update({"model.norm.weight": "/etc/passwd"}))


def index_of_lists(folder):
    edit_index(folder, lambda names: names.update({"model.norm.weight": ["model.safetensors"]}))


def index_broken(folder):
    (folder / INDEX).write_text("{")


def index_without_map(folder):
    (folder / INDEX).write_text('{"metadata": {}}')


def index_with_a_wrong_sum(folder):
    edit_json(folder / INDEX, metadata={"total_parameters": "many"})


def no_norm(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def no_layer(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name])


def no_head(folder):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))


def packed_weights(folder):
    def edit(tensors):
        weight = tensors.pop("model.layers.1.self_attn.q_proj.weight")
        tensors["model.layers.1.self_attn.q_proj.qweight"] = torch.zeros(4, weight.shape[0], dtype=torch.int32)

    rewrite(folder, edit)


def integer_embeddings(folder):
    name = "model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(64, 32, dtype=torch.int8)}))
    return TOKEN


class Payload:
    """Makes a folder `owned` when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "owned"),)


def no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def pickles_only(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder.parent)))


def pickled(folder, weights, **options):
    """Weights that torch.save wrote in place of the checkpoint's; gives the flags that allow them."""
    no_weights(folder)
    torch.save(weights, folder / "pytorch_model.bin", **options)
    return ["--rope-type", "yarn", "--factor", "4", "--allow-pickle"]


def pickle_that_runs(folder):
    return pickled(folder, {"model.norm.weight": Payload(folder.parent)})


def pickle_of_old(folder):
    return pickled(folder, {"model.norm.weight": torch.zeros(3)}, _use_new_zipfile_serialization=False)


def pickle_of_transposed(folder):
    return pickled(folder, {"model.norm.weight": torch.zeros(2, 3).T})


def pickle_cut_off(folder):
    flags = pickled(folder, {"model.norm.weight": torch.zeros(1000)})
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    return flags


def pickle_of_a_list(folder):
    return pickled(folder, [torch.zeros(3)])


def pickle_beyond_its_storage(folder):
    whole = torch.zeros(9)
    flags = pickled(folder, {"model.norm.weight": whole})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:12] if name.endswith("data/0") else content)
    return flags


def pickle_named_safetensors(folder):
    no_weights(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(folder.parent)))


WEIGHTS = [
    (cut_off, "is cut off: its header describes"),
    (cut_off_in_header, "do not hold its header"),
    (empty_shard, "is corrupt or cut off: its 0 bytes"),
    (trailing_bytes, "is corrupt: its header describes"),
    (broken_header, "is corrupt: its header can't be read"),
    (no_header, "do not hold its header"),
    (huge_header, "do not hold its header"),
    (deep_header, "is corrupt: its header can't be read"),
    (overlapping, "is corrupt: .* begins at byte"),
    (past_the_end, "is cut off: its header describes"),
    (size_and_bytes_differ, r"is corrupt: .* is F32 \[3, 3\] but has bytes 0 to"),
    (size_below_zero, r"is corrupt: .* is F32 \[-1\] but has bytes"),
    (size_in_parts, "is corrupt: .* must have whole numbers for sizes and bytes"),
    (unknown_dtype, "has the unknown dtype 'F128'"),
    (missing_shard, "names model-00001-of-.*, which is missing"),
    (index_with_too_much, "disagrees with the shards: model.more.weight is not in"),
    (index_with_too_little, "disagrees with the shards: .* holds model.norm.weight, which it does not list"),
    (index_above, "must name files beside it, got '../secret.safetensors'"),
    (index_absolute, "must name files beside it, got '/etc/passwd'"),
    (index_of_lists, r"must name files beside it, got \['model.safetensors'\]"),
    (index_broken, "model.safetensors.index.json is corrupt"),
    (index_without_map, "model.safetensors.index.json is corrupt: KeyError"),
    (index_with_a_wrong_sum, "model.safetensors.index.json is corrupt"),
    (no_norm, "config.json asks for model.norm.weight, but the weights have no tensor of that name"),
    (no_layer, r"config.json asks for model.layers.2.self_attn.q_proj.weight, but"),
    (no_head, "config.json asks for lm_head.weight, but"),
    (packed_weights, "config.json asks for model.layers.1.self_attn.q_proj.weight, but"),
    (integer_embeddings, "model.embed_tokens.weight must be one of F64, F32, F16, BF16 to be changed, got I8"),
    (no_weights, "has neither model.safetensors nor"),
    (pickles_only, "pytorch_model.bin, a pickle, which can run any code .*--allow-pickle"),
    (pickle_that_runs, "can't be read as tensors that torch.save wrote: it asks for posix.mkdir"),
    (pickle_of_old, "pytorch_model.bin can't be read as tensors that torch.save wrote: File is not a zip file"),
    (pickle_of_transposed, r"model.norm.weight is not contiguous, its strides are \(1, 3\)"),
    (pickle_cut_off, "pytorch_model.bin can't be read as tensors that torch.save wrote: "),
    (pickle_of_a_list, "it holds a list, not a dict of tensors"),
    (pickle_beyond_its_storage, r"model.norm.weight of shape \[9\] is larger than its storage of 3"),
    (pickle_named_safetensors, "model.safetensors is corrupt or cut off"),
]
"""(damage, words): `damage(folder)` gives the plan's flags where the damage shows with others than a rope's."""
