#!/usr/bin/env bash
# All Rust tests.
#
# The calls of tests/livekit are real: servers, browsers and codecs with deadlines, on a machine that others may disturb. What fails there is made
# again once, one test at a time with nothing beside it. It has to pass then. All other tests have one try, and so has everything where more than
# a few calls fail: that is no disturbance.
#
# Nothing of that is hidden. The last lines, which .ci/run repeats, are
#   first failure of NAME: what the test said
#   made again: NAME: why a test made its call a second time by itself (tests/livekit/chain.rs)
#   retried: COUNT (NAMES), made again: COUNT
set -uo pipefail

# One in sixteen of the 80.
MOST=5
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Of each test that failed what it said: the line behind "panicked at", or that line where there is none.
failures() {
    awk '
        /^---- .* stdout ----$/ { name = $2; next }
        name != "" && /panicked at / { place = $0; sub(/.*panicked at /, "", place); getline said; print name "\t" substr(said, 1, 300) " (" place ")"; name = "" }
    ' "$log" | sort -u
}

summary() {
    [ -z "$first" ] || while IFS=$'\t' read -r name said; do
        echo "first failure of $name: $said"
    done <<<"$first"
    sed -n 's/^again: /made again: /p' "$log"
    echo "retried: ${#tests[@]}${tests[*]:+ (${tests[*]})}, made again: $(grep -ac '^again: ' "$log")"
}

tests=()
first=
cargo test --workspace --locked --no-fail-fast 2>&1 | tee "$log"
code=${PIPESTATUS[0]}
[ "$code" -eq 0 ] || first=$(failures)

# Cargo ends with the targets that failed, a line each.
failed=$(sed -n 's/^    `-p \(.*\)`$/\1/p' "$log")
if [ "$code" -ne 0 ] && [ "$failed" = 'auralink --test livekit' ]; then
    mapfile -t tests < <(sed -n 's/^---- \([a-z0-9_:]*\) stdout ----$/\1/p' "$log" | sort -u)
    if [ "${#tests[@]}" -gt "$MOST" ]; then
        echo "${#tests[@]} calls failed, more than $MOST: none of them is made again"
        tests=()
    elif [ "${#tests[@]}" -gt 0 ]; then
        echo "once more, one at a time: ${tests[*]}"
        # A test that makes its call again by itself does not, where it is made again.
        AURALINK_TEST_ONCE=1 cargo test --workspace --locked --test livekit -- --exact --test-threads 1 "${tests[@]}" 2>&1 | tee -a "$log"
        code=${PIPESTATUS[0]}
    fi
fi
summary
exit "$code"
