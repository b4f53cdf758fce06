"""GPT-1 in numpy: pre-training, then fine-tuning, with the backward pass written out.

    python examples/numpy_gpt.py

A GPT with two layers trains on five short sentences until it predicts the next words as well as word counts do. Then,
with a new linear layer, it learns to tell positive from negative reviews while it continues as a language model. It is
model.py's GPT in its GPT-1 form, with the same names, shapes, logits and gradients. There is no dropout, no weight
decay, no learning rate schedule and no mini-batch: every step uses all of the data.

A layer is a function that returns its output y and a function `backward`. That takes y_gradient, the derivative of the
loss with respect to y, adds the gradients of the layer's parameters to `gradients`, and returns x_gradient. A composite
layer calls the `backward` of its parts in reverse order.

Shapes: B batch, T time, C width of the model, H heads, D = C / H width of a head, V vocabulary.
"""

import math
from collections import Counter, defaultdict

import numpy as np

VOCABULARY = ["[Start]", "[Delim]", "[Extract]", "the", "film", "was", "great", "terrible", "cat", "sat"]
SENTENCES = ["the cat sat", "the film was great", "the film was terrible", "the cat was great", "the cat sat sat"]
REVIEWS = {  # the classifier reads the last token, [Extract]; [Delim], which separates two texts, is not used here
    "[Start] the film was great [Extract]": "positive",
    "[Start] the film was terrible [Extract]": "negative",
    "[Start] the cat was great [Extract]": "positive",
    "[Start] the cat was terrible [Extract]": "negative",
}
CLASSES = ["negative", "positive"]

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE, NORM_EPS = 2, 2, 16, 6, 1e-5
BLOCK_SHAPES = {"attention.qkv": (3 * N_EMBD, N_EMBD), "attention.projection": (N_EMBD, N_EMBD)}
BLOCK_SHAPES |= {"mlp.up": (4 * N_EMBD, N_EMBD), "mlp.projection": (N_EMBD, 4 * N_EMBD)}
BLOCK_SHAPES |= {"attention_norm": (N_EMBD,), "mlp_norm": (N_EMBD,)}
SHAPES = {"token_embedding": (len(VOCABULARY), N_EMBD), "position_embedding": (BLOCK_SIZE, N_EMBD)}
SHAPES |= {f"blocks.{layer}.{name}": shape for layer in range(N_LAYER) for name, shape in BLOCK_SHAPES.items()}
IGNORED = -1  # a target that is not scored: after the last word, and padding
LANGUAGE_WEIGHT = 0.5  # weight of the language-model loss in fine-tuning


def linear(parameters, name, x):
    """Returns x (B, T, I) times the weight (O, I), plus the bias (O,): y (B, T, O)."""

    def backward(gradients, y_gradient):
        gradients[f"{name}.weight"] += np.einsum("bto,bti->oi", y_gradient, x)  # summed over rows and positions
        gradients[f"{name}.bias"] += y_gradient.sum(axis=(0, 1))
        return y_gradient @ parameters[f"{name}.weight"]

    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"], backward


def layer_norm(parameters, name, x):
    """Normalises x (B, T, C) to mean 0 and variance 1 over its features, then scales and shifts it."""
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + NORM_EPS)
    normal = (x - x.mean(axis=-1, keepdims=True)) / deviation

    def backward(gradients, y_gradient):
        gradients[f"{name}.weight"] += (y_gradient * normal).sum(axis=(0, 1))
        gradients[f"{name}.bias"] += y_gradient.sum(axis=(0, 1))
        gradient = y_gradient * parameters[f"{name}.weight"]
        # shifting or scaling x does not change y, so the gradient has no component in these directions
        added = gradient.mean(axis=-1, keepdims=True)
        stretched = normal * (gradient * normal).mean(axis=-1, keepdims=True)
        return (gradient - added - stretched) / deviation

    return normal * parameters[f"{name}.weight"] + parameters[f"{name}.bias"], backward


def gelu(x):
    """Returns x times the probability that a standard normal variable is below x, approximated by tanh as in GPT-1."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = np.tanh(scale * (x + cubic * x**3))

    def backward(y_gradient):
        slope = (1 - tanh**2) * scale * (1 + 3 * cubic * x**2)  # derivative of tanh with respect to x
        return y_gradient * 0.5 * (1 + tanh + x * slope)

    return 0.5 * x * (1 + tanh), backward


def softmax(x):
    """Returns probabilities along the last axis. Subtracting the maximum only keeps exp from overflowing."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def attend(qkv):
    """Causal attention: from queries, keys and values (B, T, 3C) to the outputs of all heads (B, T, C)."""
    batch, length, _ = qkv.shape
    query, key, value = qkv.reshape(batch, length, 3, N_HEAD, -1).transpose(2, 0, 3, 1, 4)  # (B, H, T, D) each
    scale = 1 / math.sqrt(query.shape[-1])
    future = np.triu(np.ones((length, length), dtype=bool), k=1)  # row i, column j: is j later than i?
    weights = softmax(np.where(future, -np.inf, scale * query @ key.mT))  # (B, H, T, T), rows sum to 1
    mixed = weights @ value  # (B, H, T, D)

    def backward(y_gradient):
        mixed_gradient = y_gradient.reshape(batch, length, N_HEAD, -1).transpose(0, 2, 1, 3)
        weights_gradient = mixed_gradient @ value.mT
        # softmax: a row's weights have a fixed sum, so only differences from the row's average matter
        average = (weights * weights_gradient).sum(axis=-1, keepdims=True)
        scores_gradient = scale * weights * (weights_gradient - average)
        qkv_gradient = np.stack((scores_gradient @ key, scores_gradient.mT @ query, weights.mT @ mixed_gradient))
        return qkv_gradient.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)

    return mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1), backward


