"""The shared nouns of gpt-arc: pieces with one right answer that the verbs (train.py, sample.py, ...) are made of."""
