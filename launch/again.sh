#!/usr/bin/env bash
# Runs a command, and again when it fails:   launch/again.sh python train.py --config=... --workdir=...
#
#   RESTARTS   how often it is run again at most (default 20)
#   PAUSE      seconds before that (default 10)
#
# A process of a run that dies ends all others with exit code 1, so that all come again within the
# minute that they wait for each other; so they do after 75, with which all end that have saved because
# a machine goes away. Wrong flags (2) and an interruption (130) are no reason to run again. SIGTERM and
# Ctrl-C go on to the command as SIGTERM: it saves, and its exit code is that of this script.
set -u

stopped='' child=''
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT

for ((start = 0; ; start++)); do
    "$@" &
    child=$!
    # The signal ends the waiting, not the command.
    while
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null
    do :; done
    if [[ $stopped || $code == 0 || $code == 2 || $code == 130 ]] || ((start >= ${RESTARTS:-20})); then
        exit "$code"
    fi
    echo "ended with $code; again in ${PAUSE:-10} s ($((start + 1)) of ${RESTARTS:-20})"
    child=''
    sleep "${PAUSE:-10}"
    [[ -z $stopped ]] || exit "$code"
done
