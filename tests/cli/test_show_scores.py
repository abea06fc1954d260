"""Scores as they are shown: every kind has its line, and what cannot be told is a dash."""

from typing import Any

import pytest

from posae.cli.show_scores import show_scores
from posae.pipeline.evaluate.scoring.evaluation import Evaluation

LEAST: dict[str, Any] = {
    **{
        "architecture": "standard",
        "layer": 2,
        "dictionary_size": 8,
        "n_parameters": 9,
        "n_base_parameters": 9,
    },
    **{"ranges": ["0:1", "1:4"], "l0": 2.0, "l0_above": 2.0, "l0_by_range": [None, 2.0], "fvu": 0.25},
    **{"fvu_by_range": [None, 0.25], "fvu_base": None, "dead_fraction": 0.0, "n_rows": 3, "contexts": [8, 9]},
    "store": {},
}
MORE: dict[str, Any] = {
    "fvu_by_position": [None, 0.5, 0.2, 0.1],
    "fvu_base": 0.75,
    "fvu_with_special": 0.125,
    "norm_outliers": {"threshold": 12.0, "n_rows": 1},
    "density_histogram": {"edges": [-2.0, -1.0, 0.0], "counts": [3, 4], "never": 1},
    "retention": 0.5,
    "drift": {"cosine_mean": 0.25, "kept_share": 0.125},
    "position_features": {"features": 6, "slots": 1.5},
    "clusters": {
        **{
            "best_n": 4,
            "score": 0.75,
            "null_score": 0.5,
            "scores": [],
            "null_scores": [],
            "sizes": [1, 2, 3, 4],
        },
        **{"profiles": [], "spread": None, "n_features": 10},
    },
    "training_seconds": 61.0,
    "training_cpu_seconds": 122.0,
    "ce_loss": {
        **{"model": "m", "contexts": 1, "n_rows": 2, "clean": 2.0, "spliced": 3.0, "zero": 7.0, "mean": 6.0},
        **{
            "recovered": 0.8,
            "recovered_of_mean": 0.75,
            "kl": 0.5,
            "kl_zero": 5.0,
            "clean_by_range": [None, 2.0],
        },
        **{"spliced_by_range": [None, 3.0], "recovered_by_range": [None, 0.8], "kl_by_range": [None, 0.5]},
    },
}


def shown(capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    show_scores(Evaluation.model_validate(LEAST | more))
    return " ".join(capsys.readouterr().out.split())


def test_what_was_not_measured_is_left_out_or_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert "FVU 0.2500; with special tokens -" in text
    assert "0:1 -, 1:4 2.00" in text
    assert "too few features fired often enough" in text
    for word in ("retention", "drift", "CE loss", "training", "█"):
        assert word not in text


def test_every_score_has_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, **MORE)
    for words in (
        "with special tokens 0.1250, without 1 norm outliers (above 12.0) -",
        "FVU 0.7500 alone; retention 0.500",
        "cosine 0.250 with the end of warm-up, 12.5% above .9",
        "1 never fired, 4 on more than a tenth of the tokens",
        "6 features encode a position, 1.50 of them active per token",
        "4 by where features fire, of 1, 2, 3, 4 features (silhouette 0.75, without groups up to 0.50)",
        "2.000 nats, spliced 3.000, with zeros 7.000; recovered 0.8000 (by range -, 0.8000); KL 0.5000",
        "61 s, 122 s of CPU",
        "0.5000 ┤",
    ):
        assert words in text, text
    none = MORE["clusters"] | {"best_n": 1}
    assert "none by where features fire (silhouette 0.75" in shown(capsys, clusters=none)
