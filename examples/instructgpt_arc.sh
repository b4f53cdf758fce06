#!/usr/bin/env bash
# InstructGPT's three steps on one machine without a network: pre-train a small GPT on prose, teach it instructions with
# careless demonstrations, let a simulated judge rank its responses, train a reward model on the rankings, and train the
# policy on that reward. A second experiment trains policies on a flawed reward. This takes about a quarter of an hour on
# two idle CPU cores; the table and the plot go to out/instructgpt/. A second run continues where the first stopped.
#
#   bash examples/instructgpt_arc.sh
#   SEEDS=1 JOBS=1 bash examples/instructgpt_arc.sh
#   ONLY=data bash examples/instructgpt_arc.sh  # prepare the data and stop
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
export repository
export PYTHONPATH=$repository/examples${PYTHONPATH:+:$PYTHONPATH}  # for stages/ppo.py --monitor=instruction_judge
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                       # one core for each job
seeds=${SEEDS:-1 2 3}
jobs=${JOBS:-$(nproc)}
kl_coefs="0 0.3 1 3"  # for the runs on the flawed reward
export data=data/instructgpt out=out/instructgpt

if [ ! -d $data ]; then
    python "$repository/examples/instructions_data.py" --output $data
fi
if [ ! -f data/instructgpt_text/meta.json ]; then
    python "$repository/prepare/text.py" --input $data/corpus.jsonl --name instructgpt_text --tokenizer char \
        --val_fraction 0.02
fi
if [ "${ONLY:-}" = data ]; then exit; fi
if [ ! -e out/instructgpt_mini/last ]; then
    OMP_NUM_THREADS=$jobs python "$repository/train.py" "$repository/configs/instructgpt_mini.toml" \
        --out_dir=out/instructgpt_mini
elif ! grep -q '"step": 3000' out/instructgpt_mini/metrics.jsonl; then
    OMP_NUM_THREADS=$jobs python "$repository/train.py" --init_from=resume --out_dir=out/instructgpt_mini
fi

run() {  # file that marks the command as done, then the command; its output goes to a log beside that file
    local done=$1
    shift
    if [ -e "$done" ]; then return; fi
    mkdir -p "$(dirname "$done")"
    if ! "$@" > "${done%.*}.log" 2>&1; then
        echo "$*"
        tail -n 20 "${done%.*}.log"
        return 1
    fi
}

stage() {  # stage, run folder, model, flags; an interrupted run starts over
    run "$2.done" python "$repository/stages/$1.py" "$3" --out_dir="$2" --overwrite=True "${@:4}"
    touch "$2.done"
}

judge() { run "$1" python "$repository/examples/instruction_judge.py" "$2" --output="$1" "${@:3}"; }

measure() {  # model, name of the results: true utility, and loss on the pre-training text
    judge "$2.utility.json" "$1" --measure=$data/test.jsonl --seed=100
    run "$2.text.json" python "$repository/stages/eval.py" "$1" --perplexity instructgpt_text --json "$2.text.json"
}

reward() {  # run folder, model, rankings, flags
    stage reward "$1" "$2" --train="$3" --demonstrations=$data/demonstrations.jsonl --batch_size=16 \
        --gradient_accumulation_steps=1 --learning_rate=1e-3 --warmup=0.1 "${@:4}"
}

ppo() {  # run folder, model, reward model, flags
    stage ppo "$1" "$2" --reward="$3" --prompts=$data/train.jsonl --monitor=instruction_judge:utility \
        --batch_size=64 --gradient_accumulation_steps=1 --minibatches=4 --inner_epochs=2 \
        --max_new_tokens=18 --rollout_batch_size=256 --save_interval=1000 "${@:4}"
}

align() {  # seed: the first two steps
    local here=$out/$1
    stage sft "$here/sft" out/instructgpt_mini --train=$data/demonstrations.jsonl --seed="$1" \
        --epochs=6 --batch_size=16 --learning_rate=2e-3 --residual_dropout=0.1
    judge "$here/rankings.jsonl" "$here/sft" --rank=$data/train.jsonl --limit=5000 --seed="$1"
    judge "$here/held_out.jsonl" "$here/sft" --rank=$data/test.jsonl --seed="$1"
    reward "$here/reward" "$here/sft" "$here/rankings.jsonl" --val="$here/held_out.jsonl" --seed="$1"
    judge "$here/rankings_10k.jsonl" "$here/sft" --rank=$data/train.jsonl --limit=10000 --seed="$1"
    reward "$here/reward_10k" "$here/sft" "$here/rankings_10k.jsonl" --val="$here/held_out.jsonl" --seed="$1" \
        --residual_dropout=0 --epochs=2
    measure "$here/sft" "$here/sft"
    echo "seed $1: supervised fine-tuning and reward model"
}

learn() {  # seed, method: the third step, or direct preference optimisation
    local here=$out/$1 aligned=(--episodes=3072 --learning_rate=3e-4 --kl_coef=0.5 --seed="$1")
    case $2 in
        ppo) ppo "$here/ppo" "$here/sft" "$here/reward" "${aligned[@]}" ;;
        ppo_ptx) ppo "$here/ppo_ptx" "$here/sft" "$here/reward" "${aligned[@]}" \
            --pretraining_dataset=instructgpt_text --pretraining_coef=1 --pretraining_batch_size=16 ;;
        dpo) stage dpo "$here/dpo" "$here/sft" --train="$here/rankings.jsonl" --seed="$1" --batch_size=16 \
            --gradient_accumulation_steps=1 --learning_rate=2e-4 --beta=0.5 ;;
    esac
    measure "$here/$2" "$here/$2"
    echo "seed $1: $2"
}

flawed() {  # the reward model of a judge who prefers long responses
    judge $out/flawed/rankings.jsonl $out/1/sft --rank=$data/train.jsonl --limit=3000 --seed=1 --flaw=1.5
    reward $out/flawed/reward $out/1/sft $out/flawed/rankings.jsonl
    echo "flawed reward model"
}

hack() {  # kl_coef
    ppo "$out/flawed/$1" $out/1/sft $out/flawed/reward --episodes=4096 --learning_rate=5e-4 --kl_coef="$1"
    echo "flawed reward, kl_coef $1"
}

export -f run stage judge measure reward ppo align learn flawed hack
run_all() { xargs -P "$jobs" -L 1 bash -euo pipefail -c '"$@"' _; }  # each line of standard input is a function call

for seed in $seeds; do echo "align $seed"; done | run_all
{
    echo flawed
    for method in ppo ppo_ptx; do
        for seed in $seeds; do echo "learn $seed $method"; done
    done
} | run_all
{
    for coefficient in $kl_coefs; do echo "hack $coefficient"; done
    for seed in $seeds; do echo "learn $seed dpo"; done
} | run_all
run $out/base.text.json python "$repository/stages/eval.py" out/instructgpt_mini --perplexity instructgpt_text \
    --json $out/base.text.json
python "$repository/examples/instructgpt_report.py" --results $out
