# Each target is `python lab.py <target>`; lab.py makes .venv first. Where there is no make, call lab.py.
PYTHON ?= python3
ARGS ?=

.PHONY: help tour lab test check notebooks bench docs anywhere doctor badges
help:
	@$(PYTHON) lab.py --help

tour lab test check notebooks bench docs anywhere doctor:
	@$(PYTHON) lab.py $@ $(ARGS)

badges:
	@$(PYTHON) lab.py badges "$(REPO)"
