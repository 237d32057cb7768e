"""Crashes and full disks, for real: the checkpoint before stays whole, and the error has the figures."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionai.errors import StorageError
from fusionai.tensor import TensorData
from fusionai.training.checkpoint import CheckpointReader, CheckpointWriter, Manifest, TensorSpec, latest, prune

SHAPE = (1 << 20,)
SIZE = 4 << 20

PREPARE = """
    import os, sys
    from pathlib import Path
    from fusionai.errors import StorageError
    from fusionai.tensor import TensorData
    from fusionai.training.checkpoint import CheckpointWriter, Manifest, TensorSpec, latest
    run, mode = Path(sys.argv[1]), sys.argv[2]
    SHAPE, SIZE = (1 << 20,), 4 << 20
    def begin(step, count):
        folder = run / "checkpoints" / f"step-{step:06d}"
        specs = [TensorSpec(f"w{index}", "float32", SHAPE) for index in range(count)]
        return CheckpointWriter(folder, {"model.safetensors": specs})
    def put(writer, index):
        writer.write("model.safetensors", f"w{index}", TensorData("float32", SHAPE, bytes([index + 1]) * SIZE))
    manifest = Manifest(step=2, seed=0, job="x", graph_hash="y")
"""


def save(run: Path, step: int, count: int = 1) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    layout = [TensorSpec(f"w{index}", "float32", SHAPE) for index in range(count)]
    writer = CheckpointWriter(folder, {"model.safetensors": layout})
    try:
        for index, spec in enumerate(layout):
            tensor = TensorData("float32", SHAPE, bytes([index + 1]) * SIZE)
            writer.write("model.safetensors", spec.name, tensor)
        writer.commit(Manifest(step=step, seed=0, job="x", graph_hash="y"))
    except BaseException:
        writer.abort()
        raise
    return folder


def run_script(body: str, run: Path, mode: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(PREPARE) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script, str(run), mode], capture_output=True, text=True, timeout=250, check=False
    )


def whole(folder: Path) -> None:
    reader = CheckpointReader(folder)
    reader.verify()
    assert bytes(reader.read("w0").data[:1]) == b"\x01"


CRASH = """
    from fusionai.training.checkpoint import writer as module
    def crash(*_): os._exit(9)
    def nothing(*_): pass
    writer = begin(2, 2)
    put(writer, 1)
    if mode == "tensors": crash()
    put(writer, 0)
    if mode == "hash": module.file_sha256 = crash
    if mode == "flush": module._flush_folder = crash
    if mode == "rename": writer._appear = crash
    if mode == "between": writer._partial.__class__.rename, original = (
        lambda path, to: original(path, to) if path.name == "step-000002" else crash()
    ), writer._partial.__class__.rename
    writer.commit(manifest)
"""


@pytest.mark.parametrize("moment", ["tensors", "hash", "flush", "rename", "between"])
@pytest.mark.parametrize("same_step", [False, True])
def test_a_crash_keeps_the_checkpoint_before(tmp_path: Path, moment: str, same_step: bool) -> None:
    before = save(tmp_path, 2 if same_step else 1)
    assert run_script(CRASH, tmp_path, moment).returncode == 9
    assert latest(tmp_path) == before
    whole(before)
    after = save(tmp_path, 2, count=2)
    assert latest(tmp_path) == after
    whole(after)
    prune(tmp_path, 1)
    assert [path.name for path in after.parent.iterdir()] == ["step-000002"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    body = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
        try:
            writer = begin(2, 1)
            put(writer, 0)
        except StorageError as error:
            print(error)
    """
    before = save(tmp_path, 1)
    found = run_script(body, tmp_path, "")
    assert found.returncode == 0, found.stderr
    assert "File too large" in found.stdout
    assert "needs 4,194,4" in found.stdout  # 4 MiB and the header
    assert f"last good checkpoint is kept: {before}" in found.stdout
    assert [path.name for path in before.parent.iterdir()] == ["step-000001"]
    whole(before)


@contextlib.contextmanager
def tiny_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """Mount a file system of a few megabytes, where that is allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("needs root on Linux to mount a small disk")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    run = tmp_path / "disk"
    with tiny_disk(run, 12 << 20):
        before = save(run, 1)
        with pytest.raises(StorageError) as caught:
            save(run, 2, count=2)
        assert "not enough space; it needs 8,388," in str(caught.value)
        assert "bytes are free" in str(caught.value)
        assert str(before) in str(caught.value)
        assert [path.name for path in before.parent.iterdir()] == ["step-000001"]
        whole(before)


@pytest.mark.parametrize("moment", ["tensor", "file", "commit"])
def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, moment: str) -> None:
    run = tmp_path / "disk"
    with tiny_disk(run, 12 << 20):
        before = save(run, 1)
        folder = before.with_name("step-000002")
        writer = CheckpointWriter(folder, {"model.safetensors": [TensorSpec("w0", "float32", SHAPE)]})
        tensor = TensorData("float32", SHAPE, bytes(SIZE))

        def fill() -> None:
            with contextlib.suppress(OSError), (run / "other").open("wb", buffering=0) as other:
                while True:
                    other.write(bytes(1 << 12))

        def finish() -> None:
            if moment == "tensor":
                fill()
            writer.write("model.safetensors", "w0", tensor)
            fill()
            if moment == "file":
                writer.add_files(lambda folder: (folder / "config.json").write_text("{}" * 10_000))
            writer.commit(Manifest(step=2, seed=0, job="x", graph_hash="y"))

        with pytest.raises(StorageError, match=f"No space left .* free.*kept: {before}"):
            finish()
        writer.abort()
        assert sorted(path.name for path in before.parent.iterdir()) == ["step-000001"]
        whole(before)
        (run / "other").unlink()
        assert latest(run) == before
        whole(save(run, 2))


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(StorageError, match=r"step-000001 cannot be written: .*another run folder"):
        save(tmp_path, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_disk_that_may_only_be_read(tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    if os.geteuid() == 0:
        remount = ["mount", "--bind", str(tmp_path), str(tmp_path)]
        if subprocess.run(remount, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path)], check=True)
    else:
        before.parent.chmod(0o555)
    try:
        with pytest.raises(StorageError, match=r"step-000002 cannot be written.*kept: .*step-000001"):
            save(tmp_path, 2)
        assert latest(tmp_path) == before
        whole(before)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)
        else:
            before.parent.chmod(0o755)
