#!/usr/bin/env bash
# The launcher: creates the virtual environment on first use, then runs lmn_jax in it, on this host,
# on every host of a TPU slice or of a Slurm job, or as several simulated hosts on this one.
#
# bash, not sh: arrays keep arguments with blanks. Written for bash 3.2 (macOS) too.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
batch=''
if [[ -n ${SLURM_JOB_ID:-} && ${BASH_SOURCE[0]##*/} == slurm_script ]]; then
  # sbatch runs a copy in another folder.
  batch=1
  root=${SLURM_SUBMIT_DIR:-$PWD}
fi

usage() {
  cat <<'TEXT'
usage: ./launch.sh --config=configs/lmn_douyin.py [flags of the program]
       ./launch.sh --test [arguments of pytest]        the fast tests
       ./launch.sh --test-slow [arguments of pytest]   all other tests
       ./launch.sh --docs [arguments of sphinx]        builds the documentation into build/docs,
                                   warnings as errors
       ./launch.sh --hosts=N ...   rehearses N hosts on the CPU of this machine: N processes that
                                   train together; if one fails, all end
       ./launch.sh --tpu=NAME --zone=ZONE [--project=PROJECT] ...
                                   copies this folder (without hidden files and runs) to every
                                   worker of a TPU slice and runs there; paths are those of the
                                   workers, --workdir is on a disk that they share. The run
                                   continues when the connection is lost. In place of flags of
                                   the program:
                                   --follow  shows the running run until it ends
                                   --stop    sends SIGTERM: the run saves and ends
       ./launch.sh --nodes=N ...   submits a Slurm job of N nodes, with one process for all devices
                                   of a node: sbatch --nodes=N launch.sh ...
       ./launch.sh --dry-run ...   prints the commands instead of running them
       ./launch.sh --help          this text; flags of the program: ./launch.sh --helpshort

These flags can be anywhere among the arguments, as --FLAG=VALUE or --FLAG VALUE. The first use
creates a virtual environment with the tested versions in constraints.txt; after a change of that
file or of pyproject.toml the next use updates it.

environment:
  LMN_EXTRA   cpu | cuda | cuda12 | tpu: build of JAX to install, instead of the one for this host
  LMN_VENV    folder of the virtual environment, instead of .venv beside this script
  LMN_DEVICES devices of each host that --hosts rehearses, instead of 1
  LMN_PORT    port of their coordinator, instead of one between 20000 and 30000
  LMN_PYTHON  interpreter of the environment, instead of the newest of python3.13 to 3.11, python3
  MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_, MALLOC_ARENA_MAX
              of glibc; unless one is set, training keeps freed memory
TEXT
}

# By default glibc returns freed large arrays to the kernel, and the next step faults their pages in
# again: on two CPU cores a step of LMN takes 39 ms, 28 with these settings (experiments/LOG.md).
# One arena for all threads: those of other threads do not hold arrays above 64 MiB, which long
# histories need, and would map them each time. Other C libraries ignore these variables.
KEEP_FREED=(MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=268435456
  MALLOC_ARENA_MAX=1)

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

# Prints the interpreter to use. A command on the path may not run (the shims of version managers),
# and Debian has ensurepip, which a virtual environment needs, in another package.
find_python() {
  local candidate incomplete=''
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
    incomplete=$candidate
  done
  if [[ -n "$incomplete" ]]; then
    fail "$incomplete cannot create virtual environments; install its venv package" \
      "(Debian, Ubuntu: apt install $incomplete-venv)"
  fi
  fail "no Python >= 3.11 among: ${candidates[*]}; install one, or set LMN_PYTHON to its path"
}

# Prints the major version of the NVIDIA driver, or nothing if it is unknown.
nvidia_driver() {
  nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null |
    sed -n '1s/^\([0-9][0-9]*\)\..*/\1/p' || true
}

# Prints the extra for this host. $1 is a prefix of /dev and /sys (for tests).
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
  # /dev/accel* and /dev/vfio also exist for other vendors. TPUs are identified by PCI vendor (1ae0,
  # Google) and device, because the network card and disks of a cloud host have the same vendor.
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

# Prints a command, quoted for a shell.
show() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Whether the environment is up to date: $1 the stamp, $2 'dev' or ''.
is_current() {
  local stamp=''
  if [[ -x $venv/bin/python && -f $venv/.lmn-stamp ]]; then
    stamp=$(<"$venv/.lmn-stamp")
  fi
  [[ $stamp == "$1 dev" || ($stamp == "$1" && -z $2) ]]
}

# Creates or updates the environment: $1 python, $2 extra, $3 stamp, $4 'dev' or ''.
create_venv() {
  local python=$1 extra=$2 stamp=$3 dev=$4 start=$SECONDS
  mkdir -p -- "$venv"
  # The contents before the lock: another call creates the lock before any other file.
  local contents
  contents=$(ls -A -- "$venv")
  if [[ -n $contents && ! -e $venv/.lmn-lock ]]; then
    fail "$venv exists and was not created by launch.sh; remove it," \
      "or set LMN_VENV to another folder"
  fi
  # One process creates it, others wait. The lock belongs to descriptor 9, which stays open in this
  # shell after Python ends; the kernel releases it when the shell ends. macOS has no flock(1).
  exec 9>>"$venv/.lmn-lock"
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if ! is_current "$stamp" "$dev"; then
    local old=''
    if [[ -f $venv/.lmn-stamp ]]; then
      old=$(<"$venv/.lmn-stamp")
    fi
    if [[ $old == *" dev" ]]; then
      dev=dev
    fi
    # Without a stamp the environment counts as incomplete, so the next use repeats a failed set-up.
    rm -f -- "$venv/.lmn-stamp"
    if [[ ! -x $venv/bin/python || ${old%% pyproject*} != "${stamp%% pyproject*}" ]]; then
      # Incomplete, or for another extra or checkout: create it again.
      find "$venv" -mindepth 1 -maxdepth 1 ! -name .lmn-lock -exec rm -rf -- {} +
      echo "launch.sh: creating $venv with $python for $extra" >&2
      "$python" -m venv "$venv" || stopped
    else
      echo "launch.sh: updating $venv" >&2
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$root/constraints.txt" --editable "${root}[$extra${dev:+,dev}]" || stopped
    echo "$stamp${dev:+ dev}" >"$venv/.lmn-stamp.new"
    mv -- "$venv/.lmn-stamp.new" "$venv/.lmn-stamp"
    echo "launch.sh: set-up took $((SECONDS - start)) s" >&2
  fi
  exec 9>&-
}

stopped() {
  echo "launch.sh: set-up failed, see above; the next call repeats it" >&2
  exit 1
}

GRACE=80 # tenths of a second in which the other hosts end after a failure

# Sets `running` to the running hosts of `pids`, `statuses` to the exit statuses of the others, and
# `failure` if one has failed.
check_hosts() {
  local k
  running=''
  for k in "${!pids[@]}"; do
    if [[ -z ${statuses[k]} ]]; then
      if kill -0 "${pids[k]}" 2>/dev/null; then
        running+=" $k"
      else
        statuses[k]=0
        wait "${pids[k]}" || {
          statuses[k]=$?
          failure=1
        }
      fi
    fi
  done
}

# Waits up to $1 tenths of a second for the hosts in `pids` to end.
await() {
  local tenths=$1
  check_hosts
  while [[ -n $running ]] && ((tenths-- > 0)); do
    sleep 0.1
    check_hosts
  done
}

# Ends the hosts that still run, first with signal $1, and removes their output.
end_hosts() {
  local k
  check_hosts
  for k in $running; do
    kill -s "$1" "${pids[k]}" || true
  done
  await 100
  for k in $running; do
    # Each has a process group of its own, with the workers that read its data.
    kill -s KILL -- "-${pids[k]}" || true
  done
  await 20
  rm -rf -- "$output"
}

# Runs the command $2... as $1 hosts on this machine and returns the status of the one that failed.
# Shows the output of host 0, and of the others only the error that ended them.
rehearse() {
  local hosts=$1 k failed='' ended=''
  shift
  pids=() statuses=() running='' failure='' signal=TERM
  output=$(mktemp -d)
  trap 'end_hosts "$signal" 2>/dev/null' EXIT
  trap 'signal=INT; exit 130' INT
  trap 'exit 143' TERM
  # A process group for each: this shell passes Ctrl-C on, and none of them ignores it.
  set -m
  for ((k = 0; k < hosts; k++)); do
    if ((k == 0)); then
      "$@" "--process=$k" </dev/null &
    else
      "$@" "--process=$k" </dev/null >"$output/$k" 2>&1 &
    fi
    pids[k]=$!
    statuses[k]=''
  done
  set +m
  # Without the messages of bash about killed children; the one below is enough.
  {
    check_hosts
    while [[ -n $running && -z $failure ]]; do
      sleep 0.1
      check_hosts
    done
  } 2>/dev/null
  if [[ -z $failure ]]; then
    return 0
  fi
  # One has failed. The others notice and end; a host that has not joined yet or hangs does not.
  await "$GRACE" 2>/dev/null
  for k in "${!pids[@]}"; do
    case ${statuses[k]} in
      '' | 0) ;;
      134) failed=${failed:-$k} ;; # SIGABRT: JAX ends the other hosts with it
      *)
        # A killed host did not end because of another one: it failed first.
        if [[ -z $failed || ${statuses[failed]} == 134 ||
          (${statuses[k]} -gt 128 && ${statuses[failed]} -le 128) ]]; then
          failed=$k
        fi
        ;;
    esac
  done
  ended=${statuses[0]}
  if [[ -z $ended || $ended == 0 ]] || ((ended > 128)); then
    # Host 0 has not shown the error.
    if ((failed > 0)); then
      cat -- "$output/$failed" >&2
    fi
  else
    # Every host ends with the same line, which host 0 has shown; a traceback precedes it.
    for ((k = 1; k < hosts; k++)); do
      if [[ $(<"$output/$k") == *Traceback* ]]; then
        sed '$d' "$output/$k" >&2
        break
      fi
    done
  fi
  if ((statuses[failed] > 128)); then
    echo "launch.sh: host $failed was ended by signal $((statuses[failed] - 128))" >&2
  fi
  return "${statuses[failed]}"
}

