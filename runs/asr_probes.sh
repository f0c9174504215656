#!/bin/sh
# Train the small speech recognition probe on several encoders, with several seeds and amounts of labels:
#
#     ENCODERS="fbank random:OUT/bestrq_small OUT/bestrq_small OUT/wav2vec2_small" \
#         runs/asr_probes.sh PROBES --data_folder SPEECH/LibriSpeech
#
# PROBES/<encoder>/<hours>h/<seed>/results.json. What follows PROBES goes to each train.py. HOURS="null 1" (null: all),
# SEEDS="1 2" and PYTHON=python can be set before it. Stopped, and started again with the same words, it goes on.
set -eu
if [ $# -lt 3 ] || [ -z "${ENCODERS:-}" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1
shift
recipe=$(dirname "$0")/../recipes/LibriSpeech/ASR
for hours in ${HOURS:-null 1}; do
    for seed in ${SEEDS:-1 2}; do
        for encoder in $ENCODERS; do
            name=$(printf %s "$encoder" | sed 's|:.*/|-|; s|.*/||')
            run="$out/$name/${hours}h/$seed"
            [ -f "$run/results.json" ] && continue
            case $encoder in random:*) cache="$out/cache/$name-$seed" ;; *) cache="$out/cache/$name" ;; esac
            "${PYTHON:-python}" "$recipe/train.py" "$recipe/hparams/probe_small.yaml" --encoder "$encoder" \
                --label_hours "$hours" --seed "$seed" --output_folder "$run" --cache_folder "$cache" "$@"
        done
    done
done
