#!/usr/bin/env bash
# Builds the wheel, installs it into a clean environment as a user would, and follows the steps of a new user outside the checkout:
# prepare, train, evaluate, the notebook of docs/, export, serve, recommend over HTTP. The extras are constrained to the pins of requirements/common.txt.
#
#   scripts/check_wheel.sh [FOLDER]   default: a temporary folder, removed afterwards
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout=$PWD

folder=${1:-}
server=
is_temporary=
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    is_temporary=yes
fi
finish() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$is_temporary" ] || rm -rf "$folder"
}
trap finish EXIT
mkdir -p "$folder"
folder=$(realpath "$folder")

rm -rf "$folder/source" "$folder/wheel" && mkdir "$folder/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$folder/source"
.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/wheel" "$folder/source"
wheel=$(ls "$folder"/wheel/mme-*.whl)

[ -x "$folder/env/bin/python" ] || python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
grep -vE '^(-|#)' requirements/common.txt | sed -E 's/ +--hash=.*|\\$//' | grep == >"$folder/pins.txt"
grep -vE '^(-|#)' requirements/build.txt | sed -E 's/ +--hash=.*|\\$//' | grep == >"$folder/build.txt"
pip install -r "$folder/build.txt"
pip install --no-build-isolation -c "$folder/pins.txt" "$wheel[cpu,serve]" pandas
torchrec=$(grep -oE '^torchrec==[0-9.]+' requirements/cpu.txt)
pip install --no-deps "$torchrec" # its metadata require the CUDA build of FBGEMM
pip install --force-reinstall --no-deps "$wheel"

cd "$folder" && rm -rf datasets runs
mme=$folder/env/bin/mme
[ "$("$folder/env/bin/python" -c 'import mme; print(mme.__file__)')" != "$checkout/mme/__init__.py" ]
"$mme" --version
"$mme" prepare --synthetic quickstart --users 300 --items 100 --output datasets/quickstart
"$folder/env/bin/mme-launch" run --config configs/quickstart.yaml train.epochs=1 --nproc-per-node 2
"$mme" evaluate --run runs/quickstart
"$folder/env/bin/mme-launch" plan --config configs/quickstart.yaml --nnodes 1 --gpu h100-80g >/dev/null
"$folder/env/bin/python" "$checkout/scripts/run_notebook.py" "$checkout/docs/first-model.ipynb"

"$mme" export --run runs/quickstart --what weights --output quickstart.safetensors >/dev/null
"$mme" serve --run quickstart.safetensors --port 0 >serve.log 2>&1 &
server=$!
for _ in $(seq 120); do
    url=$(grep -oE 'http://[0-9.:]+' serve.log || true)
    [ -z "$url" ] || break
    sleep 0.5
done
"$folder/env/bin/python" - "$url" <<'PYTHON'
import json, sys, time, urllib.request
for _ in range(60):  # the address is bound a moment before the server listens
    try:
        urllib.request.urlopen(f"{sys.argv[1]}/health", timeout=60)
        break
    except OSError:
        time.sleep(0.5)
history = {"item_ids": [1003, 1017], "timestamps": [1600000000, 1600000600]}
body = json.dumps({"histories": [history], "k": 3}).encode()
request = urllib.request.Request(f"{sys.argv[1]}/recommend", body, {"content-type": "application/json"})
(result,) = json.load(urllib.request.urlopen(request, timeout=60))["results"]
print(result)
assert len(result["item_ids"]) == 3, result
PYTHON
kill "$server"
wait "$server" || true # the signal ends it
server=
echo "wheel: installed, trained, exported and served outside the checkout"
