# Sourced by the other scripts: `run COMMAND` is that command, or prints it where DRY_RUN is set.
run() {
    if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
