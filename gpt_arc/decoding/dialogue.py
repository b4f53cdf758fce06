"""A conversation with a model: the latest turns that fit into the context.

dialogue = Dialogue(chat, model.config.block_size, max_new_tokens=500, system="Be brief.")
answer = dialogue.ask("Name a colour.")       # an empty `Continuation` of answer.prompt_tokens
answer = dialogue.ask("And another?")         # preceded by the first answer, as far as it has got
"""

import sys
from collections.abc import Sequence

from gpt_arc.chat.format import IMAGE, ChatFormat, Turn
from gpt_arc.decoding.screen import Continuation
from gpt_arc.errors import UserError


class Dialogue:
    """Turns of a user and a model. Answers may take `max_new_tokens` of the context, or half of it if that is less."""

    def __init__(self, chat: ChatFormat, context: int, max_new_tokens: int, system: str | None = None):
        """Raises UserError for a system turn that leaves no room for a question or that the tokenizer can't encode."""
        self.chat, self.context = chat, context
        self.room = context - min(max_new_tokens, context // 2)  # tokens that a prompt may have
        self._prompt_turns = [] if system is None else [Turn("system", system)]  # up to the latest question
        self._answer: Continuation | None = None  # to the latest question
        self._forgot = False
        size = len(chat.prompt([*self._prompt_turns, Turn("user", "")]))
        if size >= self.room:
            raise UserError(
                f"the template and the system turn take {size} of the {self.room} tokens for a prompt: "
                "there is no room for a question"
            )

    @property
    def turns(self) -> list[Turn]:
        """The turns that the model remembers, with the latest answer as far as it has got."""
        answered = [] if self._answer is None else [Turn("assistant", self._answer.text)]
        return [*self._prompt_turns, *answered]

    def ask(self, text: str, stop: str | None = None, images: Sequence[range] = ()) -> Continuation:
        """Returns the empty answer to the user's next turn, dropping the oldest turns if the context is too small.

        `images` come before the text, each by the ids of its embeddings. Raises UserError, leaving the conversation
        unchanged, for a text that is too long or can't be encoded.
        """
        turns = [*self.turns, Turn("user", IMAGE * len(images) + text, images=tuple(images))]
        kept = self.chat.latest(turns, self.room)
        if len(kept) < len(turns) and not self._forgot:
            self._forgot = True
            print(f"dropped the oldest turns: the context is {self.context} tokens", file=sys.stderr)
        self._prompt_turns = kept
        self._answer = Continuation(text, self.chat.prompt(kept), self.chat.tokenizer, stop, self.chat.end)
        return self._answer
