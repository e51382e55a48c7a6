"""The session's own option: every slow test is in one share, and in one alone."""

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("i", range(7))
def test_slow(i):
    pass

def test_quick():
    pass
"""


def collect(pytester, share):
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = slow")
    options = ("-p", "tests.conftest", "--collect-only", "-q", "--slow-share", share)
    return pytester.runpytest(*options)


def test_each_slow_test_is_in_one_share_and_others_are_in_all(pytester):
    found = []
    for i in (1, 2, 3):
        names = [
            line.split("::")[1] for line in collect(pytester, f"{i}/3").outlines if "::" in line
        ]
        *slow, quick = names
        assert quick == "test_quick"
        assert 2 <= len(slow) <= 3
        found += slow
    assert sorted(found) == [f"test_slow[{i}]" for i in range(7)]


@pytest.mark.parametrize("bad", ["0/3", "4/3", "1", "a/b"])
def test_a_share_that_is_none(pytester, bad):
    assert collect(pytester, bad).ret == pytest.ExitCode.USAGE_ERROR
