"""Training on a GPU: one graph, no recompilation, and one wait for the device an update."""

import pytest
from PIL import Image

from fake_gpu.build import measure, needs_triton
from fake_gpu.table import TRANSLATION

TINY = (
    "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4", "--max_iters=3",
    "--eval_interval=100", "--eval_iters=2", "--device=cuda", "--compile=True",
)  # fmt: skip
MODERN = ("--n_kv_head=1", "--positions=rotary", "--qk_norm=True", "--norm=rmsnorm", "--activation=swiglu")
VARIANTS = {
    "dense": (),
    "modern": MODERN,
    "band": ("--attention_band=4",),
    "documents": ("--dataset=one", "--document_mask=True"),
    "mixture": ("--n_experts=4", "--log_interval=100"),
    "ngrams": ("--ngrams=3",),
    "float16": ("--dtype=float16",),
    "muon and an average": ("--optimizer=muon", "--ema_decay=0.9"),
    "float16 and muon": ("--dtype=float16", "--optimizer=muon"),
    "checkpointing": ("--activation_checkpointing=True",),
    "selective checkpointing": ("--activation_checkpointing=selective",),
    "accumulation": ("--gradient_accumulation_steps=2",),
}


def check(updates):
    assert [update["breaks"] for update in updates] == [0, 0, 0]
    assert [update["graphs"] for update in updates] == [1, 1, 1]
    for update in updates[1:]:
        assert sum(update["waits"].values()) == 1, update["waits"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_is_one_graph_and_waits_once(variant, documents):
    check(measure("train", *TINY, *VARIANTS[variant], folder=documents))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("--dtype=float16",), ("--dtype=float32",)], ids=str)
def test_groups_of_queries_have_a_fused_kernel_on_every_gpu(settings, documents):
    """Flash attention is for 16 bits and from the A100 on; elsewhere keys and values have to be repeated."""
    check(measure("train", *TINY, *MODERN, *settings, target=75, folder=documents))


@pytest.mark.slow
def test_a_norm_s_weight_stays_in_float32():
    """Autocast casts the input; the weight, cast to 16 bits and back, would be a second and a third."""
    assert measure("norm")["aten._to_copy.default"] == 1


@pytest.fixture
def stage_folder(tmp_path):
    """A folder with a model, a chat model and examples for every stage."""
    from gpt_arc.data.tokenizer import CharTokenizer
    from gpt_arc.weights.directory import save_model
    from helpers import write
    from model import GPT, GPTConfig
    from policy_tree import save_chat_model
    from ranked_texts import CHAT, tiny_config

    save_model(GPT(GPTConfig(24, 8, 2, 2, 16)), CharTokenizer("abcdefgh"), tmp_path / "base")
    save_chat_model(GPT(tiny_config(n_layer=2)), CHAT, tmp_path / "chat")
    write(tmp_path / "chats.jsonl", [{"prompt": "ab", "response": "c"}] * 12)
    write(tmp_path / "ranked.jsonl", [{"prompt": text, "chosen": "c", "rejected": "de"} for text in "abcdefgh"])
    write(tmp_path / "labels.jsonl", [{"text": "abc"[: i % 3 + 1], "label": "xy"[i % 2]} for i in range(12)])
    write(tmp_path / "pairs.jsonl", [{"source": "abcdefgh"[: i % 5 + 1], "target": "ab" * (i % 3)} for i in range(12)])
    colours = ("red", "blue", "white")
    for colour in colours:
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    pictures = [{"image": f"{colour}.png", "label": "abc"[i]} for i, colour in enumerate(colours)]
    write(tmp_path / "pictures.jsonl", [{**row, "prompt": "ab", "response": row["label"]} for row in pictures * 4])
    (tmp_path / "new.toml").write_text("image_size = 8\npatch_size = 4\nn_layer = 1\nn_head = 2\nn_embd = 16\n")
    write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("a", "bcd", "ef", "aab", "h", "gg", "c")])
    (tmp_path / "rules.py").write_text("def length(rows, responses): return [float(len(text)) for text in responses]\n")
    return tmp_path


IMAGES = ("--train=pictures.jsonl", "--val_fraction=0", "--image_encoder=new.toml")
RANKED = ("chat", "--train=ranked.jsonl", "--val_fraction=0", "--gradient_accumulation_steps=1")
STAGES = {
    "sft": ("sft", "base", "--train=chats.jsonl"),
    "finetune": ("finetune", "base", "--train=labels.jsonl", "--val=labels.jsonl"),
    "dpo": ("dpo", *RANKED),
    "reward": ("reward", *RANKED),
    "translate": ("translate", "--train=pairs.jsonl", "--n_layer=2", "--encoder_layers=2", "--n_embd=32", "--n_head=2"),
    "sft, images": ("sft", "base", *IMAGES),
    "sft, images seen both ways": ("sft", "base", *IMAGES, "--prefix_attention=True"),
    "pretrain_encoder, labels": ("pretrain_encoder", *IMAGES),
    "pretrain_encoder, captions": ("pretrain_encoder", *IMAGES, "--text_model=base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_an_update_of_a_stage_waits_once(name, stage_folder):
    updates = measure("stage", *STAGES[name], "--epochs=1", "--batch_size=4", folder=stage_folder)
    assert len(updates) > 1
    for update in updates[1:]:
        assert sum(update["waits"].values()) == 1, update["waits"]


@pytest.mark.slow
@pytest.mark.parametrize("target", [75, 90])
def test_sft_keeps_packed_conversations_apart_by_flash_attention(target, stage_folder):
    """Before the A100 there is none, and a mask keeps them apart."""
    updates = measure("stage", *STAGES["sft"], "--epochs=1", "--batch_size=4", target=target, folder=stage_folder)
    flash = updates[1]["operators"].get("torch_attn._varlen_attn.default", 0)
    assert flash == (2 if target == 90 else 0)


@pytest.mark.slow
def test_ppo_waits_once_a_token_and_an_update(stage_folder):
    """Two iterations of two updates; each iteration writes 16 responses of 5 tokens in one compiled graph."""
    updates = measure(
        "stage", "ppo", "chat", "--prompts=prompts.jsonl", "--reward=rules:length", "--episodes=32", "--batch_size=4",
        "--gradient_accumulation_steps=2", "--minibatches=2", "--max_new_tokens=5", "--compile", folder=stage_folder
    )  # fmt: skip
    assert [(update["graphs"], update["breaks"]) for update in updates] == [(1, 0)] * 4
    writing = [sum(n for line, n in update["waits"].items() if "decoding/" in line) for update in updates]
    assert writing == [5, 0, 5, 0]
    for update in updates[1::2]:
        assert sum(update["waits"].values()) == 1, update["waits"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("translation", TRANSLATION), ("images", {}), ("encoder", {})], ids=str)
def test_models_with_an_encoder_compile_to_one_graph(kind, settings):
    """Their stages don't compile them."""
    update = measure("step", {"n_layer": 2} | settings, 2, {}, kind, kernels="none")
    assert (update["graphs"], update["breaks"]) == (1, 0)
    assert sum(update["waits"].values()) == 1, update["waits"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"n_experts": 4}], ids=str)
def test_both_passes_can_be_cuda_graphs(config):
    result = measure("graphs", {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 300} | config)
    assert (result["failure"], result["handed"], result["skipped"]) == (None, 2, 0)
    assert (result["graphs"], result["breaks"]) == (1, 0) and sum(result["waits"].values()) == 2
