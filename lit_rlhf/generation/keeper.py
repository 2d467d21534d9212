"""The keeper of a server: ``python keeper.py PARENT FOLDER COMMAND …`` runs a command, and ends it when PARENT ends.

PARENT is the id of the process that starts this program, FOLDER is a folder to remove at the end, and COMMAND is the
command with its arguments. The command runs in a process group of its own. This program ends the whole group and
removes the folder when the command ends, when the parent process ends for any reason, when the parent closes this
program's standard input, or when this program receives SIGTERM. This program is run by its path and imports only the
standard library, so that it starts quickly.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time

PATIENCE_SECONDS = 5.0
"""The maximum number of seconds between SIGTERM, which asks processes to end, and SIGKILL, which ends them by force."""
WATCH_SECONDS = 0.5
"""The maximum number of seconds that pass before this program notices that its parent or the command has ended."""


def keep(parent: int, folder: str, command: list[str]) -> int:
    """Run a command until it ends, or until the parent ends or closes this program's standard input.

    Args:
        parent: The id of the process that started this program.
        folder: A folder to remove at the end.
        command: The program to run, and its arguments.

    Returns:
        The exit code of the command, or 128 + n if signal n ended the command.

    Raises:
        SystemExit: if this program receives SIGTERM; the command has then been ended, and the folder removed.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it asks the parent for a checkpoint; the command ignores it, too
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
    """End the process group whose leader is ``process``: with SIGTERM and, if that is not enough, with SIGKILL.

    SIGKILL follows ``PATIENCE_SECONDS`` after SIGTERM if a process of the group is still running then.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # otherwise, the leader would stay in the group as a zombie
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # the group has no process left
        pass
    process.wait()


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