# Prints the commands that run on a worker: $1 is start, follow or stop; then launch.sh's arguments.
# The run has its own session, so that it continues after a lost connection. Its output is in
# lmn_jax/run.log, its process in run.pid, and after its end its status in run.status.
# shellcheck disable=SC2016 # the text in single quotes is for the shell of the worker
remote_commands() {
  local what=$1 call
  local alive='[ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null'
  local follow='tail -n +1 -f --pid="$(cat run.pid)" run.log; [ -e run.status ] ||'
  follow+=' { echo "launch.sh: the run was killed" >&2; exit 137; }; exit "$(cat run.status)"'
  shift
  case $what in
    start)
      call=$(show LMN_EXTRA=tpu LMN_COORDINATOR=auto ./launch.sh "$@")
      # SIGTERM ends the program; the shell around it continues and writes its status.
      call="trap : TERM; $call; echo \$? >run.status.new; mv run.status.new run.status"
      call=$(show setsid nohup bash -c "$call")
      echo "mkdir -p lmn_jax && cd lmn_jax || exit; if $alive; then" \
        "echo 'launch.sh: a run is in progress; --follow shows it, --stop ends it' >&2; exit 2;" \
        "fi; rm -f run.status && tar -xzf ../lmn_jax.tgz || exit;" \
        "$call >run.log 2>&1 </dev/null & echo \$! >run.pid; $follow"
      ;;
    follow)
      echo "cd lmn_jax || exit; [ -e run.pid ] ||" \
        "{ echo 'launch.sh: no run was started here' >&2; exit 2; }; $follow"
      ;;
    stop)
      echo "cd lmn_jax || exit; $alive ||" \
        "{ echo 'launch.sh: no run is in progress' >&2; exit 2; };" \
        "kill -TERM -- -\"\$(cat run.pid)\"; $follow"
      ;;
  esac
}

