#!/usr/bin/env bash
# Train the models of the zoo on a machine with a GPU, without a network, within some ten minutes:
#
#     python -m hasten_zoo.emoji_styles.carry --pack taught.zip       # where the images are
#     python -m hasten_zoo.sprites_wan.train_vae                      # once, on a CPU
#     benchmarks/gpu/zoo.sh DIR taught.zip runs/sprites-wan/vae/weights [SCALE]
#
# emoji-styles goes on from its committed weights, with sprites-wan beside it; then emoji-styles-turbo and -edit beside
# one another: none of them fills a GPU alone. SCALE multiplies all minutes. Weights come back as DIR/NAME.tar.aa, ...,
# in pieces of 15 MB, as soon as a model is exported; a failure of one ends no other, and the last status says so.
# The autoencoders stay behind: `cat NAME.tar.* | tar x`, and copy the folder vae that it was trained with into it.
# DEVICE, PYTHON, THREADS and the batches (STYLES, WAN, TURBO, EDIT) can be set, so that it can be tried on a CPU; SEED
# gives other views of the images.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:?give a folder for the weights}
taught=${2:?give the file that carry.py packed}
wan_vae=${3:?give the autoencoder of sprites-wan}
scale=${4:-1}
python=${PYTHON:-python3} device=${DEVICE:-cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/log"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$root/hasten/src:$root/zoo/src${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$here/wheels/*.whl" >/dev/null && [ "$device" != cpu ]; then
  "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$work/site" "$here"/wheels/*.whl || exit 1
  PYTHONPATH="$PYTHONPATH:$work/site"
fi

minutes() { awk "BEGIN { print $1 * $scale }"; }

step() { # step NAME MODULE ARGUMENTS...: its output goes to log/NAME; what happened when, to log/times
  local name=$1 status=0
  "$python" -m "hasten_zoo.$2" "${@:3}" >"$work/log/$name" 2>&1 || status=$?
  echo "$SECONDS s: $name ended with $status" | tee -a "$work/log/times"
  return "$status"
}

give() { # give NAME: the exported weights, to the results
  rm -f "$out/$1.tar."*
  tar cf - -C "$work" --exclude=vae "$1" | split -b 15m - "$out/$1.tar."
}

styles=emoji_styles.train turbo=emoji_styles_turbo.train edit=emoji_styles_edit.train wan=sprites_wan.train
vae=$root/zoo/src/hasten_zoo/emoji_styles/weights/vae
common=(--device "$device" --samples 1000000000)
new=("${common[@]}" --committed none)

train_wan() {
  local run=(--vae "$wan_vae" --out "$work/run-wan")
  step wan-coarse $wan "${run[@]}" "${new[@]}" --batch "${WAN:-48}" --minutes "$(minutes 2.6)" &&
    step wan-fine $wan "${run[@]}" "${new[@]}" --batch "${WAN:-48}" --mix fine --minutes "$(minutes 2.6)" --fall 1 &&
    step wan-export $wan "${run[@]}" --export "$work/wan" && give wan
}

train_turbo() {
  local run=(--teacher "$work/styles" --out "$work/run-turbo")
  step turbo $turbo "${run[@]}" "${new[@]}" --batch "${TURBO:-512}" --minutes "$(minutes 1.3)" --fall 0.4 &&
    step turbo-export $turbo "${run[@]}" --export "$work/turbo" && give turbo
}

train_edit() {
  local run=(--start "$work/styles" --latents "$work/scenes" --out "$work/run-edit")
  step edit $edit "${run[@]}" "${new[@]}" --batch "${EDIT:-512}" --minutes "$(minutes 1.3)" --fall 0.3 &&
    step edit-export $edit "${run[@]}" --export "$work/edit" && give edit
}

train_styles() {
  local run=(--data "$work/data" --vae "$vae" --out "$work/run-styles")
  step unpack emoji_styles.carry --unpack "$taught" --data "$work/data" || return
  step scenes emoji_styles_edit.latents --data "$work/data" --vae "$vae" --out "$work/scenes" --threads 2 &
  local scenes=$!
  step latents emoji_styles.latents --data "$work/data" --vae "$vae" --out "$work/latents" --device "$device" \
    --threads "${THREADS:-10}" --seed "${SEED:-4000}" &&
    step styles $styles "${run[@]}" "${common[@]}" --latents "$work/latents" --batch "${STYLES:-2048}" --lr 2e-3 \
    --minutes "$(minutes 6)" --fall 0.3 && step styles-export $styles "${run[@]}" --export "$work/styles" && give styles
  local status=$?
  wait "$scenes" || status=$?
  [ "$status" = 0 ] || return
  train_turbo &
  train_edit &
  wait
}

train_wan &
train_styles &
wait
tail -qn 1 "$work"/run-*/log.jsonl
failed=$(sed -n 's/.* s: \(.*\) ended with [1-9].*/\1/p' "$work/log/times")
for name in $failed; do
  echo "--- $name" && tail -n 5 "$work/log/$name"
done
tar czf "$out/logs.tar.gz" -C "$work" log $(cd "$work" && ls run-*/log.jsonl)
ls -l "$out"
[ -z "$failed" ]
