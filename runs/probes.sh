#!/bin/sh
# Train a probe of a downstream task on several encoders with several seeds:
#
#     ENCODERS="fbank random:OUT/bestrq_small OUT/bestrq_small OUT/wav2vec2_small" \
#         runs/probes.sh recipes/SLURP/intent PROBES --data_folder SPEECH/SLURP
#
# PROBES/<encoder>/<seed> are the runs: give each setting a PROBES of its own. What follows PROBES goes to each train.py.
# YAML=probe_small, SEEDS="1 2", CACHE=PROBES/cache and PYTHON=python can be set before it. Stopped, and started again
# with the same words, it goes on.
set -eu
if [ $# -lt 4 ] || [ -z "${ENCODERS:-}" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
recipe=$1 out=$2
shift 2
for seed in ${SEEDS:-1 2}; do
    for encoder in $ENCODERS; do
        name=$(printf %s "$encoder" | sed 's|:.*/|-|; s|.*/||')
        run="$out/$name/$seed"
        if [ -f "$run/results.json" ] || [ -f "$run/all/results.json" ]; then
            echo "$run is finished: passed over" >&2
            continue
        fi
        # another seed is another untrained encoder
        case $encoder in random:*) cache="$name-$seed" ;; *) cache="$name" ;; esac
        case ${YAML:-probe_small} in *finetune*) cached= ;; *) cached="--cache_folder ${CACHE:-$out/cache}/$cache" ;; esac
        # another seed is another draw of a few labels, too
        grep -q '^label_seed:' "$recipe/hparams/${YAML:-probe_small}.yaml" && drawn="--label_seed $seed" || drawn=
        # shellcheck disable=SC2086
        "${PYTHON:-python}" "$recipe/train.py" "$recipe/hparams/${YAML:-probe_small}.yaml" --encoder "$encoder" \
            --seed "$seed" --output_folder "$run" $cached $drawn "$@"
    done
done
