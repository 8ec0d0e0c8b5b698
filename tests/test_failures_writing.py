"""Writing that fails or is cut short, for real: DST is whole or absent, SRC as it was, and the next run is clean."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import digests, read_json, stored

import longattn
from longattn.checkpoint import extend_checkpoint

pytestmark = pytest.mark.usefixtures("src_is_untouched")

ROPE = longattn.Plan(rope={"rope_type": "yarn", "factor": 4.0})
RUN = """
import os, signal, sys
import longattn
from longattn.checkpoint import extend_checkpoint
plan = longattn.Plan(rope={"rope_type": "yarn", "factor": 4.0}, tokens={"tokens": ["<tool>"]})
src, dst = sys.argv[1:3]
"""


def run(code, src, dst, within=()):
    """Run code in a process of its own, with `plan`, `src` and `dst` at hand."""
    command = [*within, sys.executable, "-c", RUN + code, str(src), str(dst)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


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


KILL = """
for name, share in (("early", 0.0), ("late", 0.9)):
    def kill(tensor, done, total):
        if done > total * share:
            os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child:
        extend_checkpoint(src, os.path.join(dst, name), plan, progress=kill)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_killed_write_leaves_no_dst_and_the_next_run_removes_what_it_left(src, tmp_path):
    done = run(KILL, src, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("early", "late"):
        (left,) = tmp_path.glob(f".{name}.*.part")
        assert not (tmp_path / name).exists()
        assert list(left.glob("*.safetensors"))
        (tmp_path / f".{name}2.0123abcd.part").mkdir()  # another target's
        extend_checkpoint(src, tmp_path / name, ROPE)
        assert sorted(path.name for path in tmp_path.glob(f"*{name}*")) == [f".{name}2.0123abcd.part", name]
        assert list(stored(tmp_path / name)) == list(stored(src))


def test_folder_that_is_being_written_is_left_alone(src, tmp_path):
    """Of two runs to one DST the first to end has it, and the other says so."""
    seen = []

    def meanwhile(name, done, total):
        if not seen:
            seen.append(name)
            extend_checkpoint(src, tmp_path / "dst", longattn.Plan(rope={"rope_type": "linear", "factor": 2.0}))
            assert len(list(tmp_path.glob(".dst.*.part"))) == 1

    with pytest.raises(OSError, match="^extend: DST .*dst was not written: .*not empty"):
        extend_checkpoint(src, tmp_path / "dst", ROPE, progress=meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
    assert read_json(tmp_path / "dst" / "config.json")["rope_parameters"]["rope_type"] == "linear"


def test_full_disk_is_noticed_before_anything_is_written(src, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="0.00 GiB are needed, the disk has 0.00 GiB left"):
        extend_checkpoint(src, tmp_path / "dst", ROPE)
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource
extend_checkpoint(src, dst, plan)
for most in (0, 1000, 3000, 15000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        extend_checkpoint(src, f"{dst}{most}", plan)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error)
"""


def test_write_that_the_system_refuses_leaves_nothing(src, tmp_path):
    """No file may grow beyond a limit: configs, tokenizer and shards reach it in turn."""
    result = run(LIMITED, src, tmp_path / "dst")
    assert result.returncode == 0, result.stderr
    assert re.findall("^extend: DST .*/dst([0-9]+) was not written: .*File too large", result.stdout, re.M) == [
        *("0", "1000", "3000", "15000")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


FULL = """
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=2**60)  # full by others, after the check
for disk in ("small", "large"):
    try:
        extend_checkpoint(src, os.path.join(dst, disk, "dst"), plan)
    except OSError as error:
        print(os.listdir(os.path.join(dst, disk)), error)
"""
MOUNTED = """
cd "$1" && mkdir small large && mount -t tmpfs -o size=20k tmpfs small && mount -t tmpfs -o size=80k tmpfs large
shift && exec "$@"
"""


def can_mount():
    if shutil.which("unshare") is None:
        return False
    arguments = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(arguments, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no user namespaces to mount a small disk in")
def test_disk_that_fills_up_leaves_nothing(src, tmp_path):
    result = run(FULL, src, tmp_path, within=["unshare", "-rm", "sh", "-c", MOUNTED, "sh", str(tmp_path)])
    assert result.returncode == 0, result.stderr
    words = r"^\[\] extend: DST .*/(small|large)/dst was not written: .*No space left on device"
    assert re.findall(words, result.stdout, re.M) == ["small", "large"], result.stdout


def test_destination_that_may_not_be_written_is_refused(src):
    """Root may write anywhere, so it becomes another user, once all that writing needs is imported."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        shutil.copytree(src, top / "src")
        (top / "locked").mkdir(mode=0o555)
        for path in (top, *(top / "src").rglob("*")):
            path.chmod(0o755)
        extend_checkpoint(top / "src", top / "warm", ROPE)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(
                PermissionError, match="^extend: DST .*dst was not written: .*Permission denied"
            ) as caught:
                extend_checkpoint(top / "src", top / "locked" / "dst", ROPE)
        finally:
            if root:
                os.seteuid(0)
        assert caught.value.errno == 13
        assert list((top / "locked").iterdir()) == []


def test_destination_below_a_file_is_refused(src, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="^extend: DST .*dst was not written: .*(Not a directory|File exists)"):
        extend_checkpoint(src, tmp_path / "file" / "dst", ROPE)
    assert (tmp_path / "file").read_text() == ""


def test_existing_dst_is_refused(src, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "same").symlink_to(src)
    for dst in (tmp_path / "dst", tmp_path / "link", tmp_path / "same", src):
        with pytest.raises(FileExistsError, match=f"^extend: DST .*{dst.name} exists"):
            extend_checkpoint(src, dst, ROPE)


def test_dst_inside_src_is_refused(src, tmp_path):
    (tmp_path / "link").symlink_to(src)
    for dst in (src / "new", src / "a" / "b", tmp_path / "link" / "new", src / ".." / src.name / "new"):
        with pytest.raises(ValueError, match="^extend: DST .* must not lie in SRC"):
            extend_checkpoint(src, dst, ROPE)


def test_links_are_followed_and_not_written(src, tmp_path):
    """As in the cache of the Hub, where every file is a link into a store of blobs."""
    blobs, linked = tmp_path / "blobs", tmp_path / "linked"
    shutil.copytree(src, blobs)
    for path in blobs.rglob("*"):
        link = linked / path.relative_to(blobs)
        if path.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    before = digests(blobs)
    extend_checkpoint(linked, tmp_path / "dst", ROPE)
    extend_checkpoint(blobs, tmp_path / "dst2", ROPE)
    assert not any(path.is_symlink() for path in (tmp_path / "dst").rglob("*"))
    weights = {name: digest for name, digest in digests(tmp_path / "dst").items() if "model" in name}
    assert weights.items() <= digests(tmp_path / "dst2").items()
    assert digests(blobs) == before
