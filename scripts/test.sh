#!/usr/bin/env bash
# All Rust tests.
#
# The calls of tests/livekit are real: servers, browsers and codecs with deadlines, on a machine that others may disturb. What fails there is made
# again once, one test at a time with nothing beside it, and named at the end. It has to pass then. All other tests have one try, and so has
# everything where more than a few calls fail: that is no disturbance.
set -uo pipefail

# One in eight of the 80.
MOST=10
log=$(mktemp)
trap 'rm -f "$log"' EXIT

cargo test --workspace --locked --no-fail-fast 2>&1 | tee "$log"
code=${PIPESTATUS[0]}
[ "$code" -eq 0 ] && exit 0

# Cargo ends with the targets that failed, a line each.
failed=$(sed -n 's/^    `-p \(.*\)`$/\1/p' "$log")
if [ "$failed" != 'auralink --test livekit' ]; then
    exit "$code"
fi
mapfile -t tests < <(sed -n 's/^test \([a-z0-9_:]*\) \.\.\. FAILED$/\1/p' "$log" | sort -u)
if [ "${#tests[@]}" -eq 0 ] || [ "${#tests[@]}" -gt "$MOST" ]; then
    exit "$code"
fi
echo "once more, one at a time: ${tests[*]}"
cargo test --locked --test livekit -- --exact --test-threads 1 "${tests[@]}" || exit
echo "passed the second time only: ${tests[*]}"
