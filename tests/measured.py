"""A command of lit-rlhf whose process writes its processor time, in seconds, and its peak memory, in MiB, to a file."""

import json
import resource
import sys
from pathlib import Path

from lit_rlhf.cli import main

if __name__ == "__main__":
    try:
        main(sys.argv[2:])
    finally:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        unit = 2**20 if sys.platform == "darwin" else 2**10
        numbers = {"seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / unit}
        Path(sys.argv[1]).write_text(json.dumps(numbers))
