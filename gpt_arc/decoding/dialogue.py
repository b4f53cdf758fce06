"""A conversation with a model: its turns so far, as much of them as the context holds.

dialogue = Dialogue(chat, model.config.block_size, max_new_tokens=500, system="Be brief.")
answer = dialogue.ask("Name a colour.")       # a `Continuation` of answer.prompt_tokens, to be filled
answer = dialogue.ask("And another?")         # which that answer, as far as it has come, now precedes
"""

import sys

from gpt_arc.chat.format import ChatFormat, Turn
from gpt_arc.decoding.screen import Continuation
from gpt_arc.errors import UserError


class Dialogue:
    """Turns of a user and a model. Of the context, answers have `max_new_tokens`, or half of it if that is less."""

    def __init__(self, chat: ChatFormat, context: int, max_new_tokens: int, system: str | None = None):
        """Raises UserError for a system's turn that leaves no room for another, or that has no tokens."""
        self.chat, self.context = chat, context
        self.room = context - min(max_new_tokens, context // 2)  # tokens of a prompt
        self._asked = [] if system is None else [Turn("system", system)]  # up to the last question
        self._answer: Continuation | None = None  # to it
        self._forgot = False
        size = len(chat.prompt([*self._asked, Turn("user", "")]))
        if size >= self.room:
            raise UserError(
                f"the template and the system's turn take {size} of the {self.room} tokens that a prompt may have: "
                "there is no room for a question"
            )

    @property
    def turns(self) -> list[Turn]:
        """What the model knows of the conversation, its last answer as far as it has come."""
        answered = [] if self._answer is None else [Turn("assistant", self._answer.text)]
        return [*self._asked, *answered]

    def ask(self, text: str, stop: str | None = None) -> Continuation:
        """The answer, still empty, to the user's next turn, for which the oldest ones are forgotten if they must be.

        Raises UserError, and leaves the conversation as it was, for a text that is too long or has no tokens.
        """
        turns = [*self.turns, Turn("user", text)]
        kept = self.chat.latest(turns, self.room)
        if len(kept) < len(turns) and not self._forgot:
            self._forgot = True
            print(f"the oldest turns are forgotten: the context is {self.context} tokens", file=sys.stderr)
        self._asked = kept
        self._answer = Continuation(text, self.chat.prompt(kept), self.chat.tokenizer, stop, self.chat.end)
        return self._answer
