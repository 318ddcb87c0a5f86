#!/usr/bin/env bash
# The checks and timings that need a CUDA GPU, in one go: about 5 minutes. Run it from the repository's root in an
# environment that has PyTorch with CUDA and this package's dependencies; $OUT (default: a temporary folder) gets the runs.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
out=${OUT:-$(mktemp -d)}
failed=0
check() { # name, expected exit code, command...
  local name=$1 expected=$2; shift 2
  "$@" > "$out/$name.log" 2>&1
  local code=$?
  if [ $code = "$expected" ]; then echo "ok    $name: $(grep -E '^ *(test|allranks:) ' "$out/$name.log" | tail -n 1)"
  else echo "FAIL  $name: exit code $code instead of $expected"; tail -n 20 "$out/$name.log"; failed=1; fi
}
train=(python3 -m allranks.train report=false device=cuda)
python3 -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name())'

data=()
[ -n "${ALLRANKS_DATA:-}" ] || data=(data=synthetic)
for model in linear mlp cnn vit resnet18; do
  check "$model" 0 "${train[@]}" "${data[@]}" model=$model trainer.epochs=3 run.dir="$out/$model"
done
for precision in bf16 fp16; do
  check "cnn-$precision" 0 "${train[@]}" "${data[@]}" experiment=cnn trainer.epochs=3 trainer.precision=$precision \
    run.dir="$out/cnn-$precision"
done
check cnn-compile 0 "${train[@]}" "${data[@]}" model=cnn trainer.epochs=3 trainer.compile=true run.dir="$out/compile"
check cnn-recipe 0 "${train[@]}" "${data[@]}" experiment=cnn run.dir="$out/recipe"
# what is measured on a GPU: its memory, the share of its peak, a trace with its kernels
check debug 0 "${train[@]}" --debug "${data[@]}" model=cnn trainer.precision=bf16 run.dir="$out/debug"
grep -h 'memory/\|throughput/' "$out/debug/summary.json"
check mlp-cpu 0 python3 -m allranks.train report=false device=cpu "${data[@]}" model=mlp model.dropout=0 run.dir="$out/cpu"
check mlp-gpu 0 "${train[@]}" "${data[@]}" model=mlp model.dropout=0 run.dir="$out/gpu"
# one rank under torchrun: NCCL comes up; two ranks on one GPU: refused, unless it is asked for
check torchrun-1 0 torchrun --nproc-per-node 1 -m allranks.train report=false device=cuda "${data[@]}" run.dir="$out/torchrun"
if [ "$(nvidia-smi --list-gpus | wc -l)" = 1 ]; then
  check two-on-one-refused 1 torchrun --nproc-per-node 2 -m allranks.train report=false device=cuda "${data[@]}" run.dir="$out/two"
  check two-on-one-asked 0 torchrun --nproc-per-node 2 -m allranks.train report=false device=cuda oversubscribe=true "${data[@]}" \
    model=mlp model.dropout=0 run.dir="$out/shared"
fi
# stopped and gone on: the weights of the run that never stopped; reproducible: those of another number of ranks
steps=(trainer.epochs=2 trainer.reproducible=true checkpoint.every_steps=100 checkpoint.keep=100)
check whole 0 "${train[@]}" "${data[@]}" model=cnn "${steps[@]}" run.dir="$out/whole"
mkdir -p "$out/stopped/logs" "$out/stopped/checkpoints"
cp "$out/whole/config.yaml" "$out/stopped/"
cp -r "$out/whole/checkpoints/step-000300" "$out/stopped/checkpoints/"
check went-on 0 "${train[@]}" "${data[@]}" model=cnn "${steps[@]}" run.dir="$out/stopped"
check two-ranks 0 torchrun --nproc-per-node 2 -m allranks.train report=false device=cuda oversubscribe=true "${data[@]}" model=cnn \
  "${steps[@]}" run.dir="$out/two-ranks"
echo "weights that must be equal (whole, gone on, two ranks):"
grep -h model/sha256 "$out"/{whole,stopped,two-ranks}/summary.json
echo "losses that must agree to 1e-4 (cpu, gpu, two ranks on one gpu):"
for run in cpu gpu shared; do [ -e "$out/$run/metrics.jsonl" ] && tail -n 1 "$out/$run/metrics.jsonl" | cut -c 1-110; done
exit $failed
