"""Reading and writing transformers' models, against the library itself, from random weights."""

import dataclasses
import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError
from gpt_arc.nn.meta import meta_device
from gpt_arc.training.config import build_config, read_settings
from gpt_arc.weights.directory import REPLACEABLE, load_config, load_model, model_directory, save_model
from gpt_arc.weights.huggingface import ARCHITECTURES, architecture_of, config_from_hf, hf_config, hf_tensors
from helpers import ROOT, randomised
from model import GPT, GPTConfig

ENDS = {"bos_token_id": 1, "eos_token_id": 2}
NO_END = {"bos_token_id": None, "eos_token_id": None}
GPT2, GPT1, QWEN3 = transformers.GPT2Config, transformers.OpenAIGPTConfig, transformers.Qwen3Config
MIXTRAL, LLAMA = transformers.MixtralConfig, transformers.LlamaConfig
SMALL = dict(vocab_size=23, n_positions=80, n_embd=32, n_layer=2, n_head=4, **NO_END)
QWEN_SMALL = dict(vocab_size=31, hidden_size=32, intermediate_size=44, num_hidden_layers=2, max_position_embeddings=80)
MIXTURE = dict(norm="rmsnorm", positions="rotary", activation="swiglu", bias=False, n_experts=4)
ROPE = {"rope_type": "default", "rope_theta": 5_000.0}
MODELS = {
    "gpt2": GPT2(**SMALL),
    "gpt2-erf-untied": GPT2(**SMALL | {"n_layer": 3, "n_head": 3, "n_embd": 48, "vocab_size": 101, **ENDS},
                            activation_function="gelu", n_inner=50, tie_word_embeddings=False, resid_pdrop=0.2),
    "gpt2-odd": GPT2(**SMALL | {"n_layer": 1, "n_head": 5, "n_embd": 35, "vocab_size": 7, "n_positions": 77},
                     activation_function="relu", n_inner=9, layer_norm_epsilon=1e-3),
    "gpt1": GPT1(**SMALL),
    "gpt1-odd": GPT1(**SMALL | {"n_layer": 3, "n_head": 3, "n_embd": 21, "vocab_size": 90, **ENDS}, afn="relu",
                     layer_norm_epsilon=1e-3, tie_word_embeddings=False, embd_pdrop=0.0),
    "qwen3-tied": QWEN3(**QWEN_SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=10, rope_parameters=ROPE,
                        tie_word_embeddings=True),
    "qwen3-untied": QWEN3(**QWEN_SMALL, num_attention_heads=4, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-4,
                          attention_dropout=0.1, **ENDS),
    "qwen3-ungrouped": QWEN3(**QWEN_SMALL | {"num_hidden_layers": 1, "hidden_size": 30}, num_attention_heads=3,
                             num_key_value_heads=3, head_dim=16),
    "mixtral": MIXTRAL(**QWEN_SMALL, num_attention_heads=4, num_key_value_heads=2, **NO_END),
    "mixtral-tied": MIXTRAL(**QWEN_SMALL | {"num_hidden_layers": 3, "intermediate_size": 20}, num_attention_heads=6,
                            num_key_value_heads=1, head_dim=10, num_local_experts=5, num_experts_per_tok=3,
                            tie_word_embeddings=True, rope_parameters=ROPE, rms_norm_eps=1e-4, attention_dropout=0.1,
                            router_aux_loss_coef=0.02, router_jitter_noise=0.01, **ENDS),
    "mixtral-all": MIXTRAL(**QWEN_SMALL, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, **NO_END),
}  # fmt: skip