def attention(parameters, name, x):
    """Two linear layers (C to 3C, C to C) around causal attention, which mixes positions."""
    qkv, qkv_backward = linear(parameters, f"{name}.qkv", x)
    mixed, attend_backward = attend(qkv)
    y, projection_backward = linear(parameters, f"{name}.projection", mixed)

    def backward(gradients, y_gradient):
        return qkv_backward(gradients, attend_backward(projection_backward(gradients, y_gradient)))

    return y, backward


def mlp(parameters, name, x):
    """Two linear layers (C to 4C, 4C to C) around GELU, for each position separately."""
    raised, up_backward = linear(parameters, f"{name}.up", x)
    active, gelu_backward = gelu(raised)
    y, projection_backward = linear(parameters, f"{name}.projection", active)

    def backward(gradients, y_gradient):
        return up_backward(gradients, gelu_backward(projection_backward(gradients, y_gradient)))

    return y, backward


def block(parameters, name, x):
    """Computes norm(x + f(x)), first with attention as f, then with the MLP."""
    change, attention_backward = attention(parameters, f"{name}.attention", x)
    x, attention_norm_backward = layer_norm(parameters, f"{name}.attention_norm", x + change)
    change, mlp_backward = mlp(parameters, f"{name}.mlp", x)
    y, mlp_norm_backward = layer_norm(parameters, f"{name}.mlp_norm", x + change)

    def backward(gradients, y_gradient):
        sum_gradient = mlp_norm_backward(gradients, y_gradient)  # a sum passes its gradient to both terms
        x_gradient = sum_gradient + mlp_backward(gradients, sum_gradient)
        sum_gradient = attention_norm_backward(gradients, x_gradient)
        return sum_gradient + attention_backward(gradients, sum_gradient)

    return y, backward


def trunk(parameters, tokens):
    """Returns hidden states (B, T, C) of tokens (B, T): word and position embeddings, then the blocks."""
    length = tokens.shape[1]
    x = parameters["token_embedding.weight"][tokens] + parameters["position_embedding.weight"][:length]
    block_backwards = []
    for layer in range(N_LAYER):
        x, block_backward = block(parameters, f"blocks.{layer}", x)
        block_backwards.append(block_backward)

    def backward(gradients, x_gradient):
        for block_backward in reversed(block_backwards):
            x_gradient = block_backward(gradients, x_gradient)
        np.add.at(gradients["token_embedding.weight"], tokens, x_gradient)  # repeated words add up
        gradients["position_embedding.weight"][:length] += x_gradient.sum(axis=0)

    return x, backward


def head(parameters, hidden):
    """Returns logits (B, T, V) of the next word, computed with the token embedding."""

    def backward(gradients, logits_gradient):
        gradients["token_embedding.weight"] += np.einsum("btv,btc->vc", logits_gradient, hidden)
        return logits_gradient @ parameters["token_embedding.weight"]

    return hidden @ parameters["token_embedding.weight"].T, backward


def cross_entropy(logits, targets):
    """Returns the mean of -log(probability of the target) in nats over scored targets, and its logits gradient."""
    scored = targets != IGNORED
    probabilities = softmax(logits[scored])  # (scored targets, V)
    right = np.arange(len(probabilities)), targets[scored]
    loss = -np.log(probabilities[right]).mean()
    probabilities[right] -= 1  # the joint derivative of softmax and logarithm
    gradient = np.zeros_like(logits)
    gradient[scored] = probabilities / len(probabilities)
    return loss, gradient


def loss_and_gradients(parameters, tokens, targets, labels=None):
    """Returns the language model's mean loss on targets (B, T) and its gradients by name (pre-training).

    With labels (B,), half of it plus the loss of the classifier, which reads the last position (fine-tuning).
    """
    gradients = {name: np.zeros_like(parameter) for name, parameter in parameters.items()}
    hidden, trunk_backward = trunk(parameters, tokens)
    logits, head_backward = head(parameters, hidden)
    loss, logits_gradient = cross_entropy(logits, targets)
    weight = 1.0 if labels is None else LANGUAGE_WEIGHT
    loss *= weight
    hidden_gradient = head_backward(gradients, weight * logits_gradient)
    if labels is not None:
        logits, classifier_backward = linear(parameters, "classifier", hidden[:, -1:])
        class_loss, logits_gradient = cross_entropy(logits, labels[:, None])
        loss += class_loss
        hidden_gradient[:, -1:] += classifier_backward(gradients, logits_gradient)
    trunk_backward(gradients, hidden_gradient)
    return loss, gradients


