"""What every script does first, before anything that takes long: it ends with one line where a package of its own is missing."""

import sys
import warnings
from importlib.util import find_spec

PACKAGES = ("accelerate", "datasets", "matplotlib", "peft_talora", "scipy", "trimesh")

missing = [name for name in PACKAGES if find_spec(name) is None]
if missing:
    print(
        f"error: not installed: {', '.join(missing)}; the scripts need pip install -e '.[examples]'", file=sys.stderr
    )
    sys.exit(2)

# PEFT asks a model for this attribute whenever it wraps one (PeftModel.__init__), and nobody who runs a script can change that
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
