.PHONY: lint types test slow ci

lint:
	ruff check .
	ruff format --check .
	codespell

types:
	pyright

test:
	python -m pytest

slow:
	python -m pytest -m slow

ci:
	.ci/run
