"""torchrun, whose exit code is that of the rank that failed first, as it is under deepspeed.

torchrun itself ends in a traceback and 1, whatever its ranks ended in.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str]) -> int:
    """Arguments as torchrun takes them; a signal is 128 and its number, as a shell has it."""
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