LLAMA_SMALL = {**QWEN_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, **NO_END}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5_000.0, "original_max_position_embeddings": 40}
STRETCHED = {
    "linear": (LLAMA, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "dynamic": (LLAMA, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    "dynamic-qwen3": (QWEN3, {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e4}),
    "llama3": (LLAMA, {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": 40}),
    "yarn": (LLAMA, YARN | {"beta_fast": 32.0, "beta_slow": 1.0}),
    "yarn-qwen3": (QWEN3, YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.3}),
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", STRETCHED)
def test_stretched_rotary_positions_equal_transformers(name, spelling):
    """At four times the trained context, from configs as transformers 5 and as transformers 4 write them."""
    kind, rope = STRETCHED[name]
    reference = randomised(transformers.AutoModelForCausalLM.from_config(kind(**LLAMA_SMALL, rope_parameters=rope)))
    content = reference.config.to_dict()
    if spelling == "rope_scaling":
        old = dict(content.pop("rope_parameters"))
        content |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": {"type": old.pop("rope_type")} | old}
    config = dataclasses.replace(config_from_hf(content), block_size=320)
    model = GPT(config)
    state = dict(reference.state_dict())
    for ours, tensor in model.state_dict().items():
        parts = ARCHITECTURES[content["model_type"]].parts_of(ours, tensor.shape, config)
        tensor.copy_(torch.cat([state["model." + part.name] for part in parts]))
    tokens = torch.randint(31, (2, 320), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for length in (7, 80, 320):
            logits = model.eval()(tokens[:, :length])
            torch.testing.assert_close(logits, reference(tokens[:, :length]).logits, atol=1e-5, rtol=1e-5)
    written = hf_config(config_from_hf(content))
    assert written["rope_parameters"] == reference.config.to_dict()["rope_parameters"]
    assert written["max_position_embeddings"] == 80 and config_from_hf(written) == config_from_hf(content)


def test_ntk_is_exported_as_a_larger_base():
    settings = dict(norm="rmsnorm", positions="rotary", activation="swiglu", bias=False)
    stretched = randomised(GPT(GPTConfig(64, 11, 2, 4, 16, **settings, rotary_scaling="ntk", rotary_factor=8.0)))
    plain = GPT(config_from_hf(hf_config(stretched.config))).eval()
    plain.load_state_dict(stretched.state_dict())
    assert plain.config.rotary_base == 10_000.0 * 8**2
    tokens = torch.randint(11, (1, 64))
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens), stretched(tokens), atol=1e-5, rtol=1e-5)


def test_yarn_s_factors_may_follow_from_the_contexts_and_from_mscale():
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 20, "mscale": 0.7, "mscale_all_dim": 0.2}
    content = {"model_type": "llama", "max_position_embeddings": 80, "rope_parameters": rope | {"factor": None}}
    config = config_from_hf(content)
    expected = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](
        LLAMA(max_position_embeddings=80, rope_parameters=rope | {"factor": 4.0})
    )[1]
    assert (config.rotary_factor, config.rotary_context) == (4.0, 20)
    assert config.rotary_attention_factor == pytest.approx(expected)


@pytest.fixture(scope="module")
def hf_models(tmp_path_factory):
    """transformers' models, and the folders that its save_pretrained wrote."""
    root, models_and_folders = tmp_path_factory.mktemp("hf_models"), {}
    for name, config in MODELS.items():
        scale = 0.15 if "mixtral" in name else 0.3  # products of three large numbers lose precision
        model = randomised(transformers.AutoModelForCausalLM.from_config(config), scale=scale)
        model.save_pretrained(root / name)
        models_and_folders[name] = model, root / name
    return models_and_folders


@pytest.fixture
def copy(hf_models, tmp_path):
    """A copy of a model's folder, to be damaged."""

    def make(name):
        return shutil.copytree(hf_models[name][1], tmp_path / name)

    return make


def equals_folder(model, reference_folder):
    reference = load_model(reference_folder)[0].state_dict()
    return all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_continuations_equal_transformers(hf_models, name):
    reference, folder = hf_models[name]
    model, tokenizer = load_model(folder)
    assert tokenizer is None and model.training
    model.eval()
    vocab, context = model.config.vocab_size, model.config.block_size
    tokens = torch.randint(vocab, (3, context), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)
    prompt = tokens[:, :5]
    greedy = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=48,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens_by_step = [step.tokens for step in generate(model, prompt, 48, Sampling(temperature=0))]
    assert torch.equal(torch.tensor(tokens_by_step).T, greedy[:, 5:])


@pytest.mark.parametrize("name", MODELS)
def test_reading_and_writing_changes_nothing(hf_models, name):
    reference, folder = hf_models[name]
    model, _ = load_model(folder)
    written, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config = hf_config(model.config, "float32", reference.config.bos_token_id, reference.config.eos_token_id)
    assert config | {"transformers_version": transformers.__version__} == written
    assert config_from_hf(config) == model.config
    back = dict(hf_tensors(model))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in back.items())


