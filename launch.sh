#!/bin/sh
# Starts glmui: makes .venv the first time, then runs app.py with every argument passed on.
#   ./launch.sh [ARGUMENTS]        as `python app.py ARGUMENTS`: chat, bench, --port 8000 ...
#   ./launch.sh test [ARGUMENTS]   the tests
#   ./launch.sh --desktop-entry    an entry in the applications menu (Linux)
# Plain POSIX sh; what it shares with launch.bat is in launch.py. docs/launching.md tells the whole way.
set -u

self=$0
while [ -L "$self" ]; do # launch.command is a link to this file, and others may link to it too
  link=$(readlink "$self")
  case $link in
    /*) self=$link ;;
    *) self=$(dirname -- "$self")/$link ;;
  esac
done
home=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd -P) || exit 1
python=$home/.venv/bin/python

chinese() {
  locale=${GLMUI_LANGUAGE:-${LC_ALL:-${LC_MESSAGES:-${LANG:-$(defaults read -g AppleLocale 2>/dev/null)}}}}
  case $locale in [zZ][hH]*) return 0 ;; *) return 1 ;; esac
}

# Says what went wrong where it will be read: in the terminal, else in a window, else in a file.
tell() {
  printf '%s\n' "$1" >&2
  if [ -t 0 ] || [ -t 1 ] || [ -t 2 ]; then return; fi
  if [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
    zenity --error --no-markup --title=glmui --text="$1" 2>/dev/null && return
    xmessage -center "$1" 2>/dev/null && return
  fi
  osascript -e 'on run words' -e 'display alert "glmui" message (item 1 of words)' -e 'end run' \
    "$1" >/dev/null 2>&1 && return
  { printf '%s\n' "$1" >"$home/launch.log"; } 2>/dev/null ||
    printf '%s\n' "$1" >"${TMPDIR:-/tmp}/glmui-launch.log"
}

# Every candidate on PATH is run: a version manager's shim may exist and fail, a good one stand behind it.
fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.maxsize < 2**32)'
find_python() {
  for name in python3.11 python3.12 python3.13 python3 python; do
    rest=$PATH:
    while [ -n "$rest" ]; do
      candidate=${rest%%:*}/$name
      rest=${rest#*:}
      # Apple's own is too old, and without the developer tools it only asks to install them.
      if [ "$candidate" = /usr/bin/python3 ] && [ "$(uname)" = Darwin ]; then continue; fi
      if [ -x "$candidate" ] && "$candidate" -I -c "$fits" >/dev/null 2>&1; then
        printf '%s\n' "$candidate"
        return 0
      fi
    done
  done
  return 1
}

how_to_get_python() {
  if [ "$(uname)" = Darwin ]; then
    echo 'https://www.python.org/downloads/  (brew install python@3.11)'
    return
  fi
  for version in 3.11 3.12 3.13; do
    if apt-cache show "python$version-venv" >/dev/null 2>&1; then
      echo "sudo apt install python$version python$version-venv"
      return
    fi
  done
  if command -v dnf >/dev/null; then echo 'sudo dnf install python3.12'; else
    echo 'https://www.python.org/downloads/'
  fi
}

no_python() {
  if chinese; then
    tell "没有找到 64 位的 Python 3.11、3.12 或 3.13。请先安装其中一个，再启动 glmui：$(how_to_get_python)"
  else
    tell "No 64-bit Python 3.11, 3.12 or 3.13 was found. Install one, then start glmui again: $(how_to_get_python)"
  fi
  exit 1
}

# A proxy set by variables must not come between the browser and this machine. Where none is set, macOS goes by
# the system's settings, which have exceptions of their own, and a NO_PROXY alone would make Python ignore them.
proxies=${HTTP_PROXY:-}${HTTPS_PROXY:-}${ALL_PROXY:-}${http_proxy:-}${https_proxy:-}${all_proxy:-}
upper=${NO_PROXY:-${no_proxy:-}}
lower=${no_proxy:-${NO_PROXY:-}}
if [ "$upper" != '*' ] && { [ -n "$proxies$upper" ] || [ "$(uname)" != Darwin ]; }; then
  local_hosts=localhost,127.0.0.1,::1
  export NO_PROXY="${upper:+$upper,}$local_hosts" no_proxy="${lower:+$lower,}$local_hosts"
fi

extra=
if [ "${1:-}" = test ]; then extra=dev; fi

if [ "${1:-}" = --desktop-entry ]; then
  found=$(find_python) || no_python
  words=$("$found" -I -X utf8 "$home/launch.py" desktop-entry) || { tell "$words"; exit 1; }
  printf '%s\n' "$words"
  exit 0
fi

if ! { [ -x "$python" ] && "$python" -I -X utf8 "$home/launch.py" check $extra 2>/dev/null; }; then
  found=$(find_python) || no_python
  words=$("$found" -I -X utf8 "$home/launch.py" install $extra) || {
    status=$?
    if [ -n "$words" ]; then tell "$words"; fi
    exit "$status"
  }
fi

if [ -z "$extra" ]; then exec "$python" "$home/app.py" "$@"; fi
shift
cd -- "$home" || exit 1
exec "$python" -m pytest "$@"
