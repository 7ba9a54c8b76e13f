#!/bin/sh
# Starts Redis with the password from the environment. It goes by standard input, because arguments can be seen by
# everybody who can list processes; in double quotes, with what would end or change these escaped.
set -eu
: "${REDIS_PASSWORD:?the Secret holds no password}"
escaped=$(printf '%s' "$REDIS_PASSWORD" | sed 's/[\\"]/\\&/g')
unset REDIS_PASSWORD
exec redis-server - <<EOF_CONFIG
$(cat "${1:-/etc/redis/redis.conf}")
requirepass "$escaped"
EOF_CONFIG
