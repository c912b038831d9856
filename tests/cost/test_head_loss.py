"""The head's loss holds a quarter of what torch's holds, from four targets a hidden unit on."""

from tests.cost.head_loss import Head, ours, peak_bytes, plain

HEAD = Head(hidden=512, vocabulary=4096, targets=2048)


def test_it_holds_a_quarter_of_the_plain_losss_peak():
    assert peak_bytes(ours, HEAD) <= 0.25 * peak_bytes(plain, HEAD)
