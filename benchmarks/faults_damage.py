"""Damaged, foreign and hostile checkpoints, for faults.py."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from faults_runs import PROCESSES, Setting

from lit_rlhf.checkpoint_folders import CHECKSUMS, checksum
from lit_rlhf.testing.models import make_tiny_model

TRUNCATED = 10
"""The number of files that are cut off at a random place."""
RECORDS = 20
"""The number of records of a file in which one byte is changed."""


class RunsCode:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def damages(setting: Setting, kind: str, draw: random.Random) -> Iterator[tuple[str, Path]]:
    """Yield checkpoints that a run of a kind must refuse, each with what is wrong with it."""
    folder = setting.folder / "damaged-checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    good = (setting.whole(kind) / "checkpoints" / "last.ckpt").resolve()
    make = folders if good.is_dir() else files
    yield from make(good, folder, draw)
    other_module, other_model = ("trpo", "ppo-gpt2") if kind == "ppo" else ("ppo", "ppo-gpt2")
    if PROCESSES.get(kind, 1) == 1:
        yield "another module", setting.whole(other_module) / "checkpoints" / "last.ckpt"
    gpt2 = setting.folder / other_model
    if not gpt2.exists():
        model = make_tiny_model(setting.folder / "gpt2", "gpt2")
        words = ["--model.actor", str(model), "--model.critic", "null", "--model.advantages", "LeaveOneOut"]
        words += ["--model.sampling.responses", "2", "--model.iterations", "1"]
        setting.start("ppo", gpt2.name, *words).end_well()
    yield "another model", gpt2 / "checkpoints" / "last.ckpt"


def files(good: Path, folder: Path, draw: random.Random) -> Iterator[tuple[str, Path]]:
    """Yield damaged copies of a checkpoint file and other files, in a folder, each with what is wrong with it."""
    content = good.read_bytes()

    def write(name: str, data: bytes) -> tuple[str, Path]:
        path = folder / f"{name.replace(' ', '-').replace('/', '-')}.ckpt"
        path.write_bytes(data)
        return name, path

    yield write("empty", b"")
    yield write("one byte", content[:1])
    for number in range(TRUNCATED):
        yield write(f"truncated {number}", content[: draw.randrange(2, len(content) - 1)])
    with zipfile.ZipFile(good) as archive:
        records = [record for record in archive.infolist() if record.file_size]
        places = {"the table of contents": archive.start_dir + 16}  # the CRC-32 of the first record
    fixed = [record for record in records if "/data/" not in record.filename]
    for record in fixed + draw.sample([record for record in records if record not in fixed], RECORDS - len(fixed)):
        header = record.header_offset
        names = content[header + 26 : header + 30]  # the lengths of the name and of the extra field
        start = header + 30 + int.from_bytes(names[:2], "little") + int.from_bytes(names[2:], "little")
        places[record.filename.partition("/")[2]] = start + draw.randrange(record.file_size)
    for name, place in places.items():
        yield write(f"a byte changed in {name}", _changed(content, place))
    yield write("text", b"not a checkpoint\n" * 100)
    path = folder / "list.ckpt"
    torch.save([1, 2], path)
    yield "a list", path
    path = folder / "archive.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    yield "another archive", path
    path = folder / "code.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": RunsCode(folder / "ran")}, path)
    yield "code", path


def folders(good: Path, folder: Path, draw: random.Random) -> Iterator[tuple[str, Path]]:
    """Yield damaged copies of a checkpoint folder, in a folder, each with what is wrong with it."""
    names = sorted(path.name for path in good.iterdir())

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, folder / f"{name.replace(' ', '-')}.ckpt"))

    for name in names:
        path = copy(f"without {name}")
        (path / name).unlink()
        yield f"without {name}", path
        path = copy(f"a byte changed in {name}")
        content = (path / name).read_bytes()
        (path / name).write_bytes(_changed(content, draw.randrange(len(content))))
        yield f"a byte changed in {name}", path
        path = copy(f"truncated {name}")
        (path / name).write_bytes(content[: draw.randrange(len(content) - 1)])
        yield f"truncated {name}", path
    for name in (".metadata", "meta.pt"):  # with the right checksum
        path = copy(f"code in {name}")
        if name == "meta.pt":
            torch.save({"pytorch-lightning_version": "2.6.0", "loops": RunsCode(folder / "ran")}, path / name)
        else:
            (path / name).write_bytes(pickle.dumps(RunsCode(folder / "ran")))
        sums = json.loads((path / CHECKSUMS).read_text()) | {name: checksum(path / name)}
        (path / CHECKSUMS).write_text(json.dumps(sums))
        yield f"code in {name}", path
    empty = folder / "empty-folder.ckpt"
    empty.mkdir()
    yield "an empty folder", empty


def _changed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
