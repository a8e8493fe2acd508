#!/usr/bin/env bash
# Prepares the data if needed, then trains on all GPUs or on 2 CPU processes; called by `make train`.
#
#   scripts/train.sh CONFIG DATA [key.path=value …]
#
# DATA: a file or folder of interactions (Parquet, CSV, MovieLens, …). If it is empty, the quick start's configuration uses
# the embedded data set, and any other its data.path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=$1
data=$2
shift 2

dataset=
if [ -n "$data" ]; then
    case $data in
    -*) data=./$data ;; # not an option
    esac
    refused=
    if [[ $data =~ ^[A-Za-z][A-Za-z0-9+.-]+:// ]]; then
        refused="a path with a scheme is not supported"
    elif [ ! -e "$data" ]; then
        refused="no such file"
    elif [ ! -f "$data" ] && [ ! -d "$data" ]; then
        refused="not a regular file or folder"
    elif [ ! -s "$data" ]; then
        refused="empty file"
    fi
    if [ -n "$refused" ]; then
        printf 'error: DATA=%q: %s, expected interactions\n' "$data" "$refused" >&2
        exit 2
    fi
    path=$(realpath -- "$data")
    file=$(basename "$path")
    # The name contains folder and file for the reader, and a hash that distinguishes equal names.
    name=$(basename "$(dirname "$path")")-${file%.*}-$(printf '%s\n' "$path" | sha256sum | cut -c 1-6)
    name=${name//[^[:alnum:]._-]/-} # overrides are parsed as YAML
    dataset=datasets/$name
    prepare=(--input "$data")
    source=$(find -L "$path" -type f -printf '%p %s %T@\n' | LC_ALL=C sort | sha256sum)
    set -- output_dir="runs/$name" "$@"
elif [ "$config" -ef configs/quickstart.yaml ]; then
    dataset=datasets/quickstart
    prepare=(--synthetic quickstart)
    source="embedded"
fi

if [ -n "$dataset" ]; then
    # Prepare the set again if the files or the code that reads them have changed.
    source="$source $(cat mme/data/*.py mme/prepare/*.py | sha256sum | cut -d' ' -f1)"
    if [ ! -f "$dataset/dataset.json" ] || [ "$(cat "$dataset.source" 2>/dev/null)" != "$source" ]; then
        rm -f "$dataset.source"
        .venv/bin/python -m mme prepare "${prepare[@]}" --output "$dataset"
        echo "$source" >"$dataset.source"
    fi
    set -- data.path="$dataset" "$@"
fi
exec .venv/bin/python -m launcher run --config "$config" "$@"
