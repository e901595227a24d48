"""Downloads against the digests that the hub's library leaves beside them."""

import hashlib
import os
import shutil
import time

import pytest

from dreamllm_jax.convert.convert import convert_to_jax
from dreamllm_jax.convert.hub_files import check_downloads, recorded_digest
from dreamllm_jax.convert.sources import open_source


def flip(file, at=-1):
    """One bit of a file, without touching its time."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    digest = hashlib.sha256(b"weights").hexdigest()
    (blobs / digest).write_bytes(b"weights")
    file = snapshot / "model.safetensors"
    file.symlink_to(blobs / digest)
    assert recorded_digest(file) == digest
    check_downloads([file])
    flip(blobs / digest)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its SHA-256 is .* download"):
        check_downloads([file])


def test_a_folder_downloaded_into(tmp_path):
    file = tmp_path / "unet" / "model.safetensors"
    record = tmp_path / ".cache/huggingface/download/unet/model.safetensors.metadata"
    file.parent.mkdir(), record.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert recorded_digest(file) is None
    record.write_text(f"abcdef\n{digest}\n{time.time()}\n")
    assert recorded_digest(file) == digest
    flip(file)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        check_downloads([file])
    os.utime(file, (time.time() + 60,) * 2)  # written anew: its owner's business
    assert recorded_digest(file) is None
    record.write_text(f"abcdef\n{'0' * 40}\n{time.time() + 99}\n")  # a small file's digest is another kind
    assert recorded_digest(file) is None


def test_a_conversion_looks_at_them_before_it_writes(golden, tmp_path):
    source = tmp_path / "b" / "checkpoint"
    shutil.copytree(golden / "dreamllm-b", tmp_path / "b")
    record = source / ".cache" / "huggingface" / "download"
    record.mkdir(parents=True)
    shard = sorted(source.glob("*.safetensors"))[0]
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    (record / f"{shard.name}.metadata").write_text(f"abcdef\n{digest}\n{time.time() + 5}\n")
    convert_to_jax(open_source(source), tmp_path / "whole")
    flip(shard)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        convert_to_jax(open_source(source), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
