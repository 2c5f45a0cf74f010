#!/usr/bin/env bash
# Trains on a slice of TPU VMs, from a clone of this repository:
#
#     launch/tpu_vm.sh create                     asks for the slice and waits for it
#     launch/tpu_vm.sh install                    what is committed here, with its packages, on every host
#     launch/tpu_vm.sh run --config=... --workdir=...    begins training; the flags are those of train.py
#     launch/tpu_vm.sh follow                     the log of the first host, until Ctrl-C
#     launch/tpu_vm.sh stop                       saves and ends training, on all hosts
#     launch/tpu_vm.sh delete                     gives the slice back; until then it is paid for
#
# Needs the gcloud command, logged in, with a project that has a quota for the chips. In the environment:
#
#   TPU            name of the slice, yours to choose
#   ZONE           where it stands: `gcloud compute tpus accelerator-types list --zone=ZONE` lists its types
#   ACCELERATOR    type and size, by chips (v5litepod-16, v6e-16) or, for v5p, by cores (v5p-128: 64 chips)
#   IMAGE          the hosts' system: v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e)
#   CREATE_FLAGS   more flags for creating, as --spot (cheap, may be taken away); default: none
set -euo pipefail

fail() {
    echo "launch/tpu_vm.sh: $1" >&2
    exit 2
}

require() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || fail "$name is not set; the first lines of the script explain it"
    done
}

on_hosts() { # WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

cd "$(dirname "$0")/.."
action=${1:-}
shift || fail 'say what to do: create, install, run, follow, stop or delete'
case $action in
create)
    require TPU ZONE ACCELERATOR IMAGE
    read -ra more <<<"${CREATE_FLAGS:-}"
    gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
        --version="$IMAGE" ${more[@]+"${more[@]}"}
    ;;
install)
    require TPU ZONE
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:mlra_jax.tar.gz" --zone="$ZONE" --worker=all
    # The hosts' own Python is older than 3.12; uv brings one.
    on_hosts all 'set -e
        mkdir -p mlra_jax && tar -xzf mlra_jax.tar.gz -C mlra_jax && cd mlra_jax
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
        python3 -m uv pip install --quiet --python .venv -r requirements.txt "jax[tpu]" \
            "gcsfs>=2026.10,<2027"
        .venv/bin/python -c "import mlra_jax, socket; print(socket.gethostname(), \"is ready\")"'
    ;;
run)
    require TPU ZONE
    (($#)) || fail 'run takes the flags of train.py: --config=... --workdir=...'
    flags=$(printf ' %q' "$@")
    on_hosts all "cd mlra_jax || exit 1
        if kill -0 \"\$(cat train.pid 2>/dev/null)\" 2>/dev/null; then
            echo 'it runs already; stop it first' >&2; exit 1
        fi
        setsid nohup launch/again.sh .venv/bin/python train.py$flags >>train.log 2>&1 </dev/null &
        echo \$! >train.pid"
    ;;
follow)
    require TPU ZONE
    on_hosts 0 'tail -n 100 -F mlra_jax/train.log'
    ;;
stop)
    require TPU ZONE
    # One signal is enough; the loops that would start it again end with it.
    on_hosts all 'xargs kill -TERM <mlra_jax/train.pid'
    ;;
delete)
    require TPU ZONE
    gcloud compute tpus tpu-vm delete "$TPU" --zone="$ZONE"
    ;;
*)
    fail "unknown action $action; there are create, install, run, follow, stop and delete"
    ;;
esac
