"""Killed, out of disk, its sources cut or changed under it: a merge says so, leaves nothing, and can be run again."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from merging import tiny

from posttrain.errors import CheckpointError
from posttrain.merging.merge import merge

KILLED = Path(__file__).with_name("killed_merge.py")
Mutation = Callable[[Path], object]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(work: Path, out: Path) -> None:
    merge(work / "base", [work / "adapter"], out, "bfloat16", max_shard_size=9_000)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several shards, an adapter, and `right`: what their merge must be."""
    folder = tmp_path_factory.mktemp("failures")
    base = tiny.save_base(folder / "base", True, torch.bfloat16, shards=True)
    tiny.save_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"])
    run(folder, folder / "right")
    return folder


@pytest.fixture
def sources(work: Path, tmp_path: Path) -> Path:
    """Base and adapter to be damaged."""
    for name in ("base", "adapter"):
        shutil.copytree(work / name, tmp_path / name)
    return tmp_path


@pytest.mark.contract(number=1)
def test_kill_at_every_moment(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at each file that is opened, made, renamed or removed: never a folder that is not whole."""
    before, right = contents(work), contents(work / "right")
    found = subprocess.run(
        [sys.executable, KILLED, work / "base", work / "adapter", tmp_path], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    moments = int(found.stdout)
    assert moments > 30
    monkeypatch.setattr(os, "fsync", lambda _: None)  # many reruns, none of them about disks
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    half_written = 0
    for moment in range(moments + 1):
        folder = tmp_path / str(moment)
        left = {path.name for path in folder.iterdir()}
        assert left <= {"out"} or left == {"out.merging"}, moment
        half_written += left == {"out.merging"}
        if "out" not in left:
            run(work, folder / "out")
        assert contents(folder / "out") == right, moment
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert half_written > 20
    assert contents(work) == before


def test_everything_is_on_disk_before_it_has_its_name(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut too there is the whole folder, or none."""
    happened: list[str] = []

    def record(name: str, describe: Callable[..., str]) -> None:
        original = getattr(os, name)

        def call(*given: object) -> object:
            happened.append(describe(*given))
            return original(*given)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "fdatasync"):
        record(name, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    record("rename", lambda source, _: f"rename {source}")
    run(work, tmp_path / "out")
    partial = tmp_path / "out.merging"
    renamed = happened.index(f"rename {partial}")
    synced = {str(partial), *(str(partial / name) for name in contents(tmp_path / "out"))}
    assert synced <= set(happened[:renamed])
    assert happened[renamed + 1 :] == [str(tmp_path)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        yield disk


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room when it is looked at; others fill the disk after that."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))


def test_too_small_a_disk_is_refused_at_once(work: Path, small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the merge needs 0\.\d+ GB, 0\.00 GB are free\n  -> make room"):
        run(work, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_disk_that_fills_up_meanwhile(work: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plenty(monkeypatch)
    page = 4096
    needed = sum(-(-len(content) // page) for content in contents(work / "right").values())
    for free in range(0, needed, 2):
        (small_disk / "filler").write_bytes(bytes((1 << 20) - free * page))
        with pytest.raises(CheckpointError, match="No space left on device\n  -> make room, rerun") as caught:
            run(work, small_disk / "out")
        assert caught.value.where.startswith(str(small_disk / "out.merging")), free
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
        (small_disk / "filler").unlink()
    run(work, small_disk / "out")
    assert contents(small_disk / "out") == contents(work / "right")


def test_limit_on_file_size(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a full disk, where none can be mounted."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: File too large\n  -> make room, rerun"):
            run(work, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
    run(work, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(work / "right")


def test_disk_without_room_for_names(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plenty(monkeypatch)
    for names in (1, 2, 3, 5):
        with mounted(tmp_path / str(names), f"size=1m,nr_inodes={names}") as disk:
            with pytest.raises(CheckpointError, match="No space left on device"):
                run(work, disk / "out")
            assert list(disk.iterdir()) == [], names


def test_disk_that_is_read_only(work: Path, tmp_path: Path) -> None:
    message = pytest.raises(CheckpointError, match="Read-only file system")
    with mounted(tmp_path / "disk", "size=1m,ro") as disk, message:
        run(work, disk / "out")


def shard_of(sources: Path) -> Path:
    return sorted((sources / "base").glob("*.safetensors"))[2]


def _rewrite(file: Path) -> None:
    """Other bytes, the same size."""
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def _replace(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy2(file, other)
    other.replace(file)


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "cut": (lambda file: os.truncate(file, file.stat().st_size - 200), "ends inside|changed while"),
    "emptied": (lambda file: os.truncate(file, 0), "ends inside"),
    "rewritten": (_rewrite, "changed while it was being read"),
    "replaced": (_replace, "changed while it was being read"),
    "removed": (lambda file: file.unlink(), "cannot be read: No such file"),
}


@pytest.mark.parametrize("victim", ["shard", "adapter"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_source_that_changes_between_planning_and_the_end(
    mutation: str, victim: str, work: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shard_of(sources) if victim == "shard" else sources / "adapter" / "adapter_model.safetensors"
    change, found = MUTATIONS[mutation]
    whole, usage = file.read_bytes(), shutil.disk_usage

    def change_now(folder: Path) -> object:  # headers were read by now, weights were not
        change(file)
        return usage(folder)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", change_now)
        with pytest.raises(CheckpointError, match=found) as caught:
            run(sources, sources / "out")
    assert caught.value.where == str(file)
    assert {path.name for path in sources.iterdir()} == {"base", "adapter"}
    file.write_bytes(whole)
    run(sources, sources / "out")
    assert contents(sources / "out") == contents(work / "right")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_shard(keep: int, work: Path, sources: Path) -> None:
    file = shard_of(sources)
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        run(sources, sources / "out")
    assert caught.value.where == str(file)
    assert {path.name for path in sources.iterdir()} == {"base", "adapter"}
    file.write_bytes(whole)
    run(sources, sources / "out")
    assert contents(sources / "out") == contents(work / "right")


def test_disk_that_cannot_be_read(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, file = os.preadv, shard_of(sources)

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        run(sources, sources / "out")
    assert caught.value.where == str(file)
    assert {path.name for path in sources.iterdir()} == {"base", "adapter"}
