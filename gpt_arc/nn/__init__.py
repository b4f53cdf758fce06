"""The parts of a GPT that have one right answer, fast on the hardware at hand. Imports torch alone."""
