"""Is a word the likeliest one to come next, those of a list left out? GPT-2's LAMBADA has its stop words left out so.

    right = likeliest_words(Vocabulary(tokenizer), model.eval(), [(context, answer), ...], STOP_WORDS)    # token ids

A word is made of letters and digits, with apostrophes among them, and after a space if the answer is. It begins with
the token that has its first letter (a space may be a token before that) and ends where the next token doesn't go on
with it: with white space, with punctuation, at the end of the text, or with a part of a character. So the probability
of a word is that of its tokens, times the sum of those of all tokens that end it: `the` has none of `theatre`.

The search is exact. A word can't be likelier than the first of its tokens are, so only beginnings likelier than the
answer are looked at, the likeliest first, until another word is found to be likelier or no beginning is left.
"""

import heapq
import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.errors import UserError
from model import GPT

# Words of grammar, and what stands before an apostrophe that is a token of its own; GPT-2's own list isn't known.
STOP_WORDS = frozenset(
    """
    a an the this that these those some any each every either neither no none such other another both all few more most
    much many own same enough i me my mine myself you your yours yourself yourselves he him his himself she her hers
    herself it its itself we us our ours ourselves they them their theirs themselves who whom whose which what one
    ones someone something anyone anything everyone everything nobody nothing be am is are was were been being have has
    had having do does did doing done will would shall should can could may might must ought need cannot not
    don didn doesn isn aren wasn weren haven hasn hadn won wouldn shouldn couldn and or
    but nor so yet if because as until while than though although unless since when where why how whether of at by for
    with about against between among into through during before after above below to from up down in out on off over
    under upon within without toward towards across along around behind beside besides beyond near like again further
    then once here there now only too very just also even still ever never always already almost quite rather
    it's i'm i've i'll i'd you're you've you'll you'd he's he'll he'd she's she'll she'd we're we've we'll we'd they're
    they've they'll they'd that's there's what's who's let's can't don't didn't doesn't isn't aren't wasn't weren't
    haven't hasn't hadn't won't wouldn't shouldn't couldn't mustn't
    """.split()
)
BARE = re.compile(r"\w+(?:['’]\w+)*")  # what a word may begin with
SPACED = re.compile(rf" (?:{BARE.pattern})?")  # after a space
MORE = re.compile(rf"['’]?{BARE.pattern}")  # and go on with


class Vocabulary:
    """A tokenizer's tokens as beginnings and parts of words. Raises UserError where tokens don't have their spaces."""

    def __init__(self, tokenizer: Tokenizer):
        self.pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
        if "".join(self.pieces[token] for token in tokenizer.encode("a a")) != "a a":
            raise UserError(
                "stop_word_filter tells words by the spaces in their tokens, which this model's tokenizer, unlike "
                "GPT-2's, leaves out"
            )
        self.bare, self.spaced, self.more = (self._numbers(pattern) for pattern in (BARE, SPACED, MORE))
        self.ends = torch.ones(len(self.pieces), dtype=torch.bool)
        self.ends[self.more] = False

    def _numbers(self, pattern: re.Pattern) -> Tensor:
        return torch.tensor([i for i, piece in enumerate(self.pieces) if pattern.fullmatch(piece)], dtype=torch.long)

    def first(self, answer: Sequence[int]) -> Tensor:
        """The tokens that a rival of the answer may begin with."""
        return self.spaced if self.pieces[answer[0]].startswith(" ") else self.bare

    def word(self, tokens: Sequence[int]) -> str:
        return "".join(self.pieces[token] for token in tokens).strip().lower()


