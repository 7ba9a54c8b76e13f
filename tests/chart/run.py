"""Runs the checks of chart and image files and ends with a line of counts."""

import sys
import time
import traceback

import common
import images  # noqa: F401  the checks register themselves
import models  # noqa: F401
import notes  # noqa: F401
import redis_start  # noqa: F401
import relations  # noqa: F401
import rules  # noqa: F401
import secrets_kept  # noqa: F401
import values  # noqa: F401


def main(words):
    """Runs what the words choose."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name, function in common.CHECKS:
        if words and not any(word in name for word in words):
            continue
        started = time.monotonic()
        try:
            function()
        except common.Skip as reason:
            counts["skipped"] += 1
            print(f"skip  {name}: {reason}")
        except Exception:  # whatever it was, the next check is still worth running
            counts["failed"] += 1
            print(f"FAIL  {name}")
            traceback.print_exc(file=sys.stdout)
        else:
            counts["passed"] += 1
            print(f"ok    {name} ({time.monotonic() - started:.1f} s)")
        sys.stdout.flush()
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
