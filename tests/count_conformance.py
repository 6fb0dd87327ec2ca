"""Print how the runs of the conformance tests end, by method: `python tests/count_conformance.py`.

Arguments go to pytest, such as `-n 2`.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ENDS = {"holds": "hold", "refused": "are refused as promised", "xfail": "do not hold", "failed": "fail"}


class Counts:
    """Counts the runs of each method by how they end."""

    def __init__(self):
        self.by_method = defaultdict(Counter)

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if "method" not in properties or (report.when != "call" and report.passed):
            return
        if hasattr(report, "wasxfail") and not report.passed:
            end = "xfail"
        elif report.passed:
            end = "refused" if "refused" in properties else "holds"
        else:
            end = report.outcome
        self.by_method[properties["method"]][end] += 1


if __name__ == "__main__":
    counts = Counts()
    status = pytest.main(
        [str(Path(__file__).with_name("conformance")), "-q", "-m", "", *sys.argv[1:]], plugins=[counts]
    )
    for method, ends in counts.by_method.items():
        told = [f"{ends[end]} {words}" for end, words in ENDS.items() if ends[end]]
        applicable = sum(ends[end] for end in ENDS)
        sys.stdout.write(f"{method}: of {applicable} runs, {', '.join(told)}\n")
    sys.exit(status)
