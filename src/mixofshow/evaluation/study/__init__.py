"""Asking people: which of two methods' pictures shows the concept better, and which what was asked (Mix-of-Show Table 2c)."""

from mixofshow.evaluation.study.build import build_study
from mixofshow.evaluation.study.score import Preference, score_study

__all__ = ["Preference", "build_study", "score_study"]