@pytest.mark.parametrize("config", [GPT2(), GPT1(), QWEN3(), MIXTRAL()], ids=lambda config: config.model_type)
def test_absent_keys_have_transformers_defaults(config):
    """Writing the defaults gives transformers' config, key for key."""
    gpt_config = config_from_hf({"model_type": config.model_type})
    written = hf_config(gpt_config, start_token=config.bos_token_id, end_of_text=config.eos_token_id)
    expected = config.to_dict()
    for content in (written, expected):
        for key in ("architectures", "dtype", "transformers_version"):
            content.pop(key)
    assert written == {key: expected[key] for key in written}


@pytest.mark.parametrize(("kind", "parameters"), [("openai-gpt", 116_534_784), ("gpt2", 124_439_808)])
def test_published_models_have_their_published_sizes(kind, parameters):
    with meta_device():
        assert GPT(config_from_hf({"model_type": kind})).num_parameters() == parameters


def test_gpt2_s_published_config():
    content = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    }  # fmt: skip
    assert config_from_hf(content) == GPTConfig(dropout=0.1)


@pytest.mark.parametrize(
    ("kind", "content", "sentence"),
    [
        (
            "mistral",
            {},
            'model_type = "mistral" is not a supported architecture: choose one of gpt2, openai-gpt, qwen3, llama, mix',
        ),
        ("gpt2", {"activation_function": "silu"}, 'activation_function = "silu" can\'t be computed for a gpt2'),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = true"),
        ("gpt2", {"quantization_config": {"bits": 4}}, 'quantization_config = {"bits": 4}'),
        ("gpt2", {"n_head": 5}, "n_head = 5 does not divide n_embd = 768"),
        ("gpt2", {"n_embd": "wide"}, "doesn't describe a valid model"),
        ("openai-gpt", {"afn": "silu"}, 'afn = "silu"'),
        ("qwen3", {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ("qwen3", {"attention_bias": True}, "attention_bias = true"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = true"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "qwen3: only the rope_types default, lin",
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, '"truncate": false'),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5 must be"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": "two"}}, 'factor = "two" must be'),
        ("qwen3", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type = "),
        ("qwen3", {"rope_scaling": {"type": "dynamic"}}, 'rope_scaling = {"type": "dynamic", '),
        (
            "qwen3",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1}},
            "beta_fast = 1.0 must be more than",
        ),
        ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": "no"}}, 'beta_slow = "no"'),
        ("qwen3", {"partial_rotary_factor": 0.5}, '"partial_rotary_factor": 0.5'),
        ("llama", {"attention_bias": True}, "attention_bias = true"),
        ("llama", {"mlp_bias": True}, "mlp_bias = true"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks high_freq_factor"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window = 4096 can't be computed for a mixtral"),
        ("mixtral", {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 can't be computed for a mixtral"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 must lie between 1 and num_local_experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts = 0 can't be computed for a mixtral"),
        ("mixtral", {"router_aux_loss_coef": "small"}, 'router_aux_loss_coef = "small"'),
        ("mixtral", {"rope_scaling": {"rope_type": "proportional"}}, "mixtral: only the rope_types default, linear"),
    ],
)
def test_unsupported_configs_are_refused(kind, content, sentence):
    with pytest.raises(UserError) as refusal:
        config_from_hf({"model_type": kind, **content})
    assert sentence in str(refusal.value)


