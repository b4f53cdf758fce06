#!/usr/bin/env bash
# A mixture of experts against a dense model of the same cost on TinyShakespeare's characters, and against the same
# mixture without its two losses, whose routers collapse. docs/results/moe.md discusses the results. It writes
# out/moe_arc/table.md and training.png, and for each mixture use.txt and use.png, which show the experts its characters
# are routed to. This takes about ten minutes on two CPU cores. A second run continues where the first stopped.
#
#   bash examples/moe_arc.sh
#   VARIANTS="dense less_balance balance_rate top_1 top_1_without_losses" bash examples/moe_arc.sh     more variants
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
export repository
seeds=${SEEDS:-1 2 3}
variants=${VARIANTS:-mixture dense without_losses}
jobs=${JOBS:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one core for each job

if [ ! -f data/tinyshakespeare/meta.json ]; then
    python "$repository/prepare/tinyshakespeare.py"
fi

train() {  # seed, variant
    local folder=out/moe_arc/$2/$1 changed=()
    case $2 in
        mixture) ;;
        dense) changed=(--n_experts=0 --mlp_size=256) ;;  # as wide as the two experts of a character
        without_losses) changed=(--balance_loss=0 --router_z_loss=0) ;;
        less_balance) changed=(--balance_loss=0.01) ;;
        balance_rate) changed=(--balance_loss=0 --balance_rate=1e-3) ;;
        # one expert as wide as the dense model's MLP, as in Switch
        top_1) changed=(--experts_per_token=1 --mlp_size=256 --balance_loss=0.01) ;;
        top_1_without_losses) changed=(--experts_per_token=1 --mlp_size=256 --balance_loss=0 --router_z_loss=0) ;;
        *) echo "unknown variant $2" >&2; return 1 ;;
    esac
    changed+=("$repository/configs/moe_mini.toml" --seed="$1" --overwrite=True)
    if [ -e "$folder/last" ]; then changed=(--init_from=resume); fi
    if [ ! -e "$folder/step-00001600" ]; then
        mkdir -p "$folder"
        if ! python "$repository/train.py" "${changed[@]}" --out_dir="$folder" > "$folder.log" 2>&1; then
            cat "$folder.log" >&2
            return 1
        fi
        echo "$2, seed $1: $(grep '^finished' "$folder.log")"
    fi
    if [ "$2" != dense ] && [ ! -f "$folder/use.json" ]; then
        python "$repository/tools/expert_use.py" "$folder" --dataset tinyshakespeare --tokens 0 --top 5 \
            --json "$folder/use.json" --plot "$folder/use.png" > "$folder/use.txt"
    fi
}
export -f train

for seed in $seeds; do
    for variant in $variants; do echo "$seed $variant"; done
done | xargs -P "$jobs" -L 1 bash -c 'train "$@"' train

python "$repository/examples/moe_report.py" --results out/moe_arc
