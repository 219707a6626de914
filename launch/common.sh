# Sourced by the other scripts.

# Print the comment at the head of the script, and exit with 2.
usage() {
    sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0" >&2
    exit 2
}

# Run a command, or print it if DRY_RUN is set.
run() {
    if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

# Run torchrun with these arguments. SIGTERM, SIGHUP and Ctrl-C go to the ranks and not to torchrun,
# which would give them 30 s and exit with 1. The exit status is 75 if the ranks stopped and saved.
run_ranks() {
    if [ -n "${DRY_RUN:-}" ]; then run torchrun "$@"; return; fi
    MIRO_STOPPED_FILE=$(mktemp -u)
    export MIRO_STOPPED_FILE
    set -m # Job control gives torchrun a process group of its own, which Ctrl-C does not reach.
    torchrun "$@" &
    torchrun=$!
    set +m
    trap 'signal_ranks TERM' TERM HUP
    trap 'signal_ranks INT' INT
    if [ "${MIRO_COMMANDS:-}" = stdin ]; then
        exec 3<&0
        read_commands <&3 &
        trap "kill $! 2> /dev/null || true" EXIT
    fi
    local status=0
    while wait "$torchrun" && status=0 || status=$?; kill -0 "$torchrun" 2> /dev/null; do :; done
    if [ -e "$MIRO_STOPPED_FILE" ]; then
        rm -f "$MIRO_STOPPED_FILE"
        exit 75
    fi
    # Stopped before there were ranks: nothing is lost.
    if [ -n "${stopped_early:-}" ]; then exit 75; fi
    exit "$status"
}

# What nodes.sh writes: stop, or kill if another machine failed. A lost connection stops the run too.
read_commands() {
    local word
    while read -r word; do
        if [ "$word" = kill ]; then kill "$torchrun"; else kill $$; fi
    done
    kill $$
}

signal_ranks() {
    if ! pkill "-$1" -P "$torchrun"; then
        stopped_early=1
        kill "$torchrun" || true
    fi
}
