#!/usr/bin/env bash
# Tests of clients in other languages: they know the .proto files and talk to real processes.
# Makes a Python environment once, then runs pytest here; arguments go to pytest. Build first:
# cargo build --release --workspace --bins
#
#   TESTS_TOOLS           where the environment is made (target/tools)
#   TESTS_BIN_DIR         where the binaries are (target/release)
#   TESTS_MAY_SKIP  1: where Python or its packages cannot be had, say so and pass
set -euo pipefail
cd "$(dirname "$0")/../.."

environment="$(realpath -m "${TESTS_TOOLS:-target/tools}/py")"
binary="${TESTS_BIN_DIR:-target/release}/cacheclip"
requirements=(examples/retrieval-service/requirements.txt tests/clients/requirements.txt)

say() { printf 'tests/clients: %s\n' "$*"; }
# Who asked for these tests has to ask for going without them, too: a registry that is away must not look like success.
skip() {
    say "NOT RUN: $*"
    [[ ${TESTS_MAY_SKIP-} == 1 ]] && exit 0
    say "to pass without these tests, set TESTS_MAY_SKIP=1"
    exit 1
}

[[ -x $binary ]] || { say "$binary is missing; build it first: cargo build --release --workspace --bins"; exit 1; }
command -v python3 >/dev/null || skip "there is no python3"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || skip "python3 is older than 3.11"

# Installed again only when a requirement has changed.
stamp="$environment/requirements.sha256"
wanted="$(cat "${requirements[@]}" | sha256sum)"
if [[ ! -x $environment/bin/python || "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    say "making a Python environment in $environment"
    python3 -m venv "$environment" || skip "python3 cannot make environments (package python3-venv)"
    say "installing ${requirements[*]}"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        "${requirements[@]/#/--requirement=}" || skip "the packages cannot be installed"
    printf '%s\n' "$wanted" >"$stamp"
fi

say "pytest, with $binary"
export PYTHONDONTWRITEBYTECODE=1
cd tests/clients
exec "$environment/bin/python" -m pytest -p no:cacheprovider -rsx "$@"
