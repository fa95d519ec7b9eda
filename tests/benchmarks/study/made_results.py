"""Results as a run leaves them, from hand-made figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.study.results import Results
from benchmarks.study.study import Pair, Scoring, Study
from benchmarks.study.workspace import Workspace

# Rows differ, alike under every model: changes have no chance of rows, only of seeds.
_ROWS = (-0.4, 0.3, 0.0, 0.1, -0.2, 0.2)
_TOKENS = 10


class Made:
    """A workspace that is filled by hand."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        self.workspace = Workspace(folder / "out", folder / "cache")

    @property
    def results(self) -> Results:
        return Results(self.study, self.workspace)

    def losses(self, scorings: Iterable[Scoring], mean: Callable[[Scoring], float | None]) -> None:
        """Write the losses of models by their mean, nats a token; None: not finite."""
        study, workspace = self.study, self.workspace
        for scoring in scorings:
            value = mean(scoring)
            rows = study.rows_key(scoring.domain, scoring.part, scoring.template)
            if rows not in workspace.rows:
                workspace.rows.add(
                    {
                        "key": rows,
                        "domain": scoring.domain,
                        "part": scoring.part,
                        "template": scoring.template,
                        "tokens": [_TOKENS] * len(_ROWS),
                        "groups": list(range(len(_ROWS))),
                    }
                )
            record: dict[str, object] = {"key": study.scoring_key(scoring), "rows": rows, "mix": []}
            if value is None:
                record["not_finite"] = "too large"
            elif scoring.part == "test":
                record["nats"] = [_TOKENS * (value + each) for each in _ROWS]
            else:
                record["nats"] = [_TOKENS * value * len(_ROWS)]
            workspace.losses.add(record)

    def cosines(
        self,
        pairs: Iterable[Pair],
        cosine: Callable[[Pair, str], float],
        norm: Callable[[Pair], float] = lambda _: 1.0,
        *,
        activations: bool = False,
    ) -> None:
        """Write how deltas lie to each other, module by module; both have one norm."""
        for pair in pairs:
            size = norm(pair)
            self.workspace.geometry.add(
                {
                    "key": self.study.pair_key(pair, activations=activations),
                    "pair": [],
                    "products": {
                        module: [cosine(pair, module) * size**2, size, size]
                        for module in self.study.inputs.modules
                    },
                }
            )
