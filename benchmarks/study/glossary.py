"""The words of the report, each with one meaning."""

from __future__ import annotations

from benchmarks.study.config import Config


def glossary(config: Config) -> list[tuple[str, str]]:
    """Return (word, meaning) for a reader who meets them for the first time."""
    rank = config.training.rank
    return [
        (
            "A, B",
            f"the two factors of an adapter's change of a weight matrix, (alpha / r) B A; r = "
            f"{rank} here unless said otherwise. B starts at zero, A at random.",
        ),
        (
            "delta",
            "that change. Adapters are summed by adding their deltas, each times its weight, to "
            "the base.",
        ),
        (
            "shared A, different A",
            "adapters that started from the same random A, or each from its own. Training then "
            "moves A.",
        ),
        (
            "arm",
            "one complete set of adapters: one of each domain and the joint ones. Arms of one kind "
            "differ in their seed.",
        ),
        ("rotated", "an arm of different A made of what is there: each domain from another seed."),
        ("joint adapter", "one adapter trained on the rows of several domains together."),
        (
            "oracle router",
            "no sum: each row goes to its own domain's adapter alone, as if the domain were known.",
        ),
        (
            "interference",
            "perplexity of a sum at weight 1 over that of the oracle router of the same adapters; "
            "in per cent, or as nats a token, which is the logarithm of that ratio.",
        ),
        (
            "change",
            "perplexity of one model over that of another that is named, in per cent, on the same "
            "rows.",
        ),
        (
            "cost over the better adapter",
            "only in graded overlap: a sum's perplexity over that of whichever of its two adapters "
            "is better on each domain's test rows.",
        ),
        (
            "lambda",
            "the weight of a delta in a sum, 1 in the paper; lambda* is the best of a grid on "
            "validation rows.",
        ),
        (
            "RMS cosine",
            "root mean square of the cosines of two deltas over the modules: the paper's measure.",
        ),
        (
            "floor",
            "RMS cosine of random deltas: 1/sqrt(in x out) if each has its own A, about 1/sqrt(r x "
            "out) if both have one.",
        ),
        (
            "ceiling",
            "RMS cosine of two adapters trained on the same domain, from different A or from one.",
        ),
    ]
