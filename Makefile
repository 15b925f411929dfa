# Two commands on a bare machine (Python 3.11+ with headers, g++, make):
#   make demo    two vLLM engines on the CPU share one pool
#   make test    static checks and all tests that need no GPU
# Each makes .venv first when it is missing; nothing is done twice.

.PHONY: demo test test-compat check bench venv clean

demo: venv
	.venv/bin/python -m benchmarks.demo

test:
	scripts/check
	scripts/test

# The same end-to-end test on the oldest vLLM that runs on a CPU here. Up to 0.28, vLLM's block hashes
# agree between engines only when PYTHONHASHSEED is set.
test-compat:
	scripts/venv compat
	PYTHONHASHSEED=0 .venv-compat/bin/python -m pytest tests/connector/test_end_to_end.py

check bench venv:
	scripts/$@

# The environments stay: remove .venv* by hand to make them anew.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
