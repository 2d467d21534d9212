"""The processes that other tests start differ from those of Python only in when they import the package."""

import signal

import preloaded
import pytest

PROGRAM = """
import os, signal, subprocess, sys
print("given", sys.argv[1:], os.environ["GIVEN"], os.getcwd(), __name__, flush=True)
subprocess.run(["sh", "-c", "echo of a child >&2"], check=True)
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a message')", 1, "a message"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'the end', file=sys.stderr)", 0, "the end"),
    ],
)
def test_output_and_status(tmp_path, end, status, said):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = preloaded.run(str(tmp_path / "program.py"), end, cwd=tmp_path, GIVEN="a variable")
    assert done.returncode == status
    assert done.stdout == f"given {[end]} a variable {tmp_path} __main__\n"
    assert done.stderr.startswith("of a child\n")
    assert said in done.stderr


def test_ranks(tmp_path):
    program = "import os; rank = int(os.environ['RANK']); print(rank, os.environ['WORLD_SIZE']); raise SystemExit(rank)"
    (tmp_path / "program.py").write_text(program)
    done = preloaded.torchrun(2, str(tmp_path / "program.py"))
    assert [(one.returncode, one.stdout) for one in done] == [(0, "0 2\n"), (1, "1 2\n")]


def test_a_program_that_takes_too_long_is_ended(tmp_path):
    (tmp_path / "program.py").write_text("import time; print('started'); time.sleep(60)")
    program = preloaded.Program(str(tmp_path / "program.py"))
    with pytest.raises(AssertionError, match="it took more than 1 s"):
        program.wait(1)
    assert not program.is_running()
