"""Every call of the contract, as both clients offer it: its arguments, request and result.

A function here is the method of its name in `Client` and in `AsyncClient`; `set` and `mix` are
named for that. What such a method returns, or streams, is what the Call is of.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Unpack

from grpc_health.v1 import health_pb2

from superpose_client import requests
from superpose_client.call import UNLIMITED, WORK, Call, Calls
from superpose_client.errors import AdapterFolderError, InvalidArgumentError
from superpose_client.mix import MixLike
from superpose_client.requests import (
    AdapterFiles,
    GenerateOptions,
    Prompt,
    Scope,
    ScoreBatches,
    ScoreText,
)
from superpose_client.results import (
    AdapterInfo,
    Analysis,
    Change,
    CurrentMix,
    FitUpdate,
    Generation,
    GenerationChunk,
    HealthStatus,
    MergeResult,
    MixState,
    NamedMix,
    PushResult,
    ScoreResult,
    ServerInfo,
    Verification,
)
from superpose_proto.v1 import adapter_pb2, audit_pb2, inference_pb2, mix_pb2, server_pb2

# Text under a mix.


def generate(
    prompt: Prompt,
    *,
    mix: MixLike | None = None,
    request_id: str = "",
    min_generation: int | None = None,
    timeout: float | None = None,
    **options: Unpack[GenerateOptions],
) -> Call[Generation]:
    """Return the text that follows the prompt. For the options see `GenerateOptions`.

    With `min_generation` no server answers whose default mix has a lower generation: it is
    UNAVAILABLE, which is tried again, and of several servers another one is asked.
    """
    request = requests.generate(
        inference_pb2.GenerateRequest, prompt, mix, request_id, min_generation, options
    )
    return Call("Inference.Generate", request, Generation.from_proto, timeout, WORK)


def stream(
    prompt: Prompt,
    *,
    mix: MixLike | None = None,
    request_id: str = "",
    min_generation: int | None = None,
    timeout: float | None = None,
    **options: Unpack[GenerateOptions],
) -> Call[GenerationChunk]:
    """Begin to generate; the chunks come as the text is made."""
    kind = inference_pb2.GenerateStreamRequest
    request = requests.generate(kind, prompt, mix, request_id, min_generation, options)
    return Call("Inference.GenerateStream", request, GenerationChunk.from_proto, timeout, UNLIMITED)


def score(
    texts: Iterable[ScoreText],
    *,
    mix: MixLike | None = None,
    max_length: int | None = None,
    scope: Scope = "all",
    logprobs: bool = False,
    mixes: Sequence[MixLike] | None = None,
    progress: Callable[[int], None] | None = None,
    min_generation: int | None = None,
    timeout: float | None = None,
) -> Calls[ScoreResult]:
    """Return log-probabilities and perplexity of texts or (question, answer) pairs.

    With `mixes` in place of `mix` they are scored under each of several, which share the server's
    passes; then the result has a block for each in its `mixes`. Any number of texts: they go out
    256 at a time, or as many as make 2048 rows with the mixes, each request with its own timeout
    and all under the mix of the first; `progress` is told how many are scored. The scope "answer",
    for pairs only, leaves the question's tokens out of the sums. A text without a scored token
    counts for nothing, and has 0 tokens and a perplexity of NaN. For `min_generation` see
    `generate`.

    Raises:
        InvalidArgumentError: A text cannot be scored; it is named as texts[i].
        ValueError: No mixes, or the default mix among them: write it out.
        MixChangedError: An adapter of the mix was replaced in between.
    """
    batches = ScoreBatches(texts, mix, max_length, scope, logprobs, mixes, min_generation)
    for request in batches:
        try:
            done = yield Call("Inference.Score", request, batches.add, timeout, WORK)
        except InvalidArgumentError as error:
            raise batches.counted(error) from error
        if progress is not None:
            progress(done)
    return batches.result()


def fit(
    texts: Iterable[ScoreText],
    domains: Iterable[str],
    *,
    max_length: int | None = None,
    scope: Scope = "all",
    budget: int | None = None,
    low: float | None = None,
    high: float | None = None,
    penalty: float | None = None,
    seed: int = 0,
    sources: Iterable[int] = (),
    timeout: float | None = None,
) -> Call[FitUpdate]:
    """Find the weights of `domains` that lose least on texts or (question, answer) pairs.

    The last update has the result, those before how far the search is. Nothing is changed: `set`
    or `name_mix` with the result's `mix.weights` does. About a third of the 2 to 256 texts is held
    out and tells what the weights are worth.

    Args:
        texts: What to fit on.
        domains: Whose weights; 1 to 8.
        max_length: As in `score`.
        scope: As in `score`.
        budget: Mixes that may be scored; None: 20 and 10 for each domain.
        low: Least weight; None: -1.
        high: Greatest weight; None: 2.
        penalty: Nats a token for each unit of weight; None: 0.01.
        seed: Same seed, same result.
        sources: Of each text the number of the source, such as a file, that it comes from: about a
            third of each is held out. Empty: all come from one.
        timeout: In seconds; None: none.
    """
    request = inference_pb2.FitMixRequest(
        items=requests.score_items(texts),
        domains=domains,
        max_length=max_length,
        scope=requests.score_scope(scope),
        budget=budget,
        low=low,
        high=high,
        penalty=penalty,
        seed=seed,
        sources=sources,
    )
    return Call("Inference.FitMix", request, FitUpdate.from_proto, timeout, UNLIMITED)


# The default mix.


def add(
    domain: str,
    weight: float | None = None,
    *,
    expected_generation: int | None = None,
    timeout: float | None = None,
) -> Call[MixState]:
    """Add a domain to the default mix, with weight 1 unless another is given."""
    request = mix_pb2.AddDomainRequest(
        domain=domain, weight=weight, expected_generation=expected_generation
    )
    return Call("Mix.AddDomain", request, _mix_of, timeout)


def remove(
    domain: str, *, expected_generation: int | None = None, timeout: float | None = None
) -> Call[MixState]:
    """Remove a domain from the default mix."""
    request = mix_pb2.RemoveDomainRequest(domain=domain, expected_generation=expected_generation)
    return Call("Mix.RemoveDomain", request, _mix_of, timeout)


def set(
    mix: MixLike, *, expected_generation: int | None = None, timeout: float | None = None
) -> Call[MixState]:
    """Make `mix` the default mix. Setting what is set already changes nothing."""
    request = mix_pb2.SetMixRequest(mix=requests.mix(mix), expected_generation=expected_generation)
    return Call("Mix.SetMix", request, _mix_of, timeout)


def mix(*, timeout: float | None = None) -> Call[CurrentMix]:
    """Return the default mix, with the resident one beside it."""
    return Call("Mix.GetMix", mix_pb2.GetMixRequest(), CurrentMix.from_proto, timeout)


def watch(*, timeout: float | None = None) -> Call[MixState]:
    """Follow the default mix: its present state first, then one state a change."""
    return Call("Mix.WatchMix", mix_pb2.WatchMixRequest(), _mix_of, timeout, UNLIMITED)


def analyze(mix: MixLike | None = None, *, timeout: float | None = None) -> Call[Analysis]:
    """Report how the domains of a mix interfere. Nothing is changed."""
    request = mix_pb2.AnalyzeMixRequest(mix=requests.mix(mix))
    return Call("Mix.AnalyzeMix", request, Analysis.from_proto, timeout, WORK)


def verify(*, timeout: float | None = None) -> Call[Verification]:
    """Compare the weights in use with what they should be. A mismatch is a result, `ok`."""
    request = mix_pb2.VerifyWeightsRequest()
    return Call("Mix.VerifyWeights", request, Verification.from_proto, timeout, WORK)


# Named mixes.


def name_mix(
    name: str, mix: MixLike | None = None, *, timeout: float | None = None
) -> Call[NamedMix]:
    """Let `name` stand for a mix, in place of what it stood for; None is the default mix now."""
    request = mix_pb2.NameMixRequest(name=name, mix=requests.mix(mix))
    return Call(
        "Mix.NameMix", request, lambda response: NamedMix.from_proto(response.named_mix), timeout
    )


def unname_mix(name: str, *, timeout: float | None = None) -> Call[None]:
    """Take the name of a mix away. Requests that named it keep their mix."""
    return Call("Mix.UnnameMix", mix_pb2.UnnameMixRequest(name=name), lambda _: None, timeout)


def named_mixes(*, timeout: float | None = None) -> Call[tuple[NamedMix, ...]]:
    """Return all named mixes, in order of their names."""
    return Call(
        "Mix.ListNamedMixes",
        mix_pb2.ListNamedMixesRequest(),
        lambda response: tuple(map(NamedMix.from_proto, response.named_mixes)),
        timeout,
    )


# Adapters.


def adapters(*, timeout: float | None = None) -> Call[tuple[AdapterInfo, ...]]:
    """Return all adapters, in order of their domains."""
    return Call(
        "Adapter.ListAdapters",
        adapter_pb2.ListAdaptersRequest(),
        lambda response: tuple(map(AdapterInfo.from_proto, response.adapters)),
        timeout,
    )


def adapter(domain: str, *, timeout: float | None = None) -> Call[AdapterInfo]:
    """Return one adapter, with its modules and its configuration."""
    return Call(
        "Adapter.GetAdapter",
        adapter_pb2.GetAdapterRequest(domain=domain),
        lambda response: AdapterInfo.from_proto(response.adapter),
        timeout,
    )


def push(
    domain: str,
    adapter: str | PathLike[str] | AdapterFiles,
    *,
    replace: bool = False,
    timeout: float | None = None,
) -> Calls[PushResult]:
    """Store an adapter, a PEFT folder or its two files, under a domain name.

    The same bytes again are fine; other bytes need `replace`.

    Raises:
        AdapterFolderError: The folder lacks a file, holds a pickle, or more than the server takes.
    """
    found = adapter if isinstance(adapter, AdapterFiles) else requests.adapter_folder(adapter)
    size = requests.tensors_size(found)
    if size > requests.TAKEN_UNASKED:
        most = (yield info(timeout=timeout)).limits.max_adapter_bytes
        if size > most:
            raise AdapterFolderError(
                f"the tensors have {size} bytes, more than the {most} that this server takes; "
                "start it with a larger --max-adapter-mib"
            )
    files = found if isinstance(found, AdapterFiles) else AdapterFiles.read(found)
    request = adapter_pb2.PushAdapterRequest(
        domain=domain,
        config=files.config,
        tensors=files.tensors,
        replace=replace,
        training=files.training,
    )
    result: PushResult = yield Call(
        "Adapter.PushAdapter", request, PushResult.from_proto, timeout, WORK
    )
    return result


def merge(
    domain: str,
    mix: MixLike | None = None,
    *,
    method: str,
    options: Mapping[str, float | bool | str] | None = None,
    replace: bool = False,
    timeout: float | None = None,
) -> Call[MergeResult]:
    """Merge the adapters of a mix (None: the default mix) into one, stored under a domain name.

    Requests go on meanwhile. The same result again is fine; another needs `replace`. The server
    knows the methods and their options: one that it does not have it refuses with those it has.
    """
    request = adapter_pb2.MergeAdaptersRequest(
        domain=domain,
        mix=requests.mix(mix),
        method=method,
        options=requests.merge_options(options or {}),
        replace=replace,
    )
    return Call("Adapter.MergeAdapters", request, MergeResult.from_proto, timeout, WORK)


def delete(domain: str, *, timeout: float | None = None) -> Call[None]:
    """Delete an adapter that is not in the default mix."""
    request = adapter_pb2.DeleteAdapterRequest(domain=domain)
    return Call("Adapter.DeleteAdapter", request, lambda _: None, timeout)


# The server.


def info(*, timeout: float | None = None) -> Call[ServerInfo]:
    """Return what the server is and what it is doing."""
    request = server_pb2.GetServerInfoRequest()
    return Call("Server.GetServerInfo", request, ServerInfo.from_proto, timeout)


def changes(limit: int | None = None, *, timeout: float | None = None) -> Call[tuple[Change, ...]]:
    """Return the newest changes that operators made, the latest last; 100 unless told, or 1000."""
    return Call(
        "Audit.ListChanges",
        audit_pb2.ListChangesRequest(limit=limit),
        lambda response: tuple(map(Change.from_proto, response.changes)),
        timeout,
    )


def health(service: str = "", *, timeout: float | None = None) -> Call[HealthStatus]:
    """Return whether the server, or one of its services, takes requests."""
    return Call(
        "Health.Check",
        health_pb2.HealthCheckRequest(service=service),
        lambda response: HealthStatus(
            health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        ),
        timeout,
    )


def _mix_of(response: Any) -> MixState:
    return MixState.from_proto(response.mix)
