"""Is a word the likeliest to come next, stop words excluded? This is how GPT-2's authors filtered LAMBADA.

    right = likeliest_words(WordTokens(tokenizer), model.eval(), [(context, answer), ...], STOP_WORDS)    # token ids

A word consists of letters and digits, with apostrophes inside, and follows a space if the answer does. It begins with
the token that has its first letter (the space may be a token before that). It ends before a token that doesn't continue
it: white space, punctuation, end-of-text, or part of a character. So the probability of a word is the product of its
tokens' probabilities, times the total probability of the tokens that end it: `the` gets nothing from `theatre`.

The search is exact. A word is never likelier than a prefix of its tokens, so only prefixes likelier than the answer are
expanded, the likeliest first, until a likelier word turns up or no prefix is left.
"""

import heapq
import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.errors import UserError, check_finite
from model import GPT

# Function words, and the parts of contractions before an apostrophe token; GPT-2's list was not published.
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
BARE = re.compile(r"\w+(?:['’]\w+)*")  # tokens that a word may begin with
SPACED = re.compile(rf" (?:{BARE.pattern})?")  # the same, after a space
MORE = re.compile(rf"['’]?{BARE.pattern}")  # tokens that continue a word


class WordTokens:
    """A tokenizer's tokens as beginnings and parts of words. Raises UserError if tokens don't contain their spaces."""

    def __init__(self, tokenizer: Tokenizer):
        self.pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
        if "".join(self.pieces[token] for token in tokenizer.encode("a a")) != "a a":
            raise UserError(
                "stop_word_filter separates words by the spaces in their tokens, but this model's tokenizer, unlike "
                "GPT-2's, drops them"
            )
        self.bare, self.spaced, self.more = (self._numbers(pattern) for pattern in (BARE, SPACED, MORE))
        self.ends = torch.ones(len(self.pieces), dtype=torch.bool)
        self.ends[self.more] = False

    def _numbers(self, pattern: re.Pattern) -> Tensor:
        return torch.tensor([i for i, piece in enumerate(self.pieces) if pattern.fullmatch(piece)], dtype=torch.long)

    def first(self, answer: Sequence[int]) -> Tensor:
        """Returns the tokens that a word competing with the answer may begin with."""
        return self.spaced if self.pieces[answer[0]].startswith(" ") else self.bare

    def word(self, tokens: Sequence[int]) -> str:
        """Returns the word that tokens spell, in lower case."""
        return "".join(self.pieces[token] for token in tokens).strip().lower()


class _Search:
    """The search for a word likelier than one answer, with a heap of prefixes that could become one.

    Of the tokens that may follow a prefix, only the next in order is on the heap: with a weak model tens of thousands
    are likelier than the answer.
    """

    def __init__(self, context: Sequence[int], answer: Sequence[int]):
        self.context, self.answer = list(context), list(answer)
        self.least = 0.0  # log-probability of the answer, summed as its parts are read
        self.right: bool | None = None
        self._open: list[tuple[float, list[int], tuple]] = [(0.0, [], ())]  # negative log-probabilities, and siblings

    def push(self, tokens: list[int], chances: Tensor, after: Tensor, at: int = 0) -> None:
        """Adds the prefixes `tokens` + one token of `after`, from index `at` on; `chances` are their sorted logs."""
        if at < len(after):
            siblings = tokens, chances, after, at + 1
            heapq.heappush(self._open, (-chances[at].item(), [*tokens, int(after[at])], siblings))

    def pop(self) -> tuple[float, list[int]]:
        """Returns the likeliest prefix's log-probability and tokens. If none is left, the answer is right."""
        if not self._open:
            self.right = True
            return 0.0, []
        cost, tokens, siblings = heapq.heappop(self._open)
        if siblings:
            self.push(*siblings)
        return -cost, tokens


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields batches of sequence indices, the longest first, of at most `batch_tokens` tokens, padding included.

    A longer sequence is a batch by itself.
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
    """Yields the index of each sequence, in any order, with the next-token log-probabilities of ids below `tokens`."""
    sequences = [sequence[-decoder.model.config.block_size :] for sequence in sequences]
    for batch in length_batches([len(sequence) for sequence in sequences], batch_tokens):
        logs = decoder.read([sequences[i] for i in batch], room=0).log_softmax(-1)[:, :tokens].cpu()
        check_finite(logs.amax(-1).tolist())
        yield from zip(batch, logs)


def likeliest_words(
    vocabulary: WordTokens,
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    excluded: Collection[str],
    batch_tokens: int = 8192,
    progress: str | None = None,
) -> list[bool]:
    """Returns whether each answer is the likeliest word after its context (token ids, neither empty), in order.

    Words in `excluded` (lower case) don't compete, and an answer that is one of them is wrong. The answer wins against
    equally likely words. It may have any tokens, but a word must end after it; the same word in other tokens does not
    compete. The model sees the last block_size tokens of a long text.
    """
    decoder = Decoder(model)
    right = [False] * len(pairs)
    bar = tqdm(total=len(pairs), desc=progress, unit="answer", leave=False, disable=None if progress else True)
    for batch in length_batches([len(context) + len(answer) for context, answer in pairs], batch_tokens):
        searches = [_Search(*pairs[number]) for number in batch]
        _search(vocabulary, decoder, searches, excluded, batch_tokens)
        for number, search in zip(batch, searches):
            right[number] = bool(search.right)
        bar.update(len(batch))
    bar.close()
    return right


def _search(
    vocabulary: WordTokens, decoder: Decoder, searches: Sequence[_Search], excluded: Collection[str], batch_tokens: int
) -> None:
    """Decides for each search whether the answer is right."""
    size = len(vocabulary.pieces)  # the model's vocabulary may be padded
    parts = [(search, end) for search in searches for end in range(len(search.answer) + 1)]
    read = _next_tokens(decoder, [search.context + search.answer[:end] for search, end in parts], batch_tokens, size)
    for number, logs in read:
        search, end = parts[number]
        whole = end == len(search.answer)
        search.least += (logs[vocabulary.ends].logsumexp(-1) if whole else logs[search.answer[end]]).item()
    for search in searches:
        if vocabulary.word(search.answer) in excluded:
            search.right = False
    while undecided := [search for search in searches if search.right is None]:
        tops = [(search, *search.pop()) for search in undecided]
        tops = [top for top in tops if top[0].right is None]
        sequences = [search.context + tokens for search, _, tokens in tops]
        for number, logs in _next_tokens(decoder, sequences, batch_tokens, size):
            search, chance, tokens = tops[number]
            word = vocabulary.word(tokens)
            rival = word and word not in excluded and word != vocabulary.word(search.answer)
            if rival and chance + logs[vocabulary.ends].logsumexp(-1).item() > search.least:
                search.right = False
                continue
            after = vocabulary.more if tokens else vocabulary.first(search.answer)
            chances = chance + logs[after]
            likelier = chances > search.least
            ordered = chances[likelier].sort(descending=True)
            search.push(tokens, ordered.values, after[likelier][ordered.indices])
