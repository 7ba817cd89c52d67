"""Ends a script that lacks a package of its own with one line: imported first, before anything that takes long."""

import sys
from importlib.util import find_spec

PACKAGES = ("accelerate", "datasets", "matplotlib", "peft_talora", "scipy", "trimesh")

missing = [name for name in PACKAGES if find_spec(name) is None]
if missing:
    print(
        f"error: not installed: {', '.join(missing)}; the scripts need pip install -e '.[examples]'", file=sys.stderr
    )
    sys.exit(2)
