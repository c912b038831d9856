from tests.distributed.ranks import run_ranks
from tests.distributed.zero_checks import check_zero


def test_gradients_of_two_uneven_ranks_are_those_of_one_process():
    run_ranks(check_zero, 2)
