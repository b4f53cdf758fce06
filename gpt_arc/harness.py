"""Runs the tasks of EleutherAI's lm-evaluation-harness on a model of this repository.

    pip install -e ".[eval]"
    python -m gpt_arc.harness --model gpt-arc --model_args pretrained=out/gpt2 --tasks lambada_openai,hellaswag
    python -m gpt_arc.harness --model gpt-arc --model_args pretrained=gpt2,dtype=bfloat16 --tasks wikitext --limit 20
    python -m gpt_arc.harness --model gpt-arc --model_args pretrained=out/sft --tasks gsm8k --apply_chat_template
    python -m gpt_arc.harness ls tasks

This is the harness's own command line with the model type `gpt-arc` added. `--model_args` are the arguments of
`HarnessModel`; `--device` is auto, cpu, cuda, cuda:1 or mps. `--batch_size` has no effect: batch_tokens sets the size
of a batch. From Python: `import gpt_arc.harness`, then
`lm_eval.simple_evaluate("gpt-arc", {"pretrained": "out/gpt2"}, ...)`.
"""

import sys

from gpt_arc.errors import entry_point
from gpt_arc.extras import import_extra


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__, flush=True)
    cli_evaluate = import_extra("lm_eval.__main__").cli_evaluate

    import gpt_arc.evaluation.harness  # noqa: F401  registers the model type

    cli_evaluate()


if __name__ == "__main__":
    entry_point(main)()
else:
    import gpt_arc.evaluation.harness  # noqa: F401  registers the model type
