"""Reports of a failure in the store, which may not respond."""

import pickle
import time

import torch.distributed as dist

from distflash.transport.failures import FailureReport, FailureReports, RankFailure


def test_the_first_report_stays_and_who_says_nothing_is_missing():
    store = dist.HashStore()
    first, second, third = (FailureReports(lambda: store, rank, 3) for rank in range(3))
    assert third.read() is None
    raised, waited = FailureReport(1, True, "rank 1 raised"), FailureReport(0, False, "rank 0 waited")
    assert second.file(raised) == raised and first.file(waited) == raised and third.read() == raised
    start = time.monotonic()
    assert first.missing() == (2,) and 0.9 < time.monotonic() - start < 5
    third.file(waited)
    assert first.missing() == ()


def test_a_store_that_is_gone_or_silent_costs_words_only(monkeypatch):
    monkeypatch.setattr("distflash.transport.failures._STORE_ANSWERS", 0.1)
    own = FailureReport(0, False, "rank 0 waited")
    for store in (lambda: None, lambda: time.sleep(2)):  # no store at all, and one that does not come back
        start = time.monotonic()
        reports = FailureReports(store, 0, 2)
        assert reports.file(own) == own and reports.read() is None and reports.missing() == ()
        assert time.monotonic() - start < 1.5


def test_the_error_survives_a_pipe():
    failure = pickle.loads(pickle.dumps(RankFailure("rank 1 raised", (1,))))
    assert str(failure) == "rank 1 raised" and failure.failed == (1,) and isinstance(failure, RuntimeError)
