#!/usr/bin/env bash
# The one launcher: makes the virtual environment on first use, then runs lmn_jax in it.
#
# bash, not sh: arrays carry the caller's arguments unharmed. Written for bash 3.2 (macOS) too.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

usage() {
  cat <<'TEXT'
usage: ./launch.sh --config=configs/lmn_douyin.py [flags of lmn_jax.main]
       ./launch.sh --test [arguments of pytest]
       ./launch.sh --dry-run ...   print the commands instead of running them
       ./launch.sh --help          this text; flags of the program: ./launch.sh --helpshort

The first use makes a virtual environment; a change of pyproject.toml brings it up to date.

environment:
  LMN_EXTRA   cpu | cuda | cuda12 | tpu: build of JAX to install, instead of what the host suggests
  LMN_VENV    folder of the virtual environment, instead of .venv beside this script
  LMN_PYTHON  interpreter to make it with, instead of the newest of python3.13, 3.12, 3.11, python3
TEXT
}

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

# Prints the interpreter to use. A command that is found may still not run (the shims of version
# managers), and Debian splits off ensurepip, without which there is no virtual environment.
find_python() {
  local candidate found=''
  local candidates=(python3.13 python3.12 python3.11 python3 python)
  if [[ -n "${LMN_PYTHON:-}" ]]; then
    candidates=("$LMN_PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      continue
    fi
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      command -v -- "$candidate"
      return
    fi
    found=$candidate
  done
  if [[ -n "$found" ]]; then
    fail "$found cannot make virtual environments; install its venv package" \
      "(Debian, Ubuntu: apt install $found-venv)"
  fi
  fail "no Python >= 3.11 among: ${candidates[*]}; install one, or set LMN_PYTHON to its path"
}

# Prints the major version of the NVIDIA driver, nothing if it is unknown.
nvidia_driver() {
  nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null |
    sed -n '1s/^\([0-9][0-9]*\)\..*/\1/p' || true
}

# Prints the extra for this host. $1 stands before /dev and /sys (for tests).
find_extra() {
  local fs=${1:-} device
  if [[ -e $fs/dev/nvidia0 || $(nvidia-smi -L 2>/dev/null) == *'GPU '* ]]; then
    local driver
    driver=$(nvidia_driver)
    # CUDA 13 needs driver 580; CUDA 12 runs on 525 and newer.
    if [[ -n "$driver" && "$driver" -lt 580 ]]; then
      echo cuda12
    else
      echo cuda
    fi
    return
  fi
  # /dev/accel* and /dev/vfio also belong to other makers: ask for Google's (1ae0) TPUs by their PCI
  # ids, since a cloud host's network card and disks are Google's too.
  for device in "$fs"/sys/bus/pci/devices/*; do
    if [[ -r $device/vendor && -r $device/device && $(<"$device/vendor") == 0x1ae0 ]]; then
      case $(<"$device/device") in
        0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076)
          echo tpu
          return
          ;;
      esac
    fi
  done
  echo cpu
}

# Prints a command as one may paste it.
show() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# True if the environment holds what is wanted: $1 the stamp, $2 'dev' or ''.
is_made() {
  local stamp=''
  if [[ -x $venv/bin/python && -f $venv/.lmn-stamp ]]; then
    stamp=$(<"$venv/.lmn-stamp")
  fi
  [[ $stamp == "$1 dev" || ($stamp == "$1" && -z $2) ]]
}

# Makes or updates the environment: $1 python, $2 extra, $3 stamp, $4 'dev' or ''.
make_venv() {
  local python=$1 extra=$2 stamp=$3 dev=$4 start=$SECONDS
  mkdir -p -- "$venv"
  # First what is there, then the lock: another call makes the lock before anything else.
  local found
  found=$(ls -A -- "$venv")
  if [[ -n $found && ! -e $venv/.lmn-lock ]]; then
    fail "$venv exists and was not made by launch.sh; remove it, or set LMN_VENV to another folder"
  fi
  # One process makes it, others wait. The lock belongs to descriptor 9, which this shell keeps
  # after Python has gone, and the kernel frees it however the shell ends; macOS has no flock(1).
  exec 9>>"$venv/.lmn-lock"
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if ! is_made "$stamp" "$dev"; then
    local old=''
    if [[ -f $venv/.lmn-stamp ]]; then
      old=$(<"$venv/.lmn-stamp")
    fi
    if [[ $old == *" dev" ]]; then
      dev=dev
    fi
    # Without a stamp the environment counts as not made: a failure below is mended by the next use.
    rm -f -- "$venv/.lmn-stamp"
    if [[ ! -x $venv/bin/python || ${old%% pyproject*} != "${stamp%% pyproject*}" ]]; then
      # Not made to the end, or for another extra or checkout: begin anew.
      find "$venv" -mindepth 1 -maxdepth 1 ! -name .lmn-lock -exec rm -rf -- {} +
      echo "launch.sh: making $venv with $python for $extra" >&2
      "$python" -m venv "$venv" || stopped
    else
      echo "launch.sh: updating $venv" >&2
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --editable "${root}[$extra${dev:+,dev}]" || stopped
    echo "$stamp${dev:+ dev}" >"$venv/.lmn-stamp.new"
    mv -- "$venv/.lmn-stamp.new" "$venv/.lmn-stamp"
    echo "launch.sh: set-up took $((SECONDS - start)) s" >&2
  fi
  exec 9>&-
}

stopped() {
  echo "launch.sh: set-up stopped, see above; the next call begins it again" >&2
  exit 1
}

main() {
  local dry='' dev='' extra python stamp
  if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
  fi
  case ${1:-} in
    '' | --help | -h)
      usage
      return
      ;;
    --test)
      dev=dev
      shift
      ;;
  esac
  extra=${LMN_EXTRA:-$(find_extra)}
  case $extra in
    cpu | cuda | cuda12 | tpu) ;;
    *) fail "LMN_EXTRA=$extra is unknown; use cpu, cuda, cuda12 or tpu" ;;
  esac
  venv=${LMN_VENV:-$root/.venv}
  case $venv in
    /*) ;;
    *) venv=$PWD/$venv ;;
  esac
  # What the environment depends on; the part before ' pyproject' asks for a new one if it changes.
  stamp="$extra $root pyproject $(cksum <"$root/pyproject.toml")"

  local command=("$venv/bin/python" -m)
  if [[ -n $dev ]]; then
    # Compiling is most of it and takes one core; a caller's own -n comes later and wins.
    command+=(pytest -n auto --maxprocesses=4)
    # So that `--test tests/test_metrics.py` means the same from everywhere.
    cd -- "$root"
  else
    command+=(lmn_jax.main)
  fi

  if ! is_made "$stamp" "$dev"; then
    python=$(find_python)
    if [[ -n $dry ]]; then
      show "$python" -m venv "$venv"
      show "$venv/bin/python" -m pip install --editable "${root}[$extra${dev:+,dev}]"
    else
      make_venv "$python" "$extra" "$stamp" "$dev"
    fi
  fi
  if [[ -n $dry ]]; then
    show "${command[@]}" "$@"
    return
  fi
  exec "${command[@]}" "$@"
}

# Sourced by a test, this file only defines its functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