def test_keys_are_honoured():
    qwen3 = config_from_hf({"model_type": "qwen3", "rope_theta": 1e6, "num_key_value_heads": 8, "rope_scaling": None})
    assert (qwen3.rotary_base, qwen3.kv_heads, qwen3.head_width) == (1e6, 8, 128)
    assert config_from_hf({"model_type": "qwen3", "rope_parameters": {"rope_theta": 7.0}}).rotary_base == 7.0
    gpt2 = config_from_hf({"model_type": "gpt2", "hidden_size": 96, "activation_function": "gelu_pytorch_tanh"})
    assert (gpt2.n_embd, gpt2.activation, gpt2.dropout) == (96, "gelu_tanh", 0.1)
    assert config_from_hf({"model_type": "gpt2", "attn_pdrop": 0}).attention_dropout == 0
    assert config_from_hf({"model_type": "openai-gpt", "afn": "relu"}).activation == "relu"
    llama = config_from_hf(
        {"model_type": "llama", "num_key_value_heads": 4, "hidden_size": 96, "num_attention_heads": 8}
    )
    assert (llama.kv_heads, llama.head_width, llama.mlp_width, llama.qk_norm) == (4, 12, 11008, False)
    mixtral = config_from_hf({"model_type": "mixtral", "num_experts": 6, "rope_theta": 5.0})
    assert (mixtral.n_experts, mixtral.rotary_base, mixtral.head_width, mixtral.router_z_loss) == (6, 5.0, 128, 0.0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"norm": "rmsnorm"}, 'no norm = "rmsnorm"'),
        ({"positions": "sinusoidal"}, 'gpt2, has no positions = "sinusoidal"'),
        ({"positions": "alibi"}, 'gpt2, has no positions = "alibi"'),
        ({"positions": "none"}, 'gpt2, has no positions = "none"'),
        (dict(norm="rmsnorm", positions="rotary", activation="swiglu", qk_norm=True), "qwen3, has no bias = true"),
        ({"head_bias": True}, "no head_bias = true"),
        ({"qk_norm": True}, "no qk_norm = true"),
        ({"n_kv_head": 2}, "no n_kv_head = 2"),
        ({"ngrams": 2}, "no ngrams = 2"),
        ({"head_size": 6}, "no head_size = 6"),
        ({"activation": "swiglu"}, 'no activation = "swiglu"'),
        ({"norm_position": "post", "mlp_size": 7}, 'gpt2, has no norm_position = "post"'),
        ({"norm_position": "post", "activation": "gelu", "mlp_size": 7}, 'gpt2, has no norm_position = "post"'),
        ({"attention_band": 4}, "no attention_band = 4"),
        (dict(norm="rmsnorm", positions="rotary", activation="swiglu"), "llama, has no bias = true"),
        (dict(norm="rmsnorm", positions="rotary", bias=False, qk_norm=True), 'qwen3, has no activation = "gelu_tanh"'),
        ({"n_experts": 4}, 'mixtral, has no norm = "layernorm" and no '),
        (MIXTURE | {"bias": True}, "mixtral, has no bias = true"),
        (MIXTURE | {"activation": "gelu"}, 'mixtral, has no activation = "gelu"'),
        (MIXTURE | {"qk_norm": True}, "mixtral, has no qk_norm = true"),
        (MIXTURE | {"attention_band": 4}, "mixtral, has no attention_band = 4"),
        (MIXTURE | {"experts_per_token": 1}, "mixtral, has no experts_per_token = 1"),
        (MIXTURE | {"expert_interval": 2}, "mixtral, has no expert_interval = 2"),
        (MIXTURE | {"shared_experts": 1}, "mixtral, has no shared_experts = 1"),
        (MIXTURE | {"capacity_factor": 1.25}, "mixtral, has no capacity_factor = 1.25"),
        (MIXTURE | {"balance_rate": 0.001}, "mixtral, has no balance_rate = 0.001"),
    ],
)
def test_models_without_an_architecture_in_transformers_are_refused(settings, sentence):
    config = GPTConfig(8, 11, 2, 4, 16, **settings)
    with pytest.raises(UserError) as refusal:
        architecture_of(config)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt1", "openai-gpt"),
        ("gpt2", "gpt2"),
        ("gpt2_xl", "gpt2"),
        ("tinyshakespeare", "gpt2"),
        ("modern", "qwen3"),
        ("llama", "llama"),
        ("moe", "mixtral"),
        ("mixtral_8x7b", "mixtral"),
    ],
)
def test_the_presets_map_to_architectures(name, kind):
    path = ROOT / "configs" / f"{name}.toml"
    assert architecture_of(build_config(read_settings(path), str(path)).model) == kind


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("moe", 284_057_088, 114_187_776), ("mixtral_8x7b", 46_702_792_704, 12_879_925_248)],
)
def test_the_mixtures_have_their_stated_sizes(name, total, active):
    path = ROOT / "configs" / f"{name}.toml"
    with meta_device():
        model = GPT(build_config(read_settings(path), str(path)).model)
    assert (model.num_parameters(), model.num_parameters(active=True)) == (total, active)
    assert f"{total:,} parameters" in path.read_text() and f"{active:,}" in path.read_text()


