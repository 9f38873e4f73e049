"""How long `nas --help` takes beside a bare interpreter, as whole processes."""

import subprocess
import sys
from pathlib import Path

from benchmarks.common import paired, save


def main() -> None:
    """Measure and save."""
    nas = Path(sys.executable).with_name("nas")
    ratio = paired(
        lambda: subprocess.run([nas, "--help"], capture_output=True, check=True),
        lambda: subprocess.run([sys.executable, "-c", "pass"], capture_output=True, check=True),
        repetitions=15,
    )
    save("command_line", {"help_ms": ratio["first_ms"], "bare_python_ms": ratio["second_ms"], "pairs": 15})


if __name__ == "__main__":
    main()
