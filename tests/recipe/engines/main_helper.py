"""The `regate` command on CPUs with `parallel`.

    python -m tests.recipe.engines.main_helper train ...

Megatron-core asks for CUDA by name; the shim answers. Ranks are announced by the environment.
"""

from __future__ import annotations

import sys

from regate_ds.adapters.megatron_on_cpu.shim import install
from regate_ds.cli import main

if __name__ == "__main__":
    install()
    sys.exit(main())
