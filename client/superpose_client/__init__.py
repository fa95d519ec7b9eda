"""Client of Superpose: a base language model served with any weighted sum of LoRA adapters.

    from superpose_client import Client

    with Client("127.0.0.1:50051") as client:
        for chunk in client.stream("Question: What is 2 + 3?", mix="math=1,medicine=0.5"):
            print(chunk.text, end="", flush=True)

`Client` and `AsyncClient` have the same calls; `errors` shows what they raise. Imported on first
use, so that `adapterctl --help` does not wait for gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from superpose_client.access import Access
    from superpose_client.async_client import AsyncClient, AsyncStream
    from superpose_client.client import Client, Stream
    from superpose_client.errors import (
        AccessError,
        AdapterFolderError,
        AddressError,
        AlreadyExistsError,
        CallError,
        ClientClosedError,
        DataLossError,
        DeadlineExceededError,
        FailedPreconditionError,
        FieldViolation,
        GenerationMismatchError,
        InternalError,
        InvalidArgumentError,
        MixChangedError,
        MixSyntaxError,
        NotFoundError,
        NotPicklableError,
        PermissionDeniedError,
        QueueFullError,
        RateLimitedError,
        RequestCancelledError,
        ResourceExhaustedError,
        SuperposeError,
        UnauthenticatedError,
        UnavailableError,
        UnimplementedError,
    )
    from superpose_client.mix import MixLike, format_mix, parse_mix
    from superpose_client.requests import AdapterFiles, GenerateOptions, Prompt, Scope, ScoreText
    from superpose_client.results import (
        AdapterInfo,
        AdapterSource,
        Analysis,
        BoundEntry,
        Change,
        CurrentMix,
        DomainAnalysis,
        DomainWeight,
        Estimate,
        FinishReason,
        FitCandidate,
        FitProgress,
        FitResult,
        FitUpdate,
        FollowedFile,
        Generation,
        GenerationChunk,
        HealthStatus,
        ItemScore,
        Limits,
        MergeResult,
        MixScore,
        MixState,
        ModuleCosine,
        ModuleTypeCosine,
        NamedMix,
        PairAnalysis,
        Provenance,
        PushResult,
        Replica,
        ScoreResult,
        ServerInfo,
        TopLogprobs,
        Usage,
        Verification,
    )

__all__ = [
    "Access",
    "AccessError",
    "AdapterFiles",
    "AdapterFolderError",
    "AdapterInfo",
    "AdapterSource",
    "AddressError",
    "AlreadyExistsError",
    "Analysis",
    "AsyncClient",
    "AsyncStream",
    "BoundEntry",
    "CallError",
    "Change",
    "Client",
    "ClientClosedError",
    "CurrentMix",
    "DataLossError",
    "DeadlineExceededError",
    "DomainAnalysis",
    "DomainWeight",
    "Estimate",
    "FailedPreconditionError",
    "FieldViolation",
    "FinishReason",
    "FitCandidate",
    "FitProgress",
    "FitResult",
    "FitUpdate",
    "FollowedFile",
    "GenerateOptions",
    "Generation",
    "GenerationChunk",
    "GenerationMismatchError",
    "HealthStatus",
    "InternalError",
    "InvalidArgumentError",
    "ItemScore",
    "Limits",
    "MergeResult",
    "MixChangedError",
    "MixLike",
    "MixScore",
    "MixState",
    "MixSyntaxError",
    "ModuleCosine",
    "ModuleTypeCosine",
    "NamedMix",
    "NotFoundError",
    "NotPicklableError",
    "PairAnalysis",
    "PermissionDeniedError",
    "Prompt",
    "Provenance",
    "PushResult",
    "QueueFullError",
    "RateLimitedError",
    "Replica",
    "RequestCancelledError",
    "ResourceExhaustedError",
    "Scope",
    "ScoreResult",
    "ScoreText",
    "ServerInfo",
    "Stream",
    "SuperposeError",
    "TopLogprobs",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
    "Verification",
    "format_mix",
    "parse_mix",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in ("access", "errors", "mix", "requests", "results", "client", "async_client"):
            home = import_module(f"superpose_client.{module}")
            if name in vars(home):
                return vars(home)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
