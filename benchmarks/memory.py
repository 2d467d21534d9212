"""The peak memory of an iteration by micro-batch size: resident (on a GPU: allocated), with iteration.py's models.

    python benchmarks/memory.py

tests/test_largest_tensor.py checks that no tensor exceeds an eighth of a micro-batch's tokens times the vocabulary.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from models import write_models

HERE = Path(__file__).resolve().parent


def peaks() -> None:
    """Print the peak memory for several values of max_tokens."""
    print("| max_tokens | precision | s per iteration | peak GiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        for max_tokens in (1024, 2048, 8192):
            for precision in ("32-true", "bf16-mixed"):
                words = ["--iterations", "3", "--max-tokens", str(max_tokens), "--precision", precision]
                done = subprocess.run(
                    [sys.executable, str(HERE / "ours_ppo.py"), str(models), *words], capture_output=True, text=True
                )
                measured = json.loads(done.stdout.strip().splitlines()[-1])
                cells = [max_tokens, precision, f"{measured['median']:.1f}", f"{measured['peak_memory_gib']:.2f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    peaks()
