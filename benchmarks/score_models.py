"""Trained reward and cost models beside two light baselines on the same held-out prompts, with 95% intervals over prompts.

    python -m benchmarks.score_models RUN_DIR [--out FILE]

RUN_DIR is where `midpo reward` worked. The baselines learn from the same training pairs: logistic regression on TF-IDF of words
and pairs of words, and on seven surface features. An order is learnt from the difference of a pair's two rows, a sign (of a cost)
from single responses behind their prompt. The regularisation is chosen by cross-validation over training prompts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.preprocessing import StandardScaler

from midpo_ray.config import load_config
from midpo_ray.data.schema import prompt_key
from midpo_ray.metrics import bootstrap_weighted
from midpo_ray.models.scorers import plain_text
from midpo_ray.pipeline.reward import Row, read_score_pairs, scoring_config

Texts = Sequence[tuple[str, str]]  # (prompt, response)
STRENGTHS = (0.01, 0.1, 1.0, 10.0)


def surface(texts: Texts) -> np.ndarray:
    """Seven features of a response, counts as logarithms: characters, words, sentences, lines, list items, marks, and the share
    of its words that are the prompt's."""
    made = []
    for prompt, response in texts:
        words, asked = response.lower().split(), set(prompt.lower().split())
        counts = (
            len(response),
            len(words),
            len(re.findall(r"[.!?](?:\s|$)", response)),
            response.count("\n"),
            len(re.findall(r"(?m)^\s*(?:[-*•]|\d+[.)])\s", response)),
            response.count("!") + response.count("?"),
        )
        made.append([*np.log1p(counts), sum(word in asked for word in words) / max(1, len(words))])
    return np.array(made)


class Surface:
    def fit(self, texts: Texts) -> Callable[[Texts], Any]:
        scaler = StandardScaler().fit(surface(texts))
        return lambda more: scaler.transform(surface(more))


class TfIdf:
    def fit(self, texts: Texts) -> Callable[[Texts], Any]:
        options = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True}
        prompts, responses = (
            TfidfVectorizer(**options).fit(column) for column in zip(*texts, strict=True)
        )

        def features(more: Texts) -> Any:
            asked, said = zip(*more, strict=True)
            return sparse.hstack([prompts.transform(asked), responses.transform(said)]).tocsr()

        return features


def regression(
    features: Any, labels: np.ndarray, groups: Sequence[str], intercept: bool
) -> LogisticRegression:
    def model(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, fit_intercept=intercept, max_iter=2000)

    folds = GroupKFold(5)
    score = {
        c: cross_val_score(model(c), features, labels, groups=groups, cv=folds).mean()
        for c in STRENGTHS
    }
    return model(max(score, key=lambda c: score[c])).fit(features, labels)


def baseline(
    kind: str, make: Surface | TfIdf, train: Sequence[Row], held_out: Sequence[Row]
) -> dict[str, np.ndarray]:
    """Whether each held-out order, and (cost) each sign, is right."""

    def texts(rows: Sequence[Row], chosen: bool) -> Texts:
        return [
            (plain_text(r.pair.prompt), r.pair.responses[r.chosen if chosen else 1 - r.chosen])
            for r in rows
        ]

    features = make.fit([*texts(train, True), *texts(train, False)])
    groups = [prompt_key(row.pair.prompt) for row in train]
    sides = {
        part: [features(texts(rows, c)) for c in (True, False)]
        for part, rows in (("train", train), ("test", held_out))
    }
    difference = sides["train"][0] - sides["train"][1]
    flip = np.where(np.random.default_rng(0).random(len(train)) < 0.5, -1.0, 1.0)
    signed = (
        sparse.diags(flip) @ difference
        if sparse.issparse(difference)
        else flip[:, None] * difference
    )
    order = regression(signed, flip > 0, groups, intercept=False)
    right = {"order": order.decision_function(sides["test"][0] - sides["test"][1]) > 0}
    if kind == "cost":
        stack = sparse.vstack if sparse.issparse(difference) else np.vstack
        signs = {
            part: np.array([r.signs[i] for i in (0, 1) for r in rows])
            for part, rows in (("train", train), ("test", held_out))
        }
        known = signs["train"] != 0
        single = (
            stack(sides["train"]).tocsr()[known]
            if stack is sparse.vstack
            else stack(sides["train"])[known]
        )
        sign = regression(
            single,
            signs["train"][known] > 0,
            np.array([*groups, *groups])[known].tolist(),
            intercept=True,
        )
        right["sign"] = (sign.decision_function(stack(sides["test"])) > 0) == (signs["test"] > 0)
    return right


def trained(kind: str, folder: Path, held_out: Sequence[Row]) -> dict[str, np.ndarray]:
    rows = {
        r["id"]: r for r in pq.read_table(folder / f"reward/{kind}.held_out.parquet").to_pylist()
    }
    chosen, rejected = (
        np.array([rows[r.pair.source][name] for r in held_out]) for name in ("chosen", "rejected")
    )
    if kind == "reward":
        return {"order": chosen > rejected}
    signs = np.array([r.signs[i] for i in (0, 1) for r in held_out])
    return {
        "order": chosen < rejected,
        "sign": (np.concatenate([chosen, rejected]) > 0) == (signs > 0),
    }


def compare(kind: str, folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    train, held_out = [r for r in rows if not r.held_out], [r for r in rows if r.held_out]
    owner = np.unique([prompt_key(r.pair.prompt) for r in held_out], return_inverse=True)[1]
    right = {
        "trained": trained(kind, folder, held_out),
        "TF-IDF, logistic regression": baseline(kind, TfIdf(), train, held_out),
        "seven surface features": baseline(kind, Surface(), train, held_out),
    }
    result: dict[str, Any] = {
        "training_pairs": len(train),
        "pairs": len(held_out),
        "prompts": int(owner.max()) + 1,
    }
    print(
        f"{kind}: {len(train)} training pairs; {len(held_out)} held-out pairs of {result['prompts']} prompts"
    )
    for what in right["trained"]:
        known = (
            np.array([r.signs[i] != 0 for i in (0, 1) for r in held_out])
            if what == "sign"
            else np.ones(len(owner), bool)
        )
        owners = np.unique(
            (np.concatenate([owner, owner]) if what == "sign" else owner)[known],
            return_inverse=True,
        )[1]
        for name, columns in right.items():
            values = columns[what][known].astype(float)
            ahead = right["trained"][what][known] - values
            accuracy = bootstrap_weighted(
                lambda w, v=values: float(np.average(v, weights=w)), owners
            )
            lead = bootstrap_weighted(lambda w, v=ahead: float(np.average(v, weights=w)), owners)
            result.setdefault(what, {})[name] = {
                "accuracy": accuracy[:3],
                "trained_minus_this": lead[:3],
            }
            said = (
                ""
                if name == "trained"
                else f"   trained is ahead by {lead[0]:+.3f} [{lead[1]:+.3f}, {lead[2]:+.3f}]"
            )
            print(
                f"  {what}  {name:30}{accuracy[0]:.3f} [{accuracy[1]:.3f}, {accuracy[2]:.3f}]{said}"
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = scoring_config(load_config(arguments.run_dir / "run.yaml"))
    kinds = [
        k
        for k in ("cost", "reward")
        if (arguments.run_dir / f"reward/{k}.held_out.parquet").exists()
    ]
    result = {
        kind: compare(kind, arguments.run_dir, rows)
        for kind, rows in read_score_pairs(config, kinds).items()
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