def test_mixtral_s_published_config():
    content = {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 32000,
    }  # fmt: skip
    path = ROOT / "configs" / "mixtral_8x7b.toml"
    preset = build_config(read_settings(path), str(path)).model
    assert config_from_hf(content) == dataclasses.replace(preset, balance_loss=0.02 * 2 / 32, router_z_loss=0.0)


def test_the_balance_loss_equals_transformers_for_equal_layers(tmp_path):
    """transformers: k at even use, over all layers as one batch. Here: 1 per layer, summed."""
    sizes = dict(num_local_experts=6, num_experts_per_tok=3, router_aux_loss_coef=0.05)
    config = MIXTRAL(**QWEN_SMALL, num_attention_heads=4, num_key_value_heads=2, **sizes)
    reference = randomised(transformers.AutoModelForCausalLM.from_config(config))
    layer_1, layer_2 = reference.model.layers
    with torch.no_grad():
        for layer in (layer_1, layer_2):  # the layers add nothing, so both routers read the same
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
        layer_2.mlp.gate.weight.copy_(layer_1.mlp.gate.weight)
        layer_2.post_attention_layernorm.weight.copy_(layer_1.post_attention_layernorm.weight)
    reference.save_pretrained(tmp_path)
    tokens = torch.randint(31, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = 0.05 * reference(tokens, output_router_logits=True).aux_loss
    model, _ = load_model(tmp_path)
    auxiliary = model(tokens, tokens).auxiliary
    assert model.config.balance_loss == pytest.approx(0.05 * 3 / 2) and auxiliary.keys() == {"balance"}
    torch.testing.assert_close(auxiliary["balance"], expected)
    expected.backward()
    auxiliary["balance"].backward()
    for block, layer in zip(model.blocks, (layer_1, layer_2)):
        torch.testing.assert_close(block.mlp.router.weight.grad, layer.mlp.gate.weight.grad)


@pytest.mark.parametrize("weight", [0.01, 0.02, 1e-3, 0.0, 1 / 3])
def test_the_balance_loss_weight_survives_a_round_trip(weight):
    config = GPTConfig(8, 11, 7, 2, 16, **MIXTURE, experts_per_token=3, balance_loss=weight)
    written = hf_config(config)
    assert written["router_aux_loss_coef"] == pytest.approx(weight * 7 / 3)
    assert config_from_hf(written).balance_loss == pytest.approx(weight, rel=1e-15)
    content = {"model_type": "mixtral", "router_aux_loss_coef": weight, "num_hidden_layers": 7}
    assert hf_config(config_from_hf(content))["router_aux_loss_coef"] == pytest.approx(weight, rel=1e-15)


@pytest.mark.parametrize("name", ["mixtral", "mixtral-tied"])
def test_experts_stored_in_one_tensor_load(hf_models, copy, name):
    reference, folder = hf_models[name]
    fused = copy(name)
    (fused / "model.safetensors").unlink()
    state = {
        key: tensor for key, tensor in reference.state_dict().items() if key != "lm_head.weight" or name == "mixtral"
    }
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    save_file(state, fused / "model.safetensors")
    assert equals_folder(load_model(fused)[0], folder)
    state["model.layers.0.mlp.experts.down_proj"] = torch.zeros(2, 3, 4)
    save_file(state, fused / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.0.mlp.experts.down_proj has the shape \(2, 3, 4\), not \("):
        load_model(fused)
    del state["model.layers.0.mlp.experts.down_proj"]
    save_file(state, fused / "model.safetensors")
    with pytest.raises(UserError, match="lacks the tensor model.layers.0.mlp.experts.down_proj$"):
        load_model(fused)


def test_default_sizes_may_be_set_explicitly():
    assert architecture_of(GPTConfig(8, 11, 2, 4, 16, n_kv_head=4, head_size=4, mlp_size=64, rotary_base=3.0)) == "gpt2"
    assert architecture_of(GPTConfig(8, 11, 2, 4, 16, norm_position="post", mlp_size=64)) == "openai-gpt"


@pytest.mark.parametrize("name", ["gpt2", "gpt1-odd", "qwen3-tied", "mixtral-tied"])
def test_shards_and_names_without_the_prefix_load(hf_models, copy, name):
    reference, folder = hf_models[name]
    sharded = copy(name)
    (sharded / "model.safetensors").unlink()
    reference.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert equals_folder(load_model(sharded)[0], folder)
    shutil.rmtree(sharded)
    bare = copy(name)  # as in the hub's gpt2, including buffers
    tensors = load_file(folder / "model.safetensors")
    tensors = {key.removeprefix("transformer.").removeprefix("model."): tensor for key, tensor in tensors.items()}
    extra = {"h.0.attn.bias": torch.ones(1, 1, 80, 80), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    extra["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    if name != "gpt1-odd":
        embedding = "wte.weight" if name == "gpt2" else "embed_tokens.weight"
        extra["lm_head.weight"] = tensors[embedding].clone()
    save_file(tensors | extra, bare / "model.safetensors")
    assert equals_folder(load_model(bare)[0], folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_load_as_float32(hf_models, copy, dtype):
    folder = copy("qwen3-tied")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    model, _ = load_model(folder)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    expected = tensors["model.norm.weight"].to(dtype).float()
    assert torch.equal(model.final_norm.weight, expected)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("gpt2", lambda t: t.pop("transformer.h.1.mlp.c_fc.weight"), "the tensor transformer.h.1.mlp.c_fc.weight"),
        ("qwen3-untied", lambda t: t.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        ("qwen3-tied", lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"), "model.layers.0.self_attn.k_proj"),
        ("gpt2", lambda t: t.update(extra=torch.zeros(2)), "model.safetensors has the unexpected tensor extra"),
        ("gpt2", lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(2)}), "tensor transformer.h.2.ln_1.bias"),
        ("gpt2", lambda t: t.update({"transformer.h.1.attn.c_attn.weight": torch.zeros(96, 32)}),
         "transformer.h.1.attn.c_attn.weight has the shape (96, 32), not (32, 96)"),
        ("qwen3-tied", lambda t: t.update({"model.layers.1.self_attn.v_proj.weight": torch.zeros(60, 32)}),
         "v_proj.weight has the shape (60, 32), not (20, 32)"),
        ("mixtral", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.7.w3.weight"),
         "lacks the tensor model.layers.1.block_sparse_moe.experts.7.w3.weight"),
        ("mixtral", lambda t: t.update({"model.layers.1.block_sparse_moe.experts.8.w3.weight": torch.zeros(44, 32)}),
         "unexpected tensor model.layers.1.block_sparse_moe.experts.8.w3.weight"),
        ("gpt2", lambda t: t.update({"wpe.weight": torch.zeros(80, 32)}), "remove one of them"),
        ("gpt2", lambda t: t.update({"lm_head.weight": torch.zeros(23, 32)}), "lm_head.weight differs from the embed"),
        ("gpt2", lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}), "has the type I8"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(copy, name, change, sentence):
    folder = copy(name)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        load_model(folder)
    assert sentence in str(refusal.value) and str(folder) in str(refusal.value)


def test_damaged_missing_and_pickled_files_are_named(copy, hf_models):
    folder = copy("gpt1")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:1000], whole[:-1], b"\xff" * 8 + whole[8:], whole[:9] + b"#" + whole[10:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="model.safetensors is damaged"):
            load_model(folder)
    path.unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="no model.safetensors, only pytorch_model.bin, a pickle"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json is damaged"):
        load_model(folder)
    hf_models["gpt1"][0].save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        load_model(folder)


def test_a_refused_config_is_named_with_its_file(copy):
    folder = copy("gpt2")
    (folder / "config.json").write_text('{"model_type": "gpt2", "add_cross_attention": true}')
    with pytest.raises(UserError, match="config.json: add_cross_attention = true"):
        load_model(folder)


@pytest.mark.parametrize("name", ["gpt2", "ours"])
def test_only_context_and_dropout_may_be_replaced(hf_models, tmp_path, name):
    folder = hf_models["gpt2"][1]
    if name == "ours":
        save_model(load_model(folder)[0], None, tmp_path / "ours")
        folder = tmp_path / "ours"
    stored = load_config(folder)
    assert load_config(str(folder)) == stored and stored.dropout == 0.1
    whole, _ = load_model(folder)
    config = dataclasses.replace(stored, block_size=9, dropout=0.0, attention_dropout=0.5)
    model, _ = load_model(folder, config)
    assert model.config == config and model.position_embedding.weight.shape == (9, 32)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), whole.eval()(tokens))
    assert model.position_embedding.weight.untyped_storage().nbytes() == 9 * 32 * 4  # the other rows are freed
    for change, sentence in (
        ({"block_size": 81}, "block_size = 81 is more than the 80 positions learned"),
        ({"norm_eps": 1e-3}, "norm_eps = 0.001 contradicts the model"),
        ({"n_layer": 3}, "n_layer = 3 contradicts the model .* has 2"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_model(folder, dataclasses.replace(stored, **change))


def test_rotary_models_take_any_context(hf_models):
    folder = hf_models["qwen3-tied"][1]
    config = dataclasses.replace(load_config(folder), block_size=200)
    assert load_model(folder, config)[0](torch.zeros(1, 200, dtype=torch.int64)).shape == (1, 200, 31)


def test_a_vocabulary_may_be_padded_beyond_its_tokenizer(copy):
    folder = copy("gpt2")
    CharTokenizer("abc").save(folder)
    model, tokenizer = load_model(folder)
    assert (model.config.vocab_size, tokenizer.vocab_size) == (23, 3)
    assert tokenizer.decode([0, 22, 1]) == "ab"  # ids of the padding have no text
    CharTokenizer([chr(i) for i in range(24)]).save(folder)
    with pytest.raises(UserError, match="belongs to another model: it has 24 tokens, the model 23"):
        load_model(folder)


def test_hub_models_are_downloaded_by_name(hf_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    downloads = []

    def download(repository, allow_patterns):
        downloads.append((repository, allow_patterns))
        return str(hf_models["gpt2"][1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_config("gpt2") == load_model("gpt2")[0].config
    assert downloads[0] == ("openai-community/gpt2", ["config.json"])
    assert downloads[1][0] == "openai-community/gpt2" and "model.safetensors" in downloads[1][1]
    assert not any(pattern.endswith((".bin", ".py", ".h5")) for pattern in downloads[1][1])
    assert model_directory("openai-gpt") == hf_models["gpt2"][1] and downloads[2][0] == "openai-community/openai-gpt"
    assert load_model("hf:someone/something")[0].config.n_layer == 2 and downloads[3][0] == "someone/something"
    shutil.copytree(hf_models["gpt1"][1], tmp_path / "gpt2")
    assert load_model("gpt2")[0].config.norm_position == "post" and len(downloads) == 4  # the local folder comes first
    with pytest.raises(
        UserError, match="no model directory out/typo.*gpt2-xl; name any other as hf:OWNER/NAME; `.*runs.*` lists"
    ):
        load_model("out/typo")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LocalEntryNotFoundError("Got: ConnectError"), "openai-community/gpt2 can't be downloaded: connect once"),
        (HFValidationError("bad"), "the Hugging Face hub has no public model openai-community/gpt2"),
        (ConnectionError(), "can't be downloaded: connect once, or name a folder that holds its files"),
    ],
)
def test_a_failed_download_is_reported_in_one_sentence(monkeypatch, tmp_path, error, sentence):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=sentence) as refusal:
        load_model("gpt2")
    assert "\n" not in str(refusal.value)


def test_tables_name_existing_settings():
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    for architecture in ARCHITECTURES.values():
        assert architecture.ours.keys() <= names
        assert {name for name, _ in (architecture.sizes | architecture.dropouts).values()} <= names
    assert REPLACEABLE <= names
