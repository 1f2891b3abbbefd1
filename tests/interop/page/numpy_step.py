"""A reader of `operation_list` in NumPy, token by token in float64: what the list says, in the fewest words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmixer.interop.operation_list import OperationList
from kmixer.layers.copy_memory import bucket_of
from kmixer.ops import suffix_matches

PANEL = 32
Vector = NDArray[np.float64]


def logits_of(listed: OperationList, tokens: Any) -> Vector:
    """Logits (t, v) after each of the tokens (t,)."""
    copied, lengths, _ = suffix_matches(tokens[None], memory=listed.description["memory"])
    buckets = bucket_of(lengths)[0].tolist()
    step = _Step(listed)
    rows = zip(tokens.tolist(), copied[0].tolist(), buckets, strict=True)
    return np.stack([step(token, copied, bucket) for token, copied, bucket in rows])


class _Step:
    def __init__(self, listed: OperationList) -> None:
        self.description = listed.description
        self.operations = [
            {
                **operation,
                **{
                    name: np.frombuffer(
                        listed.arrays, np.float16 if array["half"] else np.float32, array["count"], array["at"]
                    ).astype(np.float64)
                    for name, array in operation["arrays"].items()
                },
            }
            for operation in self.description["operations"]
        ]
        self.buffers = [np.zeros(width) for width in self.description["buffers"]]
        self.state: dict[int, tuple[Vector, Vector]] = {}

    def __call__(self, token: int, copied: int, bucket: int) -> Vector:
        for index, op in enumerate(self.operations):
            n = op["inputs"]
            x, y = self.buffers[op["input"]][:n], self.buffers[op["output"]]
            match op["kind"]:
                case "embed":
                    y[:n] = op["weight"].reshape(-1, n)[token]
                case "linear":
                    self._linear(op, x, y)
                case "norm":
                    y[:n] = op["weight"][:n] * _unit(x, op["eps"])
                case "mix":
                    y[:n] = self._mixed(index, op, x)
                case "pointwise":
                    bounded = np.tanh if op["activation"] == "tanh" else np.vectorize(math.erf)
                    alpha, shift = op["extra"]
                    added = op["weight"][:n] * bounded(alpha * x + shift) + op["bias"][:n]
                    y[:n] = added if op["residual"] < 0 else x + added
                case "read_out":
                    y[:n] = x + op["extra"][:n] * op["weight"][:n] * _unit(x, op["eps"]) + op["bias"][:n]
                case "refine":
                    y[:n] += op["extra"] * (x - y[:n])
                case "remember":
                    y[:n] = op["weight"].reshape(-1, n)[copied + 1]
                    if "bias" in op:
                        y[:n] += op["bias"].reshape(-1, n)[bucket]
                case "copy":
                    y[:n] += op["weight"][bucket] * x
                case "point":
                    y -= np.logaddexp.reduce(y)
                    if copied >= 0:
                        share = op["bias"][bucket] + op["weight"] @ x
                        y -= np.logaddexp(share, 0)
                        y[copied] = np.logaddexp(y[copied], -np.logaddexp(-share, 0))
        return self.buffers[self.description["logits"]].copy()

    def _linear(self, op: dict[str, Any], x: Vector, y: Vector) -> None:
        n, outputs = op["inputs"], op["outputs"]
        matrix = op["weight"].reshape(-1, n + 1, PANEL).transpose(1, 0, 2).reshape(n + 1, -1)[:, :outputs]
        made = x @ matrix[:n] + matrix[n]
        if op["residual"] >= 0:
            made = made + self.buffers[op["residual"]][:outputs]
        if op["activation"] == "gelu":
            made = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in made])
        y[:outputs] = made * y[:outputs] / (1 + np.exp(-made)) if op["activation"] == "gate" else made

    def _mixed(self, index: int, op: dict[str, Any], x: Vector) -> Vector:
        rank, lags, both = op["rank"], op["lags"], self.buffers[op["queries"]]
        query, key = both[:rank], both[op["wide_rank"] :][:rank]
        state, past = self.state.get(index, (np.zeros((rank, len(x))), np.zeros((max(0, lags - 1), len(x)))))
        state = op["weight"][:rank, None] * state + (key / max(np.linalg.norm(key), op["eps"]))[:, None] * x
        past = np.concatenate([past, x[None]]) if lags else past
        self.state[index] = state, past[1:]
        mixed: Vector = (op["bias"][:rank] * query / max(np.linalg.norm(query), op["eps"])) @ state
        return mixed + op["extra"] @ past[::-1] if lags else mixed


def _unit(x: Vector, eps: float) -> Vector:
    """x divided by its root mean square."""
    return x / math.sqrt(x @ x / len(x) + eps)
