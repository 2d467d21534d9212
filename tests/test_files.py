"""Files and folders are complete or absent, whatever happens while they are written."""

import signal
from pathlib import Path

import preloaded
import pytest

from lit_rlhf.files import replacing, write_text


def write_folder(folder: Path, text: str) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "weights").write_text(text)


@pytest.mark.parametrize("older", ["nothing", "a folder", "a file"])
def test_a_folder_takes_the_place_of_what_was_there(tmp_path, older):
    path = tmp_path / "model"
    if older == "a folder":
        write_folder(path, "older")
        (path / "leftover").write_text("")
    elif older == "a file":
        path.write_text("older")
    with replacing(path) as new:
        write_folder(new, "newer")
    assert [file.relative_to(path).as_posix() for file in sorted(path.rglob("*"))] == ["inner", "inner/weights"]
    assert (path / "inner" / "weights").read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_file_takes_the_place_of_a_folder(tmp_path):
    write_folder(tmp_path / "last.ckpt", "older")
    write_text(tmp_path / "last.ckpt", "newer")
    assert (tmp_path / "last.ckpt").read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_changes_nothing(tmp_path, error):
    write_folder(tmp_path / "model", "older")

    def fail() -> None:
        with replacing(tmp_path / "model") as new:
            write_folder(new, "newer")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "model" / "inner" / "weights").read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_nothing_written_is_an_error_that_changes_nothing(tmp_path):
    write_text(tmp_path / "config.yaml", "older")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "config.yaml"):
        pass
    assert (tmp_path / "config.yaml").read_text() == "older"


def test_a_killed_process_leaves_nothing_that_hinders_the_next(tmp_path):
    write_folder(tmp_path / "model", "older")
    (tmp_path / "killed.py").write_text(
        "import os, signal\nfrom pathlib import Path\nfrom lit_rlhf.files import replacing\n"
        "with replacing(Path('model')) as new:\n    new.mkdir()\n    (new / 'config.json').write_text('{')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert preloaded.run("killed.py", cwd=tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "model" / "inner" / "weights").read_text() == "older"
    with replacing(tmp_path / "model") as new:
        write_folder(new, "newer")
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()] == [
        "killed.py",
        "model/inner/weights",
    ]