# Copies this folder to every worker of a TPU slice and runs launch.sh there with the arguments, or
# follows or stops the run there ($action); for a dry run, prints the commands instead.
on_tpu() {
  local archive=$root/.lmn_jax.tgz name
  [[ -n $zone ]] || fail "--tpu=$tpu needs its zone: --zone=ZONE"
  if [[ $action != start && $# -gt 0 ]]; then
    fail "--$action takes no flags of the program; leave out $1"
  fi
  local tpu_vm=(gcloud compute tpus tpu-vm)
  local where=(--worker=all "--zone=$zone")
  if [[ -n $project ]]; then
    where+=("--project=$project")
  fi
  local pack=(tar -czf "$archive" -C "$root" --exclude=__pycache__)
  for name in "$root"/*; do
    # The glob leaves out hidden files (.git, .venv).
    if [[ ${name##*/} != runs && ! -e $name/.lmn-lock ]]; then
      pack+=("${name##*/}")
    fi
  done
  local copy=("${tpu_vm[@]}" scp "$archive" "$tpu:lmn_jax.tgz" "${where[@]}")
  local run=("${tpu_vm[@]}" ssh "$tpu" "${where[@]}" "--command=$(remote_commands "$action" "$@")")
  if [[ -n $dry ]]; then
    if [[ $action == start ]]; then
      show "${pack[@]}"
      show "${copy[@]}"
    fi
    show "${run[@]}"
    return
  fi
  command -v gcloud >/dev/null || fail "--tpu needs gcloud, which is not on the path; install it"
  if [[ $action == start ]]; then
    trap 'rm -f -- "$root/.lmn_jax.tgz"' EXIT
    "${pack[@]}"
    "${copy[@]}"
  fi
  "${run[@]}"
}

