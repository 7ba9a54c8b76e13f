#!/bin/sh
# Copies a model's files and checks every one against its digest before anything reads it.
#
#   fetch-model.sh FROM LIST INTO
#
# FROM is a directory or an http(s) address; LIST has a line "algorithm:digest name" per file; INTO is a directory.
# A file that is there with the right digest is left alone, so that a restart copies only what is missing. A file with a
# wrong digest never gets its name: it is removed, and the exit code is 1.
set -eu

fail() {
    echo "fetch-model: $*" >&2
    exit 1
}

[ $# -eq 3 ] || fail "usage: fetch-model.sh FROM LIST INTO"
from=$1 list=$2 into=$3
[ -r "$list" ] || fail "$list: cannot be read"
[ -w "$into" ] || fail "$into: cannot be written"

# Prints the digest of file $2 by algorithm $1.
digest() {
    case $1 in
    sha256) tool=sha256sum ;;
    blake3) tool=b3sum ;;
    *) fail "unknown digest algorithm '$1': use sha256 or blake3" ;;
    esac
    command -v "$tool" >/dev/null ||
        fail "$tool is not in this image: use another image for the copy, or digests of another algorithm"
    # From standard input: the tools print names in different ways, but the digest always first.
    sum=$("$tool" <"$2") || fail "$2: cannot be read to its end"
    printf '%s\n' "${sum%% *}"
}

# Copies file $1 to $2.
copy() {
    case $from in
    http://* | https://*)
        if command -v curl >/dev/null; then
            # A download that stands still for a minute is given up; what fails in passing is tried again.
            curl --fail --silent --show-error --location --proto '=http,https' --connect-timeout 10 \
                --speed-limit 1024 --speed-time 60 --retry 5 --retry-connrefused --output "$2" "${from%/}/$1" ||
                fail "${from%/}/$1: cannot be fetched"
        elif command -v wget >/dev/null; then
            wget -q -T 60 -O "$2" "${from%/}/$1" || fail "${from%/}/$1: cannot be fetched"
        else
            fail "neither curl nor wget is in this image: use another image for the copy"
        fi
        ;;
    *)
        [ -f "$from/$1" ] || fail "$from/$1: there is no such file in the image"
        cp "$from/$1" "$2" || fail "$from/$1: cannot be copied"
        ;;
    esac
}

files=0
while read -r expected name rest || [ -n "${expected:-}" ]; do
    case $expected in
    '' | '#'*) continue ;;
    *:*) ;;
    *) fail "$list: '$expected' is no digest: write algorithm:digest" ;;
    esac
    case $name in
    '' | .* | */*) fail "$list: '$name' is no file name" ;;
    esac
    [ -z "$rest" ] || fail "$list: '$name $rest' is no file name"
    files=$((files + 1))
    algorithm=${expected%%:*}
    if [ -f "$into/$name" ]; then
        found=$(digest "$algorithm" "$into/$name")
        if [ "$algorithm:$found" = "$expected" ]; then
            echo "fetch-model: $name is there already"
            continue
        fi
    fi
    rm -f "$into/$name" "$into/.$name.partial"
    copy "$name" "$into/.$name.partial"
    found=$(digest "$algorithm" "$into/.$name.partial")
    if [ "$algorithm:$found" != "$expected" ]; then
        rm -f "$into/.$name.partial"
        fail "$name: wrong digest: expected $expected, found $algorithm:$found in $from: \
the file is damaged or another one; if it was meant to change, change models.*.files"
    fi
    mv "$into/.$name.partial" "$into/$name"
    echo "fetch-model: $name copied and checked"
done <"$list"
[ "$files" -gt 0 ] || fail "$list: names no file"
