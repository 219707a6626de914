# Sourced by the other scripts: `run COMMAND` runs the command, or prints it if DRY_RUN is set.
run() {
    if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
