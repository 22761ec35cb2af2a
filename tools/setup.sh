#!/usr/bin/env bash
# What `make setup` does: a virtual environment with requirements.txt, and a renderer that draws.
#
#   PYTHON=python3.11 bash tools/setup.sh
#
# A second run finds the stamp of the first and ends at once. Root installs the system packages that
# are missing; other users are shown the commands. A Vulkan driver that works is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
frame_seconds=60 # a software renderer compiles its shaders first: about 10 s on two busy cores

say() { printf 'setup: %s\n' "$1"; }

stop() { # $1: what is wrong; the others: commands that help
  printf '\nsetup: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '%s\n' "$@" | sed 's/^/    /' >&2
  exit 1
}

# --- Python ---

minor_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() { # mani_skill asks for mplib 0.1.1, which has no wheels for Python 3.13 and later
  local name names=(python3.11 python3.12 python3)
  [ -z "${PYTHON:-}" ] || names=("$PYTHON")
  for name in "${names[@]}"; do
    case "$(minor_version "$name")" in
      3.11 | 3.12) echo "$name" && return ;;
    esac
  done
  stop "${names[*]}: no Python 3.11 or 3.12. Install one, or say which it is:" \
    "make setup PYTHON=/path/to/python3.11"
}

venv_commands() { printf '%s\n' "apt-get update" "apt-get install -y python$version-venv"; }

make_venv() {
  local have
  have=$(minor_version "$venv/bin/python" || true)
  if [ "$have" = "$version" ] && "$venv/bin/python" -m pip -V >/dev/null 2>&1; then
    return # made by an earlier run that was stopped, or that had other requirements
  fi
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then # Debian ships it apart from Python
    install_as_root "$python cannot make virtual environments" venv_commands
  fi
  say "making $venv with Python $version"
  "$python" -m venv --clear "$venv"
}

install_requirements() {
  local file='(Downloading|Using cached) (\S*\/)?(\w+)-\S+' size='(\(.*([0-9]{2}\.[0-9] MB|GB)\))'
  say "installing requirements.txt into $venv, some minutes (downloads from 10 MB on are named)"
  "$venv/bin/python" -u -m pip install --progress-bar off --no-warn-script-location \
    --disable-pip-version-check -r requirements.txt -c constraints.txt |
    sed -nuE "s/^ *$file $size\$/    \3 \4/p; s/^Installing collected .*/    unpacking/p"
  # The scripts and tools are found from every folder.
  pwd >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/auxvla.pth"
}

# --- Renderer ---

has_libraries() { # do OpenCV, SAPIEN and the libraries in the arguments load?
  "$venv/bin/python" -c 'import ctypes, sys, cv2, sapien; [*map(ctypes.CDLL, sys.argv[1:])]' "$@"
} >/dev/null 2>&1

library_commands() {
  echo "apt-get update"
  echo "apt-get install -y libvulkan1 libegl1 libgl1 libglib2.0-0 libx11-6 libxext6"
}

draws_a_frame() {
  say "rendering one frame"
  timeout -k 5 "$frame_seconds" "$venv/bin/python" tools/render_frame.py
} 2>"$venv/render.log"

renderer_commands() {
  # SAPIEN needs lavapipe, Mesa's renderer for the CPU, of Mesa 24.3 or later. Debian 12 has 22.3
  # ("createDeviceUnique: ErrorFeatureNotPresent"), its backports have 25.0.
  local suite="" mirror targets source keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  local fields='$(ORIGIN)|$(CODENAME)|$(REPO_URI)' # apt fills these in
  if [ "$(. /etc/os-release && echo "$ID $VERSION_ID")" = "debian 12" ]; then
    suite=bookworm-backports
    targets=$(apt-get indextargets --format "$fields" 'Created-By: Packages')
    if ! grep -qF "|$suite|" <<<"$targets"; then # add it, from the mirror of this machine's Debian 12
      mirror=$(awk -F'|' '$1 == "Debian" && $2 == "bookworm" { print $3; exit }' <<<"$targets")
      if [ -z "$mirror" ]; then
        echo "apt-get update" # it never ran here; after it, the next start finds the mirror
        return
      fi
      source="deb [signed-by=$keyring] $mirror $suite main"
      echo "echo '$source' > /etc/apt/sources.list.d/$suite.list"
    fi
  fi
  echo "apt-get update"
  echo "apt-get install -y ${suite:+-t $suite }mesa-vulkan-drivers"
}

find_renderer() {
  has_libraries || install_as_root "OpenCV and SAPIEN lack system libraries" library_commands
  draws_a_frame && return
  if nvidia-smi >/dev/null 2>&1; then
    if ! has_libraries libvulkan.so.1 libEGL.so.1 libX11.so.6 libXext.so.6; then
      install_as_root "NVIDIA's Vulkan driver lacks system libraries" library_commands
      draws_a_frame && return
    fi
    if grep -q "NVIDIA's Vulkan driver alone" "$venv/render.log"; then
      # Mesa would not help: SAPIEN does not look for it.
      stop "nvidia-smi finds a GPU, but its driver draws no frame:" "$(tail -n 1 "$venv/render.log")"
    fi
  fi
  install_as_root "no Vulkan renderer works here" renderer_commands
  draws_a_frame || stop "still no frame with Mesa's renderer, which must be 24.3 or later:" \
    "$(tail -n 3 "$venv/render.log")"
}

# --- System packages ---

install_as_root() { # $1: the problem; $2: a function that prints the commands that solve it
  if ! command -v apt-get >/dev/null; then
    stop "$1, and there is no apt-get to install what is missing. On Debian it would be:" "$("$2")"
  elif [ "$(id -u)" -ne 0 ]; then
    stop "$1. As root, run this, then start again:" "$("$2")"
  fi
  say "$1; installing what is missing with apt-get"
  quietly apt-get update # on a fresh system, renderer_commands needs its lists
  local commands
  commands=$("$2")
  printf '%s\n' "$commands" | sed 's/^/    /'
  quietly env DEBIAN_FRONTEND=noninteractive bash -euc "$commands"
}

quietly() { # run a command; print its output only if it fails
  local output
  output=$("$@" 2>&1 </dev/null) || stop "this failed: $*" "$output"
}

# --- Main ---

python=$(find_python)
version=$(minor_version "$python")
stamp=$venv/setup-done
key=$({ cat requirements.txt constraints.txt; echo "$version"; } | sha256sum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
  exit 0
fi

make_venv
install_requirements
find_renderer
echo "$key" >"$stamp"
say "done"