def initialise(generator, shapes):
    """Returns parameters by name: weights normal with standard deviation .02, biases 0, norms the identity."""
    parameters = {}
    for name, shape in shapes.items():
        parameters[f"{name}.weight"] = np.ones(shape) if name.endswith("norm") else generator.normal(0, 0.02, shape)
        if not name.endswith("embedding"):
            parameters[f"{name}.bias"] = np.zeros(shape[0])
    return parameters


def make_batch(texts):
    """Returns tokens (B, T) and the following words as targets. Padding comes last, so no word attends to it."""
    rows = [[VOCABULARY.index(word) for word in text.split()] for text in texts]
    length = max(len(row) for row in rows)
    rows = np.array([row + [IGNORED] * (length + 1 - len(row)) for row in rows])
    return np.maximum(rows[:, :-1], 0), rows[:, 1:]


def minimise(parameters, batch, steps, learning_rate, beta1=0.9, beta2=0.999):
    """Runs Adam (arXiv:1412.6980) in place: the step is the mean gradient over the root of its mean square."""
    means, squares = dict.fromkeys(parameters, 0.0), dict.fromkeys(parameters, 0.0)
    for step in range(1, steps + 1):
        loss, gradients = loss_and_gradients(parameters, *batch)
        if step == 1 or step % 50 == 0:
            print(f"step {step:3d}   loss {loss:.4f}")
        for name, gradient in gradients.items():
            means[name] = beta1 * means[name] + (1 - beta1) * gradient
            squares[name] = beta2 * squares[name] + (1 - beta2) * gradient**2
            mean, square = means[name] / (1 - beta1**step), squares[name] / (1 - beta2**step)  # both start at 0
            parameters[name] -= learning_rate * mean / (np.sqrt(square) + 1e-8)


def count_followers(texts):
    """Counts how often each word follows each beginning of a text."""
    followers = defaultdict(Counter)
    for words in (text.split() for text in texts):
        for i in range(1, len(words)):
            followers[" ".join(words[:i])][words[i]] += 1
    return followers


def loss_floor(texts):
    """Returns the lowest possible loss in nats per word, reached if each next word has its frequency as probability.

    In SENTENCES 14 words follow others, and 10 are uncertain: cat 3 or film 2 times after "the", sat 2 or was 1 after
    "the cat", great or terrible after "the film was". So the floor is (5 x .6730 + 3 x .6365 + 2 x .6931) / 14 = .4758.
    """
    counts = count_followers(texts).values()
    nats = -sum(n * math.log(n / count.total()) for count in counts for n in count.values())
    return nats / sum(count.total() for count in counts)


def report(name, parameters, texts):
    """Prints the language model's loss and, where several words may follow, their probabilities and frequencies."""
    loss, floor = loss_and_gradients(parameters, *make_batch(texts))[0], loss_floor(texts)
    print(f"{name}: loss {loss:.4f}, floor {floor:.4f} (perplexity {math.exp(floor):.3f}); predicted (counted) words:")
    for beginning, count in count_followers(texts).items():
        if len(count) > 1:
            hidden, _ = trunk(parameters, make_batch([beginning])[0])
            predicted = dict(zip(VOCABULARY, softmax(head(parameters, hidden)[0][0, -1])))
            words = (f"{word} {predicted[word]:.2f} ({n / count.total():.2f})" for word, n in count.items())
            print(f"  {beginning} ...", *words)


def main():
    generator = np.random.default_rng(0)
    print("Pre-training on the sentences")
    parameters = initialise(generator, SHAPES)
    minimise(parameters, make_batch(SENTENCES), steps=200, learning_rate=5e-3)
    report("Sentences", parameters, SENTENCES)
    report("Reviews", parameters, REVIEWS)

    print("\nFine-tuning on the reviews, in which no cat sits, so the model unlearns that")
    batch = (*make_batch(REVIEWS), np.array([CLASSES.index(label) for label in REVIEWS.values()]))
    parameters |= initialise(generator, {"classifier": (len(CLASSES), N_EMBD)})
    minimise(parameters, batch, steps=300, learning_rate=1e-3)
    report("Sentences", parameters, SENTENCES)
    report("Reviews", parameters, REVIEWS)

    class_logits, _ = linear(parameters, "classifier", trunk(parameters, batch[0])[0][:, -1:])
    print(f"\n{'Sentiment':42}", *CLASSES, "  label")
    for (text, label), (negative, positive) in zip(REVIEWS.items(), softmax(class_logits)[:, 0]):
        print(f"  {text:40} {negative:8.3f} {positive:8.3f}   {label}")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description="Trains a GPT in NumPy. There are no settings.").parse_args()
    main()
