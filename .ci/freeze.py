"""Print the versions that are installed here as constraints, for tests/constraints.txt.

A version that does not run on the oldest Python that we allow is pinned for the Pythons that it runs on.
"""

import argparse
import re
from importlib.metadata import distributions
from pathlib import Path

# what only this machine has
LEFT_OUT = {"peft-talora", "pip", "setuptools", "wheel"}


def oldest_python(requires: str | None) -> tuple[int, int]:
    """The smallest (major, minor) that a `Requires-Python` admits."""
    lower = re.findall(r">=?\s*(\d+)\.(\d+)", requires or "")
    return max((tuple(map(int, version)) for version in lower), default=(3, 0))


def pins(allowed: tuple[int, int]) -> list[str]:
    """One line for each installed distribution."""
    lines = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name in LEFT_OUT:
            continue
        # a local label such as +cpu names the build, which is the user's choice
        pin = f"{name}=={distribution.version.partition('+')[0]}"
        needed = oldest_python(distribution.metadata["Requires-Python"])
        lines[name] = pin if needed <= allowed else f'{pin}; python_version >= "{needed[0]}.{needed[1]}"'
    return [lines[name] for name in sorted(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.10", help="the oldest Python of pyproject.toml (default: %(default)s)")
    arguments = parser.parse_args()
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    if f'requires-python = ">={arguments.python}"' not in pyproject:
        parser.error(f"pyproject.toml does not say >={arguments.python}")
    major, minor = map(int, arguments.python.split("."))
    print("# Versions that are known to pass together. CONTRIBUTING.md says how to renew them.")
    print("\n".join(pins((major, minor))))


if __name__ == "__main__":
    main()
