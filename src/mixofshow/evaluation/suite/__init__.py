"""The paper's whole evaluation as one YAML file: methods × concepts × {single, fused}."""

from mixofshow.evaluation.suite.results import suite_means
from mixofshow.evaluation.suite.run import run_suite
from mixofshow.evaluation.suite.settings import Suite, make_suite, read_suite

__all__ = ["Suite", "make_suite", "read_suite", "run_suite", "suite_means"]
