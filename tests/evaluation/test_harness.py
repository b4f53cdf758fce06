"""The lm-evaluation-harness on our models against its own transformers adapter on their exports."""

import functools
import json
import os
import subprocess
import sys

import lm_eval.__main__
import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.harness import HarnessModel
from gpt_arc.harness import main
from gpt_arc.weights.directory import save_model
from helpers import TEXT, randomised, run_python
from model import GPT, GPTConfig
from tools import export

PROSE = "The cat sat on the mat, and didn't it purr? Nobody knows; naïve dogs bark at 漢字.\n\nA new line. "
PROSE += TEXT[:400]
WORDS = [word for word in PROSE.replace("\n", " ").split(" ") if word]
CONTEXT = 48


def words(start, count):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


CHOICES = [  # contexts up to several times the model's, some ending in white space; options of unequal lengths
    {
        "query": words(7 * n, 1 + n * 4) + (" " if n % 5 == 0 else ""),
        "options": [words(11 * n + 1 + 9 * k, 1 + (n + k) % 4) for k in range(4)],
        "gold": 0,  # the true continuation
    }
    for n in range(24)
]
LAST_WORDS = [{"text": words(5 * n, 2 + 6 * n)} for n in range(12)] + [{"text": WORDS[0]}]
PAGES = [{"page": words(3 * n, count)} for n, count in enumerate([1, 4, 20, 90, 300])] + [{"page": PROSE}]
QUESTIONS = [{"question": words(3 * n, 1 + 2 * n), "answer": "x"} for n in range(6)]
COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
TASKS = {
    "options": (CHOICES, {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}", "doc_to_choice": "{{options}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }),
    "last_word": (LAST_WORDS, {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }),
    "pages": (PAGES, {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }),
    "answers": (QUESTIONS, {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "ing"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }),
}  # fmt: skip


