"""Print how many of the runs in `test_conformance.py` hold, by method: `python tests/count_conformance.py`."""

import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest


class Counts:
    """Counts the runs of each method by their outcome."""

    def __init__(self):
        self.by_method = defaultdict(Counter)

    def pytest_runtest_logreport(self, report):
        method, colon, _ = report.nodeid.partition("[")[2].partition(":")
        if colon and (report.when == "call" or report.skipped):
            self.by_method[method]["expected" if hasattr(report, "wasxfail") else report.outcome] += 1


if __name__ == "__main__":
    counts = Counts()
    status = pytest.main([str(Path(__file__).with_name("test_conformance.py")), "-q", *sys.argv[1:]], plugins=[counts])
    for method, outcomes in counts.by_method.items():
        total = sum(outcomes.values()) - outcomes["skipped"]
        sys.stdout.write(f"{method}: {outcomes['passed']} of {total} runs hold\n")
    sys.exit(status)
