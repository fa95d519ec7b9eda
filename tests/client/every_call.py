"""Every call of the contract, once, through a client."""

from collections.abc import Callable
from typing import Any

from tests.client.callers import Caller

from superpose_client.requests import AdapterFiles

ONCE, ALWAYS = 1, 2

# How each method of the contract is called, and how often it arrives if its first attempt is lost.
CALLS: dict[str, tuple[int, Callable[[Caller], Any]]] = {
    "Generate": (ALWAYS, lambda caller: caller.generate("x")),
    "GenerateStream": (ALWAYS, lambda caller: caller.collect("stream", "x")),
    "Score": (ALWAYS, lambda caller: caller.score(["x"])),
    "FitMix": (ONCE, lambda caller: caller.collect("fit", ["x", "y"], ["math"])),
    "AddDomain": (ONCE, lambda caller: caller.add("math")),
    "RemoveDomain": (ONCE, lambda caller: caller.remove("math")),
    "SetMix": (ONCE, lambda caller: caller.set("math")),
    "GetMix": (ALWAYS, lambda caller: caller.mix()),
    "WatchMix": (ALWAYS, lambda caller: caller.collect("watch")),
    "AnalyzeMix": (ALWAYS, lambda caller: caller.analyze("math")),
    "VerifyWeights": (ONCE, lambda caller: caller.verify()),
    "NameMix": (ONCE, lambda caller: caller.name_mix("half", "math=0.5")),
    "UnnameMix": (ONCE, lambda caller: caller.unname_mix("half")),
    "ListNamedMixes": (ALWAYS, lambda caller: caller.named_mixes()),
    "ListAdapters": (ALWAYS, lambda caller: caller.adapters()),
    "GetAdapter": (ALWAYS, lambda caller: caller.adapter("math")),
    "PushAdapter": (ONCE, lambda caller: caller.push("math", AdapterFiles(b"{}", b""))),
    "DeleteAdapter": (ONCE, lambda caller: caller.delete("math")),
    "MergeAdapters": (ONCE, lambda caller: caller.merge("sum", "math", method="sum")),
    "GetServerInfo": (ALWAYS, lambda caller: caller.info()),
    "ListChanges": (ALWAYS, lambda caller: caller.changes()),
}
GUARDED: dict[str, Callable[[Caller], Any]] = {
    "AddDomain": lambda caller: caller.add("math", expected_generation=0),
    "RemoveDomain": lambda caller: caller.remove("math", expected_generation=7),
    "SetMix": lambda caller: caller.set("math", expected_generation=7),
}