def trained(tokenizer, steps=100):
    """Returns a GPT-2 trained on PROSE just enough that some of its answers are right."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=CONTEXT, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32)
    model, tokens = GPT(config), torch.tensor(tokenizer.encode(PROSE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    windows = tokens.unfold(0, CONTEXT + 1, 1)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (16,))]
        loss = model(batch[:, :-1], batch[:, 1:])
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with our GPT-2, its export for transformers, and the tasks as harness files."""
    root = tmp_path_factory.mktemp("harness")
    tokenizer = BPETokenizer.train([PROSE], 300)
    save_model(trained(tokenizer), tokenizer, root / "ours")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tools/export.py", str(root / "ours"), str(root / "exported"), "--to=hf"])
        export.main()
    (root / "tasks").mkdir()
    for name, (rows, task) in TASKS.items():
        data = root / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(root / "cache")}
        content = {"task": name, "dataset_kwargs": files, **COMMON, **task}
        (root / "tasks" / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return root


def evaluated(model, root):
    """Returns the harness's results for a model: each task's metrics, and the answer to each request."""
    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    output = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    answers = {name: [sample["resps"] for sample in output["samples"][name]] for name in TASKS}
    return output["results"], answers


@pytest.fixture(scope="module")
def hf_evaluation(places):
    folder = str(places / "exported")
    return evaluated(HFLM(folder, device="cpu", dtype="float32", batch_size=4), places)


def flat(answers):
    """Returns the answers of a task as a flat list, however deep the harness nests them."""
    if isinstance(answers, (list, tuple)) and not (len(answers) == 2 and isinstance(answers[1], bool)):
        return [leaf for answer in answers for leaf in flat(answer)]
    return [answers]


def logs_of(answers):
    """Returns the log-probabilities in nats of a task's answers."""
    return [float(answer[0] if isinstance(answer, (list, tuple)) else answer) for answer in flat(answers)]


@pytest.mark.parametrize("batch_tokens", [1, 300])
def test_every_kind_of_task_equals_the_harness_s_adapter(places, hf_evaluation, batch_tokens):
    model = HarnessModel(places / "ours", device="cpu", batch_tokens=batch_tokens)
    results, answers = evaluated(model, places)
    expected, right = hf_evaluation
    largest = 0.0  # nats
    for name in ("options", "last_word", "pages"):
        assert len(flat(answers[name])) == {"options": 4 * len(CHOICES)}.get(name, len(TASKS[name][0]))
        for log, reference in zip(logs_of(answers[name]), logs_of(right[name]), strict=True):
            largest = max(largest, abs(log - reference))
    print(f"the largest difference of log-probabilities is {largest:.1e} nats")
    assert largest < 1e-4
    greedy, greedy_reference = ([answer[1] for answer in flat(each["last_word"])] for each in (answers, right))
    assert greedy == greedy_reference and len(set(greedy)) == 2
    assert answers["answers"] == right["answers"] and any(flat(answers["answers"]))
    for name in TASKS:
        for metric, value in expected[name].items():
            exact = isinstance(value, str) or metric.startswith(("acc", "exact"))
            assert results[name][metric] == (value if exact else pytest.approx(value, rel=1e-5)), (name, metric)
    assert 0.25 < results["options"]["acc,none"] < 1


def instances(kind, *arguments):
    """Returns requests in the harness's form."""
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def adapter(places):
    return HarnessModel(str(places / "ours"), device="cpu")


def test_an_empty_context_becomes_the_end_of_text_token(adapter):
    end, text = adapter.text_tokenizer.end_of_text, "The cat"
    (log, _), (expected, _) = adapter.loglikelihood(
        instances("loglikelihood", ("", text)), disable_tqdm=True
    ) + adapter._loglikelihood_tokens([(("", ""), [end], adapter.tok_encode(text))], disable_tqdm=True)
    [rolling] = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert log == expected == pytest.approx(rolling, abs=1e-5)
    assert adapter.loglikelihood_rolling(instances("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0.0]


def test_a_continuation_longer_than_the_context_is_refused(adapter):
    with pytest.raises(UserError, match=f"option 0: a continuation of [0-9]+ tokens exceeds the context of {CONTEXT}"):
        adapter.loglikelihood(instances("loglikelihood", ("The", words(0, 100))), disable_tqdm=True)


def drawn(adapter, contexts, **settings):
    requests = [(context, settings) for context in contexts]
    return adapter.generate_until(instances("generate_until", *requests), disable_tqdm=True)


def plain(adapter, context, length, sampling):
    """Returns the text that `generate` produces after one context."""
    prompt = adapter.tok_encode(context) or [adapter.prefix_token_id]
    generated = [step.tokens[0] for step in generate(adapter.model, [prompt], length, sampling)]
    end = adapter.eot_token_id
    tokens = generated[: generated.index(end)] if end in generated else generated
    return adapter.text_tokenizer.decode(tokens)


def test_greedy_continuations_end_before_the_first_stop(adapter):
    contexts = ["The cat", "", "2 times 3 is", words(0, 5)]
    whole = drawn(adapter, contexts, until=[], max_gen_toks=20)
    assert whole == [plain(adapter, context, 20, Sampling(temperature=0)) for context in contexts]
    stop = whole[0][3:5]
    for text, whole_text in zip(drawn(adapter, contexts, until=["\0", stop, ""], max_gen_toks=20), whole):
        assert text == whole_text.split(stop)[0]
    assert drawn(adapter, contexts, until=stop, max_new_tokens=20)[0] == whole[0].split(stop)[0]


def test_a_long_context_leaves_room_and_a_long_continuation_slides(adapter):
    long = words(0, 200)
    ending = adapter.text_tokenizer.decode(adapter.tok_encode(long)[-(CONTEXT - 10) :])
    assert adapter.tok_encode(ending) == adapter.tok_encode(long)[-(CONTEXT - 10) :]
    assert drawn(adapter, [long], until=[], max_gen_toks=10) == drawn(adapter, [ending], until=[], max_gen_toks=10)
    assert drawn(adapter, [long], until=[], max_gen_toks=CONTEXT + 5) == [
        plain(adapter, long, CONTEXT + 5, Sampling(temperature=0))
    ]


def test_samples_depend_only_on_the_seed_and_the_request_s_number(places, adapter):
    contexts = ["The cat"] * 4 + ["A", "on the mat, and"]
    settings = dict(until=[], max_gen_toks=12, do_sample=True, temperature=0.9, top_k=40, top_p=0.95)
    texts = drawn(adapter, contexts, **settings)
    assert len(set(texts[:4])) > 1
    narrow = HarnessModel(places / "ours", device="cpu", batch_tokens=1)
    assert drawn(narrow, contexts, **settings) == texts
    assert drawn(HarnessModel(places / "ours", device="cpu", seed=2), contexts, **settings) != texts
    assert drawn(adapter, ["The cat"], until=[], max_gen_toks=12, do_sample=True, top_k=1) == [
        plain(adapter, "The cat", 12, Sampling(temperature=0))
    ]


@pytest.mark.parametrize("settings", [{"num_beams": 10}, {"no_repeat_ngram_size": 2}, {"temperature": -1.0}])
def test_settings_without_a_counterpart_are_refused(adapter, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        drawn(adapter, ["A"], until=[], max_gen_toks=2, do_sample=True, **settings)
    assert drawn(adapter, ["A"], until=[], max_gen_toks=2, num_beams=1, top_k=0) != [""]


def test_16_bit_weights_give_nearly_equal_scores(places, adapter):
    request = instances("loglikelihood", ("The cat", " sat"))
    [(log, _)] = adapter.loglikelihood(request, disable_tqdm=True)
    half = HarnessModel(places / "ours", device="cpu", dtype="bfloat16")
    assert half.model.token_embedding.weight.dtype == torch.bfloat16
    assert half.loglikelihood(request, disable_tqdm=True)[0][0] == pytest.approx(log, rel=0.05)
    assert len(drawn(half, ["The cat"], until=[], max_gen_toks=3)) == 1


def test_models_that_cannot_be_evaluated_are_refused(places, tmp_path):
    save_model(GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)), None, tmp_path / "mute")
    with pytest.raises(UserError, match="has no tokenizer"):
        HarnessModel(tmp_path / "mute", device="cpu")
    for settings in ({"dtype": "float8"}, {"batch_tokens": 0}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            HarnessModel(places / "ours", device="cpu", **settings)


def test_character_tokenizers_work(tmp_path):
    tokenizer = CharTokenizer.from_text(PROSE)
    shape = dict(block_size=CONTEXT, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)
    save_model(randomised(GPT(GPTConfig(**shape))), tokenizer, tmp_path)
    model = HarnessModel(tmp_path, device="cpu")
    assert model.eot_token_id is None and model.prefix_token_id == tokenizer.encode("\n")[0]
    [(log, _)] = model.loglikelihood(instances("loglikelihood", ("The ", "cat")), disable_tqdm=True)
    [(moved, _)] = model.loglikelihood(instances("loglikelihood", ("The", " cat")), disable_tqdm=True)
    assert log == moved  # white space moves to the continuation
    assert len(drawn(model, ["The cat"], until=[], max_gen_toks=5)[0]) == 5


@pytest.fixture
def command_line(places, output_of, monkeypatch):
    """Runs `python -m gpt_arc.harness ARGS` in this process, without the harness's own tasks (slow to list)."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(lm_eval.__main__, "setup_logging", lambda: None)  # it would last for the whole process
    monkeypatch.chdir(places)
    return lambda *args: output_of(entry_point(main), "harness.py", *map(str, args), "--include_path", "tasks")


FLAGS = ("--model", "gpt-arc", "--tasks", "options,pages", "--model_args")


def test_the_command_line_gives_the_adapter_s_results(command_line, hf_evaluation, tmp_path):
    shown = command_line(*FLAGS, "pretrained=ours,batch_tokens=500", "--output_path", tmp_path / "results.json")
    assert "|options|" in shown and "bits_per_byte" in shown
    [written] = tmp_path.glob("results*.json")
    results, expected = json.loads(written.read_text())["results"], hf_evaluation[0]
    assert results["options"]["acc,none"] == expected["options"]["acc,none"]
    assert results["pages"]["bits_per_byte,none"] == pytest.approx(expected["pages"]["bits_per_byte,none"], rel=1e-5)


def test_the_command_line_refuses_a_missing_model(command_line):
    assert "there is no model directory nowhere" in command_line(*FLAGS, "pretrained=nowhere")


@pytest.mark.slow
def test_the_module_runs_as_a_program(places):
    run = [sys.executable, "-m", "gpt_arc.harness", *FLAGS, "pretrained=ours", "--include_path", "tasks"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(run, cwd=places, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0 and "|options|" in result.stdout, result.stderr


def test_without_the_harness_the_extra_is_named():
    code = "import sys; sys.modules['lm_eval.api.model'] = None; import gpt_arc.harness"
    result = run_python("-c", code)
    assert result.returncode == 1 and "UserError: EleutherAI's lm-evaluation-harness is not installed" in result.stderr


def test_a_token_may_span_context_and_continuation(adapter):
    """Scores of options of one context are compared by the tokens of the whole texts."""
    encode = adapter.tok_encode
    before = {cut: encode(PROSE[:cut]) for cut in range(9, 60)}
    cut = next(cut for cut, tokens in before.items() if encode(PROSE[: cut + 9])[: len(tokens)] != tokens)
    context, options = PROSE[:cut], [PROSE[cut : cut + 9], "zens", "t"]
    texts = [adapter.tok_encode(context + option) for option in options]
    requests = instances("loglikelihood", *((context, option) for option in options))
    logs = [log for log, _ in adapter.loglikelihood(requests, disable_tqdm=True)]
    wholes = adapter._loglikelihood_tokens([(("", ""), text[:1], text[1:]) for text in texts], disable_tqdm=True)
    for log, (whole, _) in zip(logs, wholes):
        assert log - logs[0] == pytest.approx(whole - wholes[0][0], abs=1e-4)


def test_help_begins_with_how_to_run_our_models(output_of):
    output = output_of(entry_point(main), "harness.py", "--help")
    assert output.index("--model gpt-arc") < output.index("usage: lm-eval")