class _Search:
    """The question of one answer, and the beginnings of words that may be likelier, the likeliest first.

    Of the tokens that may follow a beginning only the next in order lies on the heap: a model that knows little finds
    tens of thousands likelier than the answer.
    """

    def __init__(self, context: Sequence[int], answer: Sequence[int]):
        self.context, self.answer = list(context), list(answer)
        self.least = 0.0  # log-probability of the answer, once all of it is known
        self.right: bool | None = None
        self._open: list[tuple[float, list[int], tuple]] = [(0.0, [], ())]  # negative log-probabilities, and siblings

    def push(self, tokens: list[int], chances: Tensor, after: Tensor, at: int = 0) -> None:
        """Consider `tokens` with each token of `after`, from place `at` on: their log-probabilities, in order."""
        if at < len(after):
            siblings = tokens, chances, after, at + 1
            heapq.heappush(self._open, (-chances[at].item(), [*tokens, after[at].item()], siblings))

    def pop(self) -> tuple[float, list[int]]:
        """The likeliest beginning: its log-probability and tokens. Without one the answer is right."""
        if not self._open:
            self.right = True
            return 0.0, []
        cost, tokens, siblings = heapq.heappop(self._open)
        if siblings:
            self.push(*siblings)
        return -cost, tokens


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The numbers of sequences, the longest first, in batches that come to `batch_tokens` at most, padding included.

    A sequence that is longer is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    start = 0
    while start < len(order):
        end = start + max(batch_tokens // lengths[order[start]], 1)
        yield order[start:end]
        start = end


def _next_tokens(
    decoder: Decoder, sequences: Sequence[list[int]], batch_tokens: int, tokens: int
) -> Iterator[tuple[int, Tensor]]:
    """Number of each sequence, in any order, and the log-probabilities of the first `tokens` to follow its end."""
    sequences = [sequence[-decoder.model.config.block_size :] for sequence in sequences]
    for batch in length_batches([len(sequence) for sequence in sequences], batch_tokens):
        yield from zip(batch, decoder.read([sequences[i] for i in batch], room=0).log_softmax(-1)[:, :tokens].cpu())


def likeliest_words(
    vocabulary: Vocabulary,
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    left_out: Collection[str],
    batch_tokens: int = 8192,
    progress: str | None = None,
) -> list[bool]:
    """Whether each answer is the likeliest word after its context (token ids, neither empty), in their order.

    Words of `left_out` (in lower case) don't count; an answer that is one of them is wrong. Of words that are equally
    likely the answer counts as the first. It may have any tokens, the last of which must be followed by the end of a
    word; another spelling of it in tokens is no rival. Of a long text the model sees the last block_size tokens.
    """
    decoder = Decoder(model)
    right = [False] * len(pairs)
    bar = tqdm(total=len(pairs), desc=progress, unit="answer", leave=False, disable=None if progress else True)
    for batch in length_batches([len(context) + len(answer) for context, answer in pairs], batch_tokens):
        searches = [_Search(*pairs[number]) for number in batch]
        _search(vocabulary, decoder, searches, left_out, batch_tokens)
        for number, search in zip(batch, searches):
            right[number] = bool(search.right)
        bar.update(len(batch))
    bar.close()
    return right


def _search(
    vocabulary: Vocabulary, decoder: Decoder, searches: Sequence[_Search], left_out: Collection[str], batch_tokens: int
) -> None:
    """Settle whether the answers are right."""
    size = len(vocabulary.pieces)  # the model may have more tokens, which mean nothing
    parts = [(search, end) for search in searches for end in range(len(search.answer) + 1)]
    read = _next_tokens(decoder, [search.context + search.answer[:end] for search, end in parts], batch_tokens, size)
    for number, logs in read:
        search, end = parts[number]
        whole = end == len(search.answer)
        search.least += (logs[vocabulary.ends].logsumexp(-1) if whole else logs[search.answer[end]]).item()
    for search in searches:
        if vocabulary.word(search.answer) in left_out:
            search.right = False
    while going := [search for search in searches if search.right is None]:
        tops = [(search, *search.pop()) for search in going]
        tops = [top for top in tops if top[0].right is None]
        sequences = [search.context + tokens for search, _, tokens in tops]
        for number, logs in _next_tokens(decoder, sequences, batch_tokens, size):
            search, chance, tokens = tops[number]
            word = vocabulary.word(tokens)
            rival = word and word not in left_out and word != vocabulary.word(search.answer)
            if rival and chance + logs[vocabulary.ends].logsumexp(-1).item() > search.least:
                search.right = False
                continue
            after = vocabulary.more if tokens else vocabulary.first(search.answer)
            chances = chance + logs[after]
            likelier = chances > search.least
            ordered = chances[likelier].sort(descending=True)
            search.push(tokens, ordered.values, after[likelier][ordered.indices])
