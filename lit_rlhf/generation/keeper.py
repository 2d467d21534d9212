"""The program that keeps a server: ``python keeper.py PARENT FOLDER COMMAND …`` runs a command until PARENT ends.

The command runs in a process group of its own. All processes of this group end, and the folder is removed, as soon as
the command or the parent process ends, however it ends, when the parent closes this program's standard input, or when
this program receives SIGTERM. PARENT is the id of the parent process, and FOLDER the folder to remove. The program is
run by its path and imports only the standard library, so that it starts at once.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time

PATIENCE_SECONDS = 5.0
"""The maximum number of seconds between SIGTERM, the request to end, and SIGKILL, the end by force."""
WATCH_SECONDS = 0.5
"""The maximum number of seconds until this program notices that its parent or the command has ended."""


def keep(parent: int, folder: str, command: list[str]) -> int:
    """Run a command until it ends by itself, until the parent ends or closes the standard input, or until SIGTERM.

    Args:
        parent: The id of the process that started this program.
        folder: A folder to remove at the end.
        command: The program and its arguments.

    Returns:
        The exit code of the command, or 128 + n if signal n ended it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None and os.getppid() == parent:
            if select.select([sys.stdin], [], [], WATCH_SECONDS)[0]:
                break
    finally:
        end_group(process)
        shutil.rmtree(folder, ignore_errors=True)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ask all processes of the group that a process leads to end; after ``PATIENCE_SECONDS``, end them by force."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # without this, the system would keep the ended process in the group
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # the group has no process left
        pass
    process.wait()


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