# Sets `step`: the command that a Slurm job of $1 nodes runs on each of them.
slurm_step() {
  # By default a step has one CPU for each task. Each node has its own environment.
  step=(srun "--nodes=$1" "--ntasks=$1" --ntasks-per-node=1
    "--cpus-per-task=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" --kill-on-bad-exit=1
    "$root/launch.sh")
}

# Submits this script as a Slurm job of $nodes nodes with the arguments; for a dry run, prints that
# command and the one that the job runs.
submit() {
  local submission=(sbatch "--nodes=$nodes" "--chdir=$root" "$root/launch.sh" "$@")
  if [[ -n $dry ]]; then
    show "${submission[@]}"
    slurm_step "$nodes"
    show "${step[@]}" "$@"
    return
  fi
  command -v sbatch >/dev/null || fail "--nodes needs sbatch, which is not on the path"
  "${submission[@]}"
}

whole_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 must be a whole number from 1 on"
}

# Sets the settings of the launcher (dry, dev, hosts, tpu, zone, project, nodes, action) from the
# arguments, and `arguments` to the other ones, which are for the program.
read_arguments() {
  local name value
  dry='' dev='' hosts='' tpu='' zone='' project='' nodes='' action=start
  arguments=()
  [[ $# -gt 0 ]] || set -- --help
  while [[ $# -gt 0 ]]; do
    name=${1%%=*}
    case $1 in
      --help | -h)
        usage
        exit
        ;;
      --dry-run) dry=1 ;;
      --test | --test-slow | --docs) dev=${1#--} ;;
      --follow | --stop) action=${1#--} ;;
      --hosts | --tpu | --zone | --project | --nodes | --hosts=* | --tpu=* | --zone=* | \
        --project=* | --nodes=*)
        if [[ $1 == *=* ]]; then
          value=${1#*=}
        elif [[ $# -gt 1 && $2 != -* ]]; then
          value=$2
          shift
        else
          value=''
        fi
        case $name in
          --hosts | --nodes) whole_number "$name" "$value" ;;
          *) [[ -n $value ]] || fail "$name needs a value: $name=..." ;;
        esac
        printf -v "${name#--}" '%s' "$value"
        ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  local other=''
  for name in ${hosts:+--hosts} ${tpu:+--tpu} ${nodes:+--nodes} ${dev:+--$dev}; do
    [[ -z $other ]] || fail "$other and $name exclude each other; give one of them"
    other=$name
  done
  if [[ -z $tpu ]]; then
    for name in ${zone:+--zone} ${project:+--project}; do
      fail "$name is for --tpu=NAME"
    done
    [[ $action == start ]] || fail "--$action is for --tpu=NAME"
  fi
}

main() {
  local extra python stamp k
  local dry dev hosts tpu zone project nodes action arguments
  read_arguments "$@"
  # bash before 4.4 calls an empty array unset.
  set -- ${arguments[@]+"${arguments[@]}"}
  if [[ -n $batch && ! (-f $root/launch.sh && -f $root/pyproject.toml) ]]; then
    fail "$root is not the folder of launch.sh; run sbatch there"
  fi
  if [[ -n $tpu ]]; then
    on_tpu "$@"
    return
  fi
  local step
  if [[ -n $nodes ]]; then
    submit "$@"
    return
  fi
  local devices=${LMN_DEVICES:-1} port=${LMN_PORT:-$((20000 + RANDOM % 10000))}
  if [[ -n $hosts ]]; then
    whole_number LMN_DEVICES "$devices"
  fi
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
  # The environment depends on these; a change of the part before ' pyproject' creates a new one.
  stamp="$extra $root pyproject $(cat -- "$root"/{pyproject.toml,constraints.txt} | cksum)"

  local command=("$venv/bin/python" -m)
  if [[ $dev == docs ]]; then
    cd -- "$root"
    # -E: a page that has moved since an earlier build would give a warning.
    command+=(sphinx -E -W --keep-going -q -b html docs build/docs)
  elif [[ -n $dev ]]; then
    # Most of the time is compiling, on one core for each process; a later -n overrides this one.
    # The tests of a file run in one process, because they share compiled programs.
    command+=(pytest -n auto --maxprocesses=4 --dist=loadfile)
    if [[ $dev == test-slow ]]; then
      command+=(-m slow)
    fi
    # So that paths such as `--test tests/test_docs.py` do not depend on the current folder.
    cd -- "$root"
  else
    command+=(lmn_jax)
  fi
  if [[ -n $hosts ]]; then
    # Only CPUs: Gloo connects them.
    command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "${command[@]}" "$@"
      "--coordinator=127.0.0.1:$port" "--processes=$hosts")
    set --
  elif [[ -n $batch && -z $dev ]]; then
    slurm_step "${SLURM_JOB_NUM_NODES:-1}"
    command=("${step[@]}")
  fi

  if ! is_current "$stamp" "$dev"; then
    python=$(find_python)
    if [[ -n $dry ]]; then
      show "$python" -m venv "$venv"
      show "$venv/bin/python" -m pip install --constraint "$root/constraints.txt" \
        --editable "${root}[$extra${dev:+,dev}]"
    else
      create_venv "$python" "$extra" "$stamp" "$dev"
    fi
  fi
  if [[ ${command[0]} != srun && -z $dev &&
    -z ${MALLOC_MMAP_MAX_:-}${MALLOC_TRIM_THRESHOLD_:-}${MALLOC_TOP_PAD_:-}${MALLOC_ARENA_MAX:-} ]]
  then
    if [[ -n $dry ]]; then
      show export "${KEEP_FREED[@]}"
    else
      export "${KEEP_FREED[@]}"
    fi
  fi
  if [[ -n $dry && -n $hosts ]]; then
    for ((k = 0; k < hosts; k++)); do
      show "${command[@]}" "--process=$k"
    done
    return
  fi
  if [[ -n $dry ]]; then
    show "${command[@]}" "$@"
    return
  fi
  if [[ -n $hosts ]]; then
    rehearse "$hosts" "${command[@]}"
    return
  fi
  exec "${command[@]}" "$@"
}

# When a test sources this file, it only defines its functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
