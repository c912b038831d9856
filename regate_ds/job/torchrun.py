"""Run torchrun, but exit with the code of the rank that failed first, as deepspeed does.

torchrun itself ends with a traceback and code 1, whatever the codes of its ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str]) -> int:
    """Run torchrun with these arguments; return the exit code, 128 plus the number for a signal."""
    try:
        run.run(run.parse_args(list(argv)))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
