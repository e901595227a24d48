"""Downloaded files are compared with the digests that huggingface_hub stores with them."""

import hashlib
import os
import shutil
import time

import huggingface_hub
import pytest
from huggingface_hub._local_folder import write_download_metadata  # the library has no public name for it

from dreamllm_jax.convert.folders import convert_to_jax
from dreamllm_jax.convert.hub_files import check_downloads, recorded_digest
from dreamllm_jax.convert.recognize import open_checkpoint


def flip(file, at=-1):
    """Flips one bit of a file and keeps its modification time."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_cache_of_the_hub(tmp_path):
    repo, commit = tmp_path / "models--someone--model", "c" * 40
    blobs, snapshot = repo / "blobs", repo / "snapshots" / commit
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True), (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    digest = hashlib.sha256(b"weights").hexdigest()
    (blobs / digest).write_bytes(b"weights")
    file = snapshot / "model.safetensors"
    file.symlink_to(blobs / digest)
    # the library finds the file there: this is the layout of its cache
    assert huggingface_hub.try_to_load_from_cache("someone/model", file.name, tmp_path) == str(file)
    assert recorded_digest(file) == digest
    check_downloads([file])
    flip(blobs / digest)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its SHA-256 is .* download"):
        check_downloads([file])


def test_a_folder_downloaded_into(tmp_path):
    file = tmp_path / "unet" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert recorded_digest(file) is None
    write_download_metadata(tmp_path, "unet/model.safetensors", "abcdef", digest)
    assert recorded_digest(file) == digest
    flip(file)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        check_downloads([file])
    os.utime(file, (time.time() + 60,) * 2)  # the user has rewritten the file, so it is not checked
    assert recorded_digest(file) is None
    os.utime(file)
    write_download_metadata(tmp_path, "unet/model.safetensors", "abcdef", "0" * 40)  # a small file's Git hash
    assert recorded_digest(file) is None


@pytest.mark.parametrize("content", ["", "abcdef\n", "abcdef\n{digest}\nyesterday\n", "abcdef\n{digest}"])
def test_a_record_that_cannot_be_parsed_is_ignored(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    record = tmp_path / ".cache/huggingface/download/model.safetensors.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(content.format(digest="0" * 64))
    assert recorded_digest(tmp_path / "model.safetensors") is None


def test_a_conversion_looks_at_them_before_it_writes(golden, tmp_path):
    source = tmp_path / "b" / "checkpoint"
    shutil.copytree(golden / "dreamllm-b", tmp_path / "b")
    shard = sorted(source.glob("*.safetensors"))[0]
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    write_download_metadata(source, shard.name, "abcdef", digest)
    convert_to_jax(open_checkpoint(source), tmp_path / "whole")
    flip(shard)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        convert_to_jax(open_checkpoint(source), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
