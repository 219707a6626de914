#!/usr/bin/env bash
# Train on one machine without a GPU, from a folder of captioned images to a model to sample from.
#
#   launch/laptop.sh PHOTOS RUN [options of miro train]
#
# Edit: REWARDS, the reward models; SIZE, the side of an image in pixels; PRESET.
# Run again with the same arguments it resumes.
set -euo pipefail
. "$(dirname "$0")/common.sh"
REWARDS="colourfulness sharpness"
SIZE=32
PRESET=demo

[ $# -gt 1 ] || usage
photos=$1 run=$2
shift 2
# shellcheck disable=SC2086  # REWARDS splits into words
run miro annotate "$photos" "$run/scored" --rewards $REWARDS
run miro encode "$run/scored" "$run/encoded" --size "$SIZE"
run miro train "$PRESET" --run "$run/model" --data "$run/encoded" "$@"
