#!/bin/sh
# Pre-train the small BEST-RQ and the small wav2vec 2.0 on the same speech for the same number of updates of 100 s:
#
#     runs/small_encoders.sh OUT --data_folder SPEECH/LibriSpeech --train_splits '[train-clean-100]' \
#         --extra_folders '[SPEECH/unlabelled]'
#
# OUT/bestrq_small and OUT/wav2vec2_small are the runs, each with its encoder/. What follows OUT goes to both train.py.
# Stopped, and started again with the same words, it goes on where it was. UPDATES=1000 and PYTHON=python can be set
# before it.
set -eu
if [ $# -lt 3 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1
shift
recipe=$(dirname "$0")/../recipes/LibriSpeech/pretrain
for method in bestrq wav2vec2; do
    "${PYTHON:-python}" "$recipe/train.py" "$recipe/hparams/${method}_small.yaml" \
        --output_folder "$out/${method}_small" --grad_accumulation_factor 4 \
        --optimizer_step_limit "${UPDATES:-1000}" "$@"
done
