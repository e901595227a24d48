"""Small files of the kinds that users hold, as real tars, zips, jsons and images."""

import io
import json
import tarfile
import zipfile

from PIL import Image

BROKEN = b"\xff\xd8 this is no image"


def picture(colour="red", size=(20, 16), format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=format)
    return buffer.getvalue()


def write_tar(path, files):
    """`files`: name -> bytes."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, data) in enumerate(files.items()):
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_lines(path, records):
    """A jsonl; a string among the records is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_json(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
