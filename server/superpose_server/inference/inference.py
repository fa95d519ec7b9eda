"""All that can be asked of a server about texts, mixes and weights; every door comes here.

A door turns its wire into requests, calls this, and turns results and errors into its wire.
Nothing here knows which wire that is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from superpose_adapters.mix import BoundEntry, BoundMix, Mix
from superpose_server.caller import caller
from superpose_server.control.default_mix import MixState
from superpose_server.engine.score import ScoreRow
from superpose_server.engine.sequence import Sequence as Row
from superpose_server.errors import (
    DataLoss,
    FitRunning,
    InvalidArgument,
    OutputNotFinite,
    PermissionDenied,
    ShuttingDown,
    Unavailable,
)
from superpose_server.inference.delivery import Delivery
from superpose_server.inference.encoding import Encoder
from superpose_server.inference.fit import Sample, fit
from superpose_server.inference.generation import Generation
from superpose_server.inference.request import (
    Chat,
    FitRequest,
    GenerateRequest,
    MergeRequest,
    Prompt,
    ScoreRequest,
)
from superpose_server.inference.result import (
    FitProgress,
    FitResult,
    ItemScore,
    MergedAdapter,
    MixAnalysis,
    Scores,
    VerifiedWeights,
)
from superpose_server.model.memory import give_back
from superpose_server.runtime import Runtime

Q = TypeVar("Q")
R = TypeVar("R")
# From this many characters on, a text is tokenised beside the event loop.
_LONG_TEXT = 1 << 14
# And from this many on its tokens take tens of MiB.
_GIANT_TEXT = 1 << 18
# Seconds after which another fit may have ended.
_FIT_SECONDS = 10.0


class Inference:
    """Binds requests to mixes and runs them on the engine; belongs to one event loop."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`, on the running event loop."""
        self._runtime = runtime
        self._delivery = Delivery(asyncio.get_running_loop())
        self._encoder = Encoder(
            runtime.texts,
            runtime.tokenizer,
            runtime.base.context_length,
            runtime.limits.max_score_items,
            runtime.limits.max_score_rows,
        )
        self._fitting = False

    async def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, at least one, and no more than the context holds.

        Raises:
            InvalidArgument: There are none, or too many, or some that the base does not have.
        """
        if _takes_long(prompt):
            return await asyncio.to_thread(_lean, self._encoder.prompt, prompt)
        return self._encoder.prompt(prompt)

    async def generate(self, request: GenerateRequest, bound: MixState | None = None) -> Generation:
        """Accept a request and give it to the engine.

        Args:
            request: What is asked for.
            bound: What its mix was bound to already, where it is one part of what a client asked.

        Raises:
            InvalidArgument: The request is wrong, or does not fit the context.
            NotFound: Its mix holds a name that stands for no adapter and no mix.
            QueueFull: Too many requests wait.
            Unavailable: The default mix has a lower generation than is asked for.
            DataLoss: The weights are damaged.
            ShuttingDown: The server is stopping.
        """
        prompt = await self.encode(request.prompt)
        self._encoder.check(request, len(prompt))
        bound = bound or self.bind(request.mix, request.min_generation)
        inbox = self._delivery.inbox()
        options = request.options.within(self._runtime.base.context_length - len(prompt))
        row = Row(prompt, bound.mix, options, inbox.put, self._runtime.tokenizer)
        self._runtime.engine.submit(row)
        return Generation(request.request_id or str(uuid.uuid4()), bound, row, inbox)

    async def score(
        self, request: ScoreRequest, bound: MixState | None = None
    ) -> tuple[Scores, ...]:
        """Return log-probabilities of given texts under each mix of the request.

        Args:
            request: What is asked for.
            bound: What its one mix was bound to already; see `generate`.

        Raises:
            InvalidArgument: The request is wrong.
            FailedPrecondition: The model's output is not finite under one of the mixes.
            NotFound, QueueFull, DataLoss, ShuttingDown: As `generate`.
        """
        rows = await asyncio.to_thread(_lean, self._encoder.score_rows, request)
        least = request.min_generation
        mixes = (bound,) if bound else tuple(self.bind(mix, least) for mix in request.mixes)
        return await self._score_rows(rows, mixes)

    async def _score_rows(
        self, rows: Sequence[ScoreRow], mixes: Sequence[MixState]
    ) -> tuple[Scores, ...]:
        """Return the scores of rows of token ids under each of `mixes`, in one job of the engine.

        Raises:
            FailedPrecondition: The model's output is not finite under one of the mixes.
            QueueFull, ShuttingDown: As `generate`.
        """
        job = self._runtime.engine.score(
            [row for _ in mixes for row in rows], [state.mix for state in mixes for _ in rows]
        )
        try:
            found = (await asyncio.wrap_future(job)).value
        except OutputNotFinite as error:
            if error.row is None or len(mixes) == 1:
                raise
            raise OutputNotFinite(f"mixes[{error.row // len(rows)}]", row=error.row) from error
        items = [ItemScore(tuple(row.logprobs), tuple(row.top_logprobs)) for row in found]
        return tuple(
            Scores(tuple(items[at * len(rows) : (at + 1) * len(rows)]), state)
            for at, state in enumerate(mixes)
        )

    async def fit(self, request: FitRequest) -> AsyncGenerator[FitProgress | FitResult]:
        """Find the weights that lose least on given rows; nothing is changed.

        Yields progress, and at last the result. What is closed before stops at the engine's next
        slice.

        Raises:
            InvalidArgument: The request is wrong, or its rows are too few.
            FailedPrecondition: The model's output is not finite under a mix within the bounds.
            FitRunning: Another fit runs.
            NotFound, QueueFull, DataLoss, ShuttingDown: As `generate`.
        """
        if self._fitting:
            raise FitRunning(_FIT_SECONDS)
        self._fitting = True
        try:
            rows = await asyncio.to_thread(self._encoder.rows, request)
            sample = Sample.of(request.items, rows, request.sources)
            mix_of = self._mixes_of(request.domains)

            async def score(
                rows: Sequence[ScoreRow], mixes: Sequence[MixState]
            ) -> tuple[Scores, ...]:
                self._check_serving()  # It goes on for longer than any other request.
                return await self._score_rows(rows, mixes)

            most = self._runtime.limits.max_score_rows
            async with aclosing(fit(request, sample, mix_of, score, most)) as updates:
                async for update in updates:
                    yield update
        finally:
            self._fitting = False

    def _mixes_of(self, domains: Sequence[str]) -> Callable[[Sequence[float]], MixState]:
        """Return what makes mixes of the adapters that `domains` name now, one weight for each.

        Raises:
            NotFound: A domain is not loaded.
            InvalidArgument: One is a named mix.
        """
        registry = self._runtime.registry
        registry.check_size(len(domains), "domains")
        for name in domains:
            if registry.named_mixes.find(name) is not None:
                raise InvalidArgument(
                    f"{name} is a named mix: name the domains whose weights are to be fitted",
                    "NOT_A_DOMAIN",
                    field="domains",
                )
        adapters = {name: registry.get(name).adapter for name in domains}
        generation = self._runtime.default_mix.state.generation

        def mix_of(weights: Sequence[float]) -> MixState:
            entries = (
                BoundEntry(name, adapter, weight)
                for (name, adapter), weight in zip(adapters.items(), weights, strict=True)
                if weight != 0
            )
            return MixState(generation, BoundMix.of(registry.base_digest, entries))

        return mix_of

    async def analyze(self, mix: Mix | None) -> MixAnalysis:
        """Report how the domains of a mix (None: the default mix) interfere, without folding it.

        Raises:
            FailedPrecondition: The folded weights would not be finite.
            NotFound, QueueFull, ShuttingDown: As `generate`.
        """
        runtime = self._runtime
        bound = self.resolve(mix)
        prepared = await runtime.operate(lambda operator: operator.prepare(bound.mix))
        measured = await asyncio.wrap_future(runtime.engine.measure_fold_error(prepared))
        geometry = await runtime.operate(lambda operator: operator.analyze(prepared))
        return MixAnalysis(
            bound, geometry, measured.value, prepared.foldable, measured.longest_stall_seconds
        )

    async def merge(self, request: MergeRequest) -> MergedAdapter:
        """Merge the adapters of a mix into one, and store and serve that.

        The mix is bound now: what becomes of its domains meanwhile does not matter. If this is
        cancelled before the merging ends, nothing is stored.

        Raises:
            InvalidArgument: The mix is the base model, the name is none, or the method does not
                take these adapters.
            FailedPrecondition, AlreadyExists: As `Operator.push`; or more would come out than an
                adapter may have, or nothing.
            NotFound, QueueFull, DataLoss, ShuttingDown: As `generate`.
        """
        bound = self.bind(request.mix)
        if not bound.mix.entries:
            raise InvalidArgument(
                "the mix is the base model, and there is nothing to merge: name a domain or more",
                "NOTHING_TO_MERGE",
                field="mix",
            )
        runtime = self._runtime
        await runtime.operate(lambda operator: operator.check_domain(request.domain))
        merged = await runtime.merger.merge(bound.mix, request.method)
        registered, state = await runtime.operate(
            lambda operator: operator.keep_merged(request.domain, merged, request.replace)
        )
        return MergedAdapter(registered, state, merged.deviation, merged.seconds)

    async def verify(self) -> VerifiedWeights:
        """Compare the resident weights with a fresh fold, and the base with its hash.

        Raises:
            FailedPrecondition: The resident mix changed again and again.
            QueueFull, ShuttingDown: As `generate`.
        """
        generation = self._runtime.default_mix.state.generation
        result = await self._runtime.verify()
        found = result.value
        return VerifiedWeights(MixState(generation, found.mix), found, result.longest_stall_seconds)

    def bind(self, mix: Mix | None, min_generation: int = 0) -> MixState:
        """Resolve a request's mix now, unless nothing may run.

        Raises:
            NotFound: It names a domain that is not loaded.
            Unavailable: The default mix has a lower generation than is asked for.
            DataLoss: The weights are damaged.
            ShuttingDown: The server is stopping.
        """
        self._check_serving()
        state = self.resolve(mix)
        if state.generation < min_generation:
            raise Unavailable(
                f"generation {min_generation} or a later one was asked for, and the default mix is "
                f"at {state.generation}: try again, or ask another server",
                "GENERATION_NOT_REACHED",
                metadata={"generation": str(state.generation)},
            )
        return state

    def _check_serving(self) -> None:
        if self._runtime.ending.is_set():
            raise ShuttingDown
        integrity = self._runtime.integrity
        if not integrity.intact:
            remedy = "try again in a moment, when they are mended"
            if integrity.hopeless:
                remedy = "restart the server"
            raise DataLoss(
                f"the weights failed their last verification: {remedy}", "WEIGHTS_DAMAGED"
            )

    def resolve(self, mix: Mix | None) -> MixState:
        """Return what `mix` (None: the default mix) means now, whatever changes later.

        Raises:
            NotFound: It names a domain that is not loaded.
            PermissionDenied: It holds a domain that the caller may not use.
        """
        state = self._runtime.default_mix.state
        if mix is not None:
            state = MixState(state.generation, self._runtime.registry.bind(mix))
        _check_domains(state.mix)
        return state


def _check_domains(mix: BoundMix) -> None:
    """Refuse a mix that its caller may not have.

    By what it holds, not by what it is called: a named mix and the default mix count as their
    domains, or else an operator who changes them would hand out what a token is to be kept from.
    """
    allowed = caller().domains
    if allowed is None:
        return
    for entry in mix.entries:
        if entry.domain not in allowed:
            raise PermissionDenied(
                f"token {caller().name} may not use {entry.domain}, which the mix holds: its "
                f"domains are {', '.join(sorted(allowed)) or 'none, but the base'}",
                "DOMAIN_NOT_ALLOWED",
                metadata={"domain": entry.domain},
            )


def _lean(encode: Callable[[Q], R], request: Q) -> R:
    """Encode; of a giant text give back what its tokens took, which malloc would keep for long."""
    try:
        return encode(request)
    finally:
        if _is_giant(request):
            give_back()


def _is_giant(request: object) -> bool:
    texts = request.items if isinstance(request, ScoreRequest) else (request,)
    return any(isinstance(text, str) and len(text) >= _GIANT_TEXT for text in texts)


def _takes_long(prompt: Prompt) -> bool:
    return isinstance(prompt, Chat) or (isinstance(prompt, str) and len(prompt) >= _LONG_TEXT)
