#!/usr/bin/env bash
# Prepares the data where that is not done yet and trains on all GPUs, or on 2 CPU processes: `make train` calls it.
#
#   scripts/train.sh CONFIG DATA [key.path=value …]
#
# DATA: a file of interactions (Parquet, CSV, MovieLens, …); empty: the embedded data set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=$1
data=$2
shift 2

if [ -z "$data" ]; then
    dataset=datasets/quickstart
    prepare=(--synthetic quickstart)
    source="embedded"
    overrides=(data.path="$dataset")
else
    if [ ! -s "$data" ]; then
        echo "error: DATA=$data: $([ -e "$data" ] && echo "empty" || echo "no such") file, expected interactions" >&2
        exit 2
    fi
    name=$(basename "$data")
    name=${name%.*}
    dataset=datasets/$name
    prepare=(--input "$data" --format auto)
    source="$(realpath "$data") $(stat -c '%s %Y' "$data")"
    overrides=(data.path="$dataset" output_dir="runs/$name")
fi

# The set is made anew where the file is another one or the code that reads it has changed.
source="$source $(cat mme/data/*.py | sha256sum | cut -d' ' -f1)"
if [ ! -f "$dataset/dataset.json" ] || [ "$(cat "$dataset.source" 2>/dev/null)" != "$source" ]; then
    rm -f "$dataset.source"
    .venv/bin/python -m mme prepare "${prepare[@]}" --output "$dataset"
    echo "$source" >"$dataset.source"
fi
exec .venv/bin/python -m launcher run --config "$config" "${overrides[@]}" "$@"
