"""A chat model's answers by sample.py --chat, stages/eval.py --chat and lm-evaluation-harness."""

import functools
import io
import json
import sys

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

import sample
from gpt_arc.chat.batches import conversation_batch, encode_conversations
from gpt_arc.chat.files import Conversation
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.harness import HarnessModel
from gpt_arc.weights.directory import save_model
from model import GPT, GPTConfig
from stages import eval as stage

TOKENIZER = CharTokenizer.from_text("0123456789+\nsystemassistantuser ")  # chatml's roles are text
SUMS = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(3, 7) for b in range(3, 7)]
TASK = 'title = "sums"\nkind = "generate"\ncontext = "{question}"\nanswer = "{answer}"\nmax_new_tokens = 6\n'
CHOICE = TASK.replace("generate", "choice").replace(
    "max_new_tokens = 6", 'options = ["{answer}", "99", "88"]\nanswer_as = "text"'
)
HARNESS_TASK = {
    "task": "sums", "dataset_path": "json", "test_split": "test", "metadata": {"version": 1},
    "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.fixture(scope="module", params=["markers", pytest.param("chatml", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    """A folder with a chat model that has learned its sums, and the sums as tasks."""
    root = tmp_path_factory.mktemp("chat")
    chat = ChatFormat.new(TEMPLATES[request.param], TOKENIZER, TOKENIZER.vocab_size)
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=chat.vocab_size, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config)
    rows = [(Turn("user", row["question"]), Turn("assistant", row["answer"])) for row in SUMS]
    examples = encode_conversations([Conversation(turns, "", {}) for turns in rows], chat, 64).examples
    batch = conversation_batch(examples, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = model(*batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, TOKENIZER, root / "talker")
    chat.save(root / "talker")
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    (root / "sums.toml").write_text(TASK)
    (root / "choice.toml").write_text(CHOICE)
    files = {"data_files": {"test": str(root / "sums.jsonl")}, "cache_dir": str(root / "cache")}
    (root / "sums.yaml").write_text(json.dumps(HARNESS_TASK | {"dataset_kwargs": files}))
    return root


def run(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        entry_point(module.main)()
    return stop.value.code


def eval_score(monkeypatch, task, *flags):
    flags = (f"--tasks={task}.toml", "--data=sums.jsonl", "--json=report.json", "--device=cpu", *flags)
    assert not run(monkeypatch, stage, "talker", *flags)
    with open("report.json") as file:
        [result] = json.load(file)["models"][0]["tasks"]
    return result["value"]


def test_the_score_is_the_same_by_every_way(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    # each question is a chat of its own
    right = 0
    for row in SUMS[::5]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(row["question"]))
        assert not run(monkeypatch, sample, "--chat=talker", "--temperature=0", "--json=True", "--device=cpu")
        answer = json.loads(capsys.readouterr().out)
        right += answer["text"] == row["answer"] and answer["ended"]
    assert right == len(SUMS[::5])
    assert eval_score(monkeypatch, "sums", "--chat=True") == 1
    assert eval_score(monkeypatch, "choice", "--chat=True") == 1

    evaluate = functools.partial(
        lm_eval.simple_evaluate, tasks=["sums"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=".", include_defaults=False),
    )  # fmt: skip
    model = HarnessModel("talker", device="cpu")
    output = evaluate(model, apply_chat_template=True)
    assert output["results"]["sums"]["exact_match,none"] == 1
    assert "{% generation %}" in model.chat_template(True) and model.chat_template(False) is None
    plain = evaluate(HarnessModel("talker", device="cpu"))
    assert plain["results"]["sums"]["exact_match,none"] == eval_score(monkeypatch, "sums") < 1


def test_a_response_ends_a_plain_continuation(folder, monkeypatch, capsys):
    """The prompt is text that looks like nothing that was trained on; what counts is that <|end|> isn't skipped."""
    monkeypatch.chdir(folder)
    flags = ("--start=3+3", "--num_samples=20", "--max_new_tokens=40", "--json=True", "--device=cpu")
    assert not run(monkeypatch, sample, "talker", *flags)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    chat = json.loads((folder / "talker" / "chat.json").read_text())
    end = max(chat["added_tokens"].values())
    assert any(row["ended"] for row in rows)
    assert all((end in row["tokens"]) == row["ended"] and end not in row["tokens"][:-1] for row in rows)


def test_a_model_without_a_template_is_refused(tmp_path):
    save_model(GPT(GPTConfig(8, TOKENIZER.vocab_size, 1, 1, 8)), TOKENIZER, tmp_path)
    model = HarnessModel(tmp_path, device="cpu")
    with pytest.raises(UserError, match="doesn't know how turns are marked"):
        model.apply_chat_template([{"role": "user", "content": "1"}])
    with pytest.raises(UserError, match="doesn't know how turns are marked"):
        model.chat_template(True)
